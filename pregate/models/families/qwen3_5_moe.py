"""The Qwen3.5-MoE family: layers with linear attention, and a shared expert with a gate of its own.

Published checkpoints also hold a visual part, which is carried along and not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Qwen3_5MoeTextConfig
from transformers import initialization as init
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as upstream

from pregate.models import decoder_only
from pregate.models.decoder_only import STACK
from pregate.models.decoder_only_family import BRANCH, DecoderOnlyFamily
from pregate.models.family import register_family
from pregate.models.objectives import Causal
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedQwen35MoeConfig(PreGatedConfig, Qwen3_5MoeTextConfig):
    model_type = "pregated_qwen3_5_moe_text"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedQwen35MoeGates(decoder_only.TopKGates, upstream.Qwen3_5MoeTopKRouter):
    router_class = upstream.Qwen3_5MoeTopKRouter


class PreGatedQwen35MoeLayer(decoder_only.PreGatedLayer, upstream.Qwen3_5MoeDecoderLayer):
    pass


class PreGatedQwen35MoePreTrainedModel(decoder_only.PreGatedPreTrained, upstream.Qwen3_5MoePreTrainedModel):
    config_class = PreGatedQwen35MoeConfig
    layer_class, gates_class = PreGatedQwen35MoeLayer, PreGatedQwen35MoeGates

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # upstream initialises a router with its block, where there may be none, and others than those of blocks never
        if not isinstance(module, upstream.Qwen3_5MoeSparseMoeBlock):
            super()._init_weights(module)
        if isinstance(module, upstream.Qwen3_5MoeTopKRouter) and module.weight is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class PreGatedQwen35MoeModel(
    decoder_only.PreGatedStack, PreGatedQwen35MoePreTrainedModel, upstream.Qwen3_5MoeTextModel
):
    pass


class PreGatedQwen35MoeForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedQwen35MoePreTrainedModel, upstream.Qwen3_5MoeForCausalLM
):
    stack_class = PreGatedQwen35MoeModel


class Qwen35MoeFamily(DecoderOnlyFamily):
    source_type, source_class = Qwen3_5MoeTextConfig.model_type, "Qwen3_5MoeForCausalLM"
    config_class, model_class = PreGatedQwen35MoeConfig, PreGatedQwen35MoeForCausalLM
    objective = Causal(STACK, packs=False)  # linear attention carries its state along the row
    width_setting = "moe_intermediate_size"
    renames = (("model.language_model.", "model."),)

    def extras(self, config: Any) -> list[str]:
        """Also the part that reads images."""
        return [*super().extras(config), r"^model\.visual\."]

    def hidden_width_setting(self, name: str) -> str:
        return "shared_expert_intermediate_size" if ".shared_expert." in name else self.width_setting

    def random_scale(self, name: str, config: Mapping[str, Any]) -> float | None:
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            return 0.0  # upstream adds one to the weight of these norms
        if name.endswith(("A_log", "dt_bias")):
            return None
        if name.endswith("conv1d.weight"):
            return float(config["linear_conv_kernel_dim"] ** -0.5)
        if name.endswith("out_proj.weight"):
            return BRANCH * float((config["linear_num_value_heads"] * config["linear_value_head_dim"]) ** -0.5)
        return super().random_scale(name, config)


FAMILY = Qwen35MoeFamily()
register_family(FAMILY)
