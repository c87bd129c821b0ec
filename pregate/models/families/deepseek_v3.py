"""The DeepSeek-V3 family: dense layers first, sigmoid scores, groups of experts, a correction bias, shared experts."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as upstream
from transformers.utils.output_capturing import OutputRecorder

from pregate.models import decoder_only
from pregate.models.decoder_only import STACK
from pregate.models.dense_first import LatentAttentionFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedDeepseekV3Config(PreGatedConfig, DeepseekV3Config):
    model_type = "pregated_deepseek_v3"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.settle()


class PreGatedDeepseekV3Gates(decoder_only.TopKGates, upstream.DeepseekV3TopkRouter):
    router_class = upstream.DeepseekV3TopkRouter


class PreGatedDeepseekV3Layer(decoder_only.PreGatedLayer, upstream.DeepseekV3DecoderLayer):
    pass


class PreGatedDeepseekV3PreTrainedModel(decoder_only.PreGatedPreTrained, upstream.DeepseekV3PreTrainedModel):
    config_class = PreGatedDeepseekV3Config
    _no_split_modules = ["PreGatedDeepseekV3Layer"]
    _can_record_outputs = {
        **(upstream.DeepseekV3PreTrainedModel._can_record_outputs or {}),
        "router_logits": OutputRecorder(PreGatedDeepseekV3Gates, index=0),
    }


class PreGatedDeepseekV3Model(decoder_only.PreGatedStack, PreGatedDeepseekV3PreTrainedModel, upstream.DeepseekV3Model):
    def __init__(self, config: PreGatedDeepseekV3Config) -> None:
        super().__init__(config)
        self.take_layers(PreGatedDeepseekV3Layer, PreGatedDeepseekV3Gates, FAMILY.moe_layers(config, STACK))
        self.post_init()


class PreGatedDeepseekV3ForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedDeepseekV3PreTrainedModel, upstream.DeepseekV3ForCausalLM
):
    def __init__(self, config: PreGatedDeepseekV3Config) -> None:
        super().__init__(config)
        self.model = PreGatedDeepseekV3Model(config)
        self.post_init()


class DeepseekV3Family(LatentAttentionFamily):
    source_type, source_class = DeepseekV3Config.model_type, "DeepseekV3ForCausalLM"
    config_class, model_class = PreGatedDeepseekV3Config, PreGatedDeepseekV3ForCausalLM
    gate_parts = ("weight", "e_score_correction_bias")


FAMILY = DeepseekV3Family()
register_family(FAMILY)
