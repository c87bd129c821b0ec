"""The DeepSeek-V2 family: dense layers first, softmax scores, experts limited to groups, shared experts."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as upstream
from transformers.utils.output_capturing import OutputRecorder

from pregate.models import decoder_only
from pregate.models.decoder_only import STACK
from pregate.models.dense_first import LatentAttentionFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedDeepseekV2Config(PreGatedConfig, DeepseekV2Config):
    model_type = "pregated_deepseek_v2"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.settle()


class PreGatedDeepseekV2Gates(decoder_only.TopKGates, upstream.DeepseekV2TopkRouter):
    router_class = upstream.DeepseekV2TopkRouter


class PreGatedDeepseekV2Layer(decoder_only.PreGatedLayer, upstream.DeepseekV2DecoderLayer):
    pass


class PreGatedDeepseekV2PreTrainedModel(decoder_only.PreGatedPreTrained, upstream.DeepseekV2PreTrainedModel):
    config_class = PreGatedDeepseekV2Config
    _no_split_modules = ["PreGatedDeepseekV2Layer"]
    _can_record_outputs = {
        **(upstream.DeepseekV2PreTrainedModel._can_record_outputs or {}),
        "router_logits": OutputRecorder(PreGatedDeepseekV2Gates, index=0),
    }


class PreGatedDeepseekV2Model(decoder_only.PreGatedStack, PreGatedDeepseekV2PreTrainedModel, upstream.DeepseekV2Model):
    def __init__(self, config: PreGatedDeepseekV2Config) -> None:
        super().__init__(config)
        self.take_layers(PreGatedDeepseekV2Layer, PreGatedDeepseekV2Gates, FAMILY.moe_layers(config, STACK))
        self.post_init()


class PreGatedDeepseekV2ForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedDeepseekV2PreTrainedModel, upstream.DeepseekV2ForCausalLM
):
    def __init__(self, config: PreGatedDeepseekV2Config) -> None:
        super().__init__(config)
        self.model = PreGatedDeepseekV2Model(config)
        self.post_init()


class DeepseekV2Family(LatentAttentionFamily):
    source_type, source_class = DeepseekV2Config.model_type, "DeepseekV2ForCausalLM"
    config_class, model_class = PreGatedDeepseekV2Config, PreGatedDeepseekV2ForCausalLM


FAMILY = DeepseekV2Family()
register_family(FAMILY)
