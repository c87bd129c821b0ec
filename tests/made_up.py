"""A made-up family in one file, registered from outside of the package: a decoder-only model, top-2, SwiGLU experts.

Every second layer holds experts. On disk an expert is three tensors, and layers have other names, or all experts of a
block are two tensors; in memory they are two, as upstream has them.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe import modeling_olmoe as upstream

from pregate import register_family
from pregate.models import decoder_only, gated_experts
from pregate.models.decoder_only import STACK
from pregate.models.decoder_only_family import DecoderOnlyFamily
from pregate.models.experts import ExpertSpec
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class MadeUpConfig(PreGatedConfig, OlmoeConfig):
    model_type = "pregated_made_up"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class MadeUpGates(decoder_only.TopKGates, upstream.OlmoeTopKRouter):
    router_class = upstream.OlmoeTopKRouter


class MadeUpLayer(decoder_only.PreGatedLayer, upstream.OlmoeDecoderLayer):
    def __init__(self, config: MadeUpConfig, layer: int) -> None:
        super().__init__(config, layer)
        if layer not in FAMILY.moe_layers(config, STACK):
            D, F = config.hidden_size, config.intermediate_size
            self.mlp = nn.Sequential(nn.Linear(D, F, bias=False), nn.SiLU(), nn.Linear(F, D, bias=False))


class MadeUpPreTrainedModel(decoder_only.PreGatedPreTrained, upstream.OlmoePreTrainedModel):
    config_class = MadeUpConfig
    layer_class, gates_class = MadeUpLayer, MadeUpGates


class MadeUpModel(decoder_only.PreGatedStack, MadeUpPreTrainedModel, upstream.OlmoeModel):
    pass


class MadeUpForCausalLM(decoder_only.PreGatedCausalLM, MadeUpPreTrainedModel, upstream.OlmoeForCausalLM):
    stack_class = MadeUpModel


class MadeUpFamily(DecoderOnlyFamily):
    source_type, source_class = "made_up", "MadeUpForCausalLM"
    config_class, model_class = MadeUpConfig, MadeUpForCausalLM
    renames = ((".feed_forward.", ".mlp."),)

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        return list(range(1, config.num_hidden_layers, 2))

    def experts(self, config: Any) -> ExpertSpec:
        E, F, D = config.num_experts, config.intermediate_size, config.hidden_size
        prefix = "model.layers.{layer}.mlp.experts"
        return ExpertSpec(
            num_experts=E,
            top_k=config.num_experts_per_tok,
            lookahead=config.pregating.lookahead,
            matrices=gated_experts.shapes(D, F),
            layers={STACK: self.moe_layers(config, STACK)},
            layouts=(gated_experts.fused(prefix, E, D, F), gated_experts.apart(prefix)),
            apply=gated_experts.gated_unit("silu"),
            activation="gated_silu",
        )


FAMILY = MadeUpFamily()
register_family(FAMILY)
