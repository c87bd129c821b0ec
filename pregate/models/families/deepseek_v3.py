"""The DeepSeek-V3 family: dense layers first, sigmoid scores, groups of experts, a correction bias, shared experts."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as upstream

from pregate.models import decoder_only
from pregate.models.dense_first import LatentAttentionFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating
from pregate.models.routing import ScoreFunction


@strict
class PreGatedDeepseekV3Config(PreGatedConfig, DeepseekV3Config):
    model_type = "pregated_deepseek_v3"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedDeepseekV3Gates(decoder_only.TopKGates, upstream.DeepseekV3TopkRouter):
    router_class, in_float32 = upstream.DeepseekV3TopkRouter, True


class PreGatedDeepseekV3Layer(decoder_only.PreGatedLayer, upstream.DeepseekV3DecoderLayer):
    pass


class PreGatedDeepseekV3PreTrainedModel(decoder_only.PreGatedPreTrained, upstream.DeepseekV3PreTrainedModel):
    config_class = PreGatedDeepseekV3Config
    layer_class, gates_class = PreGatedDeepseekV3Layer, PreGatedDeepseekV3Gates


class PreGatedDeepseekV3Model(decoder_only.PreGatedStack, PreGatedDeepseekV3PreTrainedModel, upstream.DeepseekV3Model):
    pass


class PreGatedDeepseekV3ForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedDeepseekV3PreTrainedModel, upstream.DeepseekV3ForCausalLM
):
    stack_class = PreGatedDeepseekV3Model


class DeepseekV3Family(LatentAttentionFamily):
    source_type, source_class = DeepseekV3Config.model_type, "DeepseekV3ForCausalLM"
    config_class, model_class = PreGatedDeepseekV3Config, PreGatedDeepseekV3ForCausalLM
    scores = ScoreFunction.sigmoid
    gate_parts = ("weight", "e_score_correction_bias")


FAMILY = DeepseekV3Family()
register_family(FAMILY)
