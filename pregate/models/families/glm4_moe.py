"""The GLM-4-MoE family (GLM-4.5, GLM-4.6): dense layers first, sigmoid scores, a correction bias, shared experts."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe import modeling_glm4_moe as upstream

from pregate.models import decoder_only
from pregate.models.dense_first import DenseFirstFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating
from pregate.models.routing import ScoreFunction


@strict
class PreGatedGlm4MoeConfig(PreGatedConfig, Glm4MoeConfig):
    model_type = "pregated_glm4_moe"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedGlm4MoeGates(decoder_only.TopKGates, upstream.Glm4MoeTopkRouter):
    router_class, in_float32 = upstream.Glm4MoeTopkRouter, True


class PreGatedGlm4MoeLayer(decoder_only.PreGatedLayer, upstream.Glm4MoeDecoderLayer):
    pass


class PreGatedGlm4MoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.Glm4MoePreTrainedModel):
    config_class = PreGatedGlm4MoeConfig
    layer_class, gates_class = PreGatedGlm4MoeLayer, PreGatedGlm4MoeGates


class PreGatedGlm4MoeModel(decoder_only.PreGatedStack, PreGatedGlm4MoePreTrainedModel, upstream.Glm4MoeModel):
    pass


class PreGatedGlm4MoeForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedGlm4MoePreTrainedModel, upstream.Glm4MoeForCausalLM
):
    stack_class = PreGatedGlm4MoeModel


class Glm4MoeFamily(DenseFirstFamily):
    source_type, source_class = Glm4MoeConfig.model_type, "Glm4MoeForCausalLM"
    config_class, model_class = PreGatedGlm4MoeConfig, PreGatedGlm4MoeForCausalLM
    step = "rotary"
    scores = ScoreFunction.sigmoid
    gate_parts = ("weight", "e_score_correction_bias")


FAMILY = Glm4MoeFamily()
register_family(FAMILY)
