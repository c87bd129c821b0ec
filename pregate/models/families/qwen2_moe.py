"""The Qwen2-MoE family: dense layers between, and a shared expert with a gate of its own."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe import modeling_qwen2_moe as upstream

from pregate.models import decoder_only
from pregate.models.decoder_only_family import DecoderOnlyFamily, sparse_layers
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedQwen2MoeConfig(PreGatedConfig, Qwen2MoeConfig):
    model_type = "pregated_qwen2_moe"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedQwen2MoeGates(decoder_only.TopKGates, upstream.Qwen2MoeTopKRouter):
    router_class = upstream.Qwen2MoeTopKRouter


class PreGatedQwen2MoeLayer(decoder_only.PreGatedLayer, upstream.Qwen2MoeDecoderLayer):
    pass


class PreGatedQwen2MoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.Qwen2MoePreTrainedModel):
    config_class = PreGatedQwen2MoeConfig
    layer_class, gates_class = PreGatedQwen2MoeLayer, PreGatedQwen2MoeGates


class PreGatedQwen2MoeModel(decoder_only.PreGatedStack, PreGatedQwen2MoePreTrainedModel, upstream.Qwen2MoeModel):
    pass


class PreGatedQwen2MoeForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedQwen2MoePreTrainedModel, upstream.Qwen2MoeForCausalLM
):
    stack_class = PreGatedQwen2MoeModel


class Qwen2MoeFamily(DecoderOnlyFamily):
    source_type, source_class = Qwen2MoeConfig.model_type, "Qwen2MoeForCausalLM"
    config_class, model_class = PreGatedQwen2MoeConfig, PreGatedQwen2MoeForCausalLM
    step = "rotary"
    width_setting = "moe_intermediate_size"

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        return sparse_layers(config)

    def hidden_width_setting(self, name: str) -> str:
        shared = ".shared_expert." in name
        return "shared_expert_intermediate_size" if shared else super().hidden_width_setting(name)


FAMILY = Qwen2MoeFamily()
register_family(FAMILY)
