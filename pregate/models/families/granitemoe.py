"""The Granite-MoE family: scaled embeddings, residuals and logits, top-k before softmax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GraniteMoeConfig
from transformers.models.granitemoe import modeling_granitemoe as upstream

from pregate.models import decoder_only
from pregate.models.decoder_only_family import DecoderOnlyFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedGraniteMoeConfig(PreGatedConfig, GraniteMoeConfig):
    model_type = "pregated_granitemoe"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedGraniteMoeGates(decoder_only.TopKGates, upstream.GraniteMoeTopKRouter):
    router_class = upstream.GraniteMoeTopKRouter


class PreGatedGraniteMoeLayer(decoder_only.PreGatedLayer, upstream.GraniteMoeDecoderLayer):
    @property
    def mlp(self) -> Any:
        return self.block_sparse_moe


class PreGatedGraniteMoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.GraniteMoePreTrainedModel):
    config_class = PreGatedGraniteMoeConfig
    layer_class, gates_class = PreGatedGraniteMoeLayer, PreGatedGraniteMoeGates


class PreGatedGraniteMoeModel(decoder_only.PreGatedStack, PreGatedGraniteMoePreTrainedModel, upstream.GraniteMoeModel):
    pass


class PreGatedGraniteMoeForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedGraniteMoePreTrainedModel, upstream.GraniteMoeForCausalLM
):
    stack_class = PreGatedGraniteMoeModel


class GraniteMoeFamily(DecoderOnlyFamily):
    source_type, source_class = GraniteMoeConfig.model_type, "GraniteMoeForCausalLM"
    config_class, model_class = PreGatedGraniteMoeConfig, PreGatedGraniteMoeForCausalLM
    step = "rotary"
    experts_setting = "num_local_experts"
    router, experts_module = "block_sparse_moe.router", "block_sparse_moe.experts"
    renames = (
        (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
    )

    def random_scale(self, name: str, config: Mapping[str, Any]) -> float | None:
        scale = super().random_scale(name, config)
        if name.endswith("embed_tokens.weight"):
            return 1.0 / config["embedding_multiplier"]
        if name.endswith(("o_proj.weight", "down_proj")):
            return scale / config["residual_multiplier"]
        return scale


FAMILY = GraniteMoeFamily()
register_family(FAMILY)
