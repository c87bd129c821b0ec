"""The config of a Switch model, and what follows from it alone: stacks, MoE layers, how gates begin."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import SwitchTransformersConfig

from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating

STACKS = ("encoder", "decoder")
OLD_MARKER = "_pregate_without_experts"
"""What an earlier version put into configs for `without_experts`. A file may still hold it; it means nothing."""


def moe_layers(config: SwitchTransformersConfig, stack: str) -> list[int]:
    """The layer numbers of the MoE blocks of `stack`, in order, by upstream's rule."""
    depth = config.num_layers if stack == STACKS[0] else (config.num_decoder_layers or config.num_layers)
    step = config.encoder_sparse_step if stack == STACKS[0] else config.decoder_sparse_step
    return [layer for layer in range(depth) if step > 0 and (step == 1 or layer % step == 1)]


def gate_std(config: SwitchTransformersConfig) -> float:
    """The standard deviation of a gate's weights at initialisation: unit-variance logits of normalised states."""
    return config.initializer_factor * config.d_model**-0.5


@strict
class PreGatedSwitchTransformersConfig(PreGatedConfig, SwitchTransformersConfig):
    """`SwitchTransformersConfig` and a `pregate` section (see `PreGating`)."""

    model_type = "pregated_switch_transformers"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop(OLD_MARKER, None)
        super().__post_init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Upstream's, with the decoder's own depth, so that `generate` sizes its cache for a deeper decoder."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if decoder and config is not self:
            config.num_layers = self.num_decoder_layers or self.num_layers
        return config
