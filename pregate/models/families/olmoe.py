"""The OLMoE family: every layer has experts, softmax before top-k."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import OlmoeConfig
from transformers.models.olmoe import modeling_olmoe as upstream

from pregate.models import decoder_only
from pregate.models.decoder_only_family import DecoderOnlyFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedOlmoeConfig(PreGatedConfig, OlmoeConfig):
    model_type = "pregated_olmoe"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedOlmoeGates(decoder_only.TopKGates, upstream.OlmoeTopKRouter):
    router_class = upstream.OlmoeTopKRouter


class PreGatedOlmoeLayer(decoder_only.PreGatedLayer, upstream.OlmoeDecoderLayer):
    pass


class PreGatedOlmoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.OlmoePreTrainedModel):
    config_class = PreGatedOlmoeConfig
    layer_class, gates_class = PreGatedOlmoeLayer, PreGatedOlmoeGates


class PreGatedOlmoeModel(decoder_only.PreGatedStack, PreGatedOlmoePreTrainedModel, upstream.OlmoeModel):
    pass


class PreGatedOlmoeForCausalLM(decoder_only.PreGatedCausalLM, PreGatedOlmoePreTrainedModel, upstream.OlmoeForCausalLM):
    stack_class = PreGatedOlmoeModel


class OlmoeFamily(DecoderOnlyFamily):
    source_type, source_class = OlmoeConfig.model_type, "OlmoeForCausalLM"
    config_class, model_class = PreGatedOlmoeConfig, PreGatedOlmoeForCausalLM
    step = "rotary"


FAMILY = OlmoeFamily()
register_family(FAMILY)
