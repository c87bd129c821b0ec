"""The DeepSeek-V2 family: dense layers first, softmax scores, experts limited to groups, shared experts."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as upstream

from pregate.models import decoder_only
from pregate.models.dense_first import LatentAttentionFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedDeepseekV2Config(PreGatedConfig, DeepseekV2Config):
    model_type = "pregated_deepseek_v2"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedDeepseekV2Gates(decoder_only.TopKGates, upstream.DeepseekV2TopkRouter):
    router_class, in_float32 = upstream.DeepseekV2TopkRouter, True

    def for_weighing(self) -> Any:
        """Without groups: they limit which experts are chosen, and the scores of all others are set to zero."""
        router = copy.copy(self)
        router.topk_method = "greedy"
        return router


class PreGatedDeepseekV2Layer(decoder_only.PreGatedLayer, upstream.DeepseekV2DecoderLayer):
    pass


class PreGatedDeepseekV2PreTrainedModel(decoder_only.PreGatedPreTrained, upstream.DeepseekV2PreTrainedModel):
    config_class = PreGatedDeepseekV2Config
    layer_class, gates_class = PreGatedDeepseekV2Layer, PreGatedDeepseekV2Gates


class PreGatedDeepseekV2Model(decoder_only.PreGatedStack, PreGatedDeepseekV2PreTrainedModel, upstream.DeepseekV2Model):
    pass


class PreGatedDeepseekV2ForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedDeepseekV2PreTrainedModel, upstream.DeepseekV2ForCausalLM
):
    stack_class = PreGatedDeepseekV2Model


class DeepseekV2Family(LatentAttentionFamily):
    source_type, source_class = DeepseekV2Config.model_type, "DeepseekV2ForCausalLM"
    config_class, model_class = PreGatedDeepseekV2Config, PreGatedDeepseekV2ForCausalLM


FAMILY = DeepseekV2Family()
register_family(FAMILY)
