"""The Mixtral family: every layer has experts, the weights of a token's experts add up to one."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral as upstream

from pregate.models import decoder_only
from pregate.models.decoder_only_family import DecoderOnlyFamily
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedMixtralConfig(PreGatedConfig, MixtralConfig):
    model_type = "pregated_mixtral"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedMixtralGates(decoder_only.TopKGates, upstream.MixtralTopKRouter):
    router_class = upstream.MixtralTopKRouter


class PreGatedMixtralLayer(decoder_only.PreGatedLayer, upstream.MixtralDecoderLayer):
    pass


class PreGatedMixtralPreTrainedModel(decoder_only.PreGatedPreTrained, upstream.MixtralPreTrainedModel):
    config_class = PreGatedMixtralConfig
    layer_class, gates_class = PreGatedMixtralLayer, PreGatedMixtralGates


class PreGatedMixtralModel(decoder_only.PreGatedStack, PreGatedMixtralPreTrainedModel, upstream.MixtralModel):
    pass


class PreGatedMixtralForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedMixtralPreTrainedModel, upstream.MixtralForCausalLM
):
    stack_class = PreGatedMixtralModel


class MixtralFamily(DecoderOnlyFamily):
    source_type, source_class = MixtralConfig.model_type, "MixtralForCausalLM"
    config_class, model_class = PreGatedMixtralConfig, PreGatedMixtralForCausalLM
    step = "rotary"
    experts_setting = "num_local_experts"
    expert_names = ("w1", "w3", "w2")
    renames = ((".block_sparse_moe.", ".mlp."),)


FAMILY = MixtralFamily()
register_family(FAMILY)
