"""The OLMoE family: every layer has experts, softmax before top-k."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import OlmoeConfig
from transformers.models.olmoe import modeling_olmoe as upstream
from transformers.utils.output_capturing import OutputRecorder

from pregate.models import decoder_only
from pregate.models.decoder_only import STACK
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedOlmoeConfig(PreGatedConfig, OlmoeConfig):
    model_type = "pregated_olmoe"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.settle()


class PreGatedOlmoeGates(decoder_only.TopKGates, upstream.OlmoeTopKRouter):
    router_class = upstream.OlmoeTopKRouter


class PreGatedOlmoeLayer(decoder_only.PreGatedLayer, upstream.OlmoeDecoderLayer):
    pass


class PreGatedOlmoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.OlmoePreTrainedModel):
    config_class = PreGatedOlmoeConfig
    _no_split_modules = ["PreGatedOlmoeLayer"]
    _can_record_outputs = {
        **(upstream.OlmoePreTrainedModel._can_record_outputs or {}),
        "router_logits": OutputRecorder(PreGatedOlmoeGates, index=0),
    }


class PreGatedOlmoeModel(decoder_only.PreGatedStack, PreGatedOlmoePreTrainedModel, upstream.OlmoeModel):
    def __init__(self, config: PreGatedOlmoeConfig) -> None:
        super().__init__(config)
        self.take_layers(PreGatedOlmoeLayer, PreGatedOlmoeGates, FAMILY.moe_layers(config, STACK))
        self.post_init()


class PreGatedOlmoeForCausalLM(decoder_only.PreGatedCausalLM, PreGatedOlmoePreTrainedModel, upstream.OlmoeForCausalLM):
    def __init__(self, config: PreGatedOlmoeConfig) -> None:
        super().__init__(config)
        self.model = PreGatedOlmoeModel(config)
        self.post_init()


class OlmoeFamily(decoder_only.DecoderOnlyFamily):
    source_type, source_class = OlmoeConfig.model_type, "OlmoeForCausalLM"
    config_class, model_class = PreGatedOlmoeConfig, PreGatedOlmoeForCausalLM
    step = "rotary"


FAMILY = OlmoeFamily()
register_family(FAMILY)
