"""The gpt-oss family: biases in gates and experts, a clamped gated unit, attention sinks, a sliding window.

Letters: D model width, F expert hidden width, E experts of a block, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import GptOssConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss import modeling_gpt_oss as upstream

from pregate.models import decoder_only, gated_experts
from pregate.models.decoder_only import STACK
from pregate.models.decoder_only_family import DecoderOnlyFamily
from pregate.models.expert_math import Factor, project
from pregate.models.experts import ExpertSpec, TensorSlice
from pregate.models.family import register_family
from pregate.models.pregated_models import PreGatedConfig
from pregate.models.pregating import PreGating


@strict
class PreGatedGptOssConfig(PreGatedConfig, GptOssConfig):
    model_type = "pregated_gpt_oss"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())


class PreGatedGptOssGates(decoder_only.TopKGates, upstream.GptOssTopKRouter):
    router_class = upstream.GptOssTopKRouter


class PreGatedGptOssLayer(decoder_only.PreGatedLayer, upstream.GptOssDecoderLayer):
    pass


class PreGatedGptOssPreTrainedModel(decoder_only.PreGatedPreTrained, upstream.GptOssPreTrainedModel):
    config_class = PreGatedGptOssConfig
    layer_class, gates_class = PreGatedGptOssLayer, PreGatedGptOssGates


class PreGatedGptOssModel(decoder_only.PreGatedStack, PreGatedGptOssPreTrainedModel, upstream.GptOssModel):
    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream's, but texts whose positions begin again in a row do not see each other, as in other models."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if attention_mask is None and position_ids is not None and past_key_values is None:
            # upstream makes its masks without the positions, and takes those that are given to it
            given = (self.config, inputs_embeds, None, None, position_ids)
            attention_mask = {
                "full_attention": create_causal_mask(*given),
                "sliding_attention": create_sliding_window_causal_mask(*given),
            }
        return super().forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )


class PreGatedGptOssForCausalLM(
    decoder_only.PreGatedCausalLM, PreGatedGptOssPreTrainedModel, upstream.GptOssForCausalLM
):
    stack_class = PreGatedGptOssModel


class GptOssFamily(DecoderOnlyFamily):
    source_type, source_class = GptOssConfig.model_type, "GptOssForCausalLM"
    config_class, model_class = PreGatedGptOssConfig, PreGatedGptOssForCausalLM
    step = "rotary"
    experts_setting = "num_local_experts"
    router = "mlp.router"

    def experts(self, config: Any) -> ExpertSpec:
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        gate, up = slice(0, None, 2), slice(1, None, 2)

        def fused(stack: str, layer: int, expert: int) -> list[TensorSlice]:
            """Columns of the gate and of the up projection in turn, and every matrix as it stands behind the tokens."""
            within, rows = f"model.layers.{layer}.mlp.experts", slice(None)
            gate_up, down = f"{within}.gate_up_proj", f"{within}.down_proj"
            return [
                *(TensorSlice(gate_up, (expert, rows, part), True, (E, D, 2 * F)) for part in (gate, up)),
                TensorSlice(down, (expert,), True, (E, F, D)),
                *(TensorSlice(f"{gate_up}_bias", (expert, part), shape=(E, 2 * F)) for part in (gate, up)),
                TensorSlice(f"{down}_bias", (expert,), shape=(E, D)),
            ]

        return ExpertSpec(
            num_experts=E,
            top_k=config.num_experts_per_tok,
            lookahead=config.pregating.lookahead,
            matrices={**gated_experts.shapes(D, F), "gate_bias": (F,), "up_bias": (F,), "down_bias": (D,)},
            layers={STACK: self.moe_layers(config, STACK)},
            layouts=(fused,),
            apply=clamped_unit(config.swiglu_alpha, config.swiglu_limit),
            activation="gated_clamped",
            constants=(config.swiglu_alpha, config.swiglu_limit),
        )


def clamped_unit(alpha: float, limit: float) -> Callable[[Sequence[Factor], Tensor], Tensor]:
    """What one expert computes: a gated unit of clamped projections, whose activation is x sigmoid(alpha x)."""

    def apply(matrices: Sequence[Any], hidden_ND: Tensor) -> Tensor:
        gate_FD, up_FD, down_DF, gate_bias_F, up_bias_F, down_bias_D = matrices
        gate_NF, up_NF = project(hidden_ND, gate_FD) + gate_bias_F, project(hidden_ND, up_FD) + up_bias_F
        hidden_NF = gated_experts.clamped_product(gate_NF, up_NF, alpha, limit)
        return project(hidden_NF, down_DF) + down_bias_D

    return apply


FAMILY = GptOssFamily()
register_family(FAMILY)
