"""The Qwen3-MoE family: dense layers between, and norms of queries and keys."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe as upstream
from transformers.utils.output_capturing import OutputRecorder

from pregate.models import decoder_only
from pregate.models.decoder_only import STACK
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedQwen3MoeConfig(PreGatedConfig, Qwen3MoeConfig):
    model_type = "pregated_qwen3_moe"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.settle()


class PreGatedQwen3MoeGates(decoder_only.TopKGates, upstream.Qwen3MoeTopKRouter):
    router_class = upstream.Qwen3MoeTopKRouter


class PreGatedQwen3MoeLayer(decoder_only.PreGatedLayer, upstream.Qwen3MoeDecoderLayer):
    pass


class PreGatedQwen3MoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.Qwen3MoePreTrainedModel):
    config_class = PreGatedQwen3MoeConfig
    _no_split_modules = ["PreGatedQwen3MoeLayer"]
    _can_record_outputs = {
        **(upstream.Qwen3MoePreTrainedModel._can_record_outputs or {}),
        "router_logits": OutputRecorder(PreGatedQwen3MoeGates, index=0),
    }


class PreGatedQwen3MoeModel(decoder_only.PreGatedStack, PreGatedQwen3MoePreTrainedModel, upstream.Qwen3MoeModel):
    def __init__(self, config: PreGatedQwen3MoeConfig) -> None:
        super().__init__(config)
        self.take_layers(PreGatedQwen3MoeLayer, PreGatedQwen3MoeGates, FAMILY.moe_layers(config, STACK))
        self.post_init()


class PreGatedQwen3MoeForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedQwen3MoePreTrainedModel, upstream.Qwen3MoeForCausalLM
):
    def __init__(self, config: PreGatedQwen3MoeConfig) -> None:
        super().__init__(config)
        self.model = PreGatedQwen3MoeModel(config)
        self.post_init()


class Qwen3MoeFamily(decoder_only.DecoderOnlyFamily):
    source_type, source_class = Qwen3MoeConfig.model_type, "Qwen3MoeForCausalLM"
    config_class, model_class = PreGatedQwen3MoeConfig, PreGatedQwen3MoeForCausalLM
    step = "rotary"
    width_setting = "moe_intermediate_size"

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        return decoder_only.sparse_layers(config)


FAMILY = Qwen3MoeFamily()
register_family(FAMILY)
