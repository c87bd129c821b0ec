"""The Qwen3-MoE family: dense layers between, and norms of queries and keys."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as upstream

from pregate.models import decoder_only
from pregate.models.decoder_only_family import DecoderOnlyFamily, sparse_layers
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedQwen3MoeConfig(PreGatedConfig, Qwen3MoeConfig):
    model_type = "pregated_qwen3_moe"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedQwen3MoeGates(decoder_only.TopKGates, upstream.Qwen3MoeTopKRouter):
    router_class = upstream.Qwen3MoeTopKRouter


class PreGatedQwen3MoeLayer(decoder_only.PreGatedLayer, upstream.Qwen3MoeDecoderLayer):
    pass


class PreGatedQwen3MoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.Qwen3MoePreTrainedModel):
    config_class = PreGatedQwen3MoeConfig
    layer_class, gates_class = PreGatedQwen3MoeLayer, PreGatedQwen3MoeGates


class PreGatedQwen3MoeModel(decoder_only.PreGatedStack, PreGatedQwen3MoePreTrainedModel, upstream.Qwen3MoeModel):
    pass


class PreGatedQwen3MoeForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedQwen3MoePreTrainedModel, upstream.Qwen3MoeForCausalLM
):
    stack_class = PreGatedQwen3MoeModel


class Qwen3MoeFamily(DecoderOnlyFamily):
    source_type, source_class = Qwen3MoeConfig.model_type, "Qwen3MoeForCausalLM"
    config_class, model_class = PreGatedQwen3MoeConfig, PreGatedQwen3MoeForCausalLM
    step = "rotary"
    width_setting = "moe_intermediate_size"

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        return sparse_layers(config)


FAMILY = Qwen3MoeFamily()
register_family(FAMILY)
