"""The layers of a Switch model: MoE blocks, whole layers, and a faster attention for training.

A layer gets the `Routes` of the call as an argument. Dense layers are upstream's, and so are norms and attention, but
for their arithmetic in training. Knows nothing about stacks, generation or where experts are stored.

Letters: B batch, T tokens of a sequence, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.switch_transformers import modeling_switch_transformers as upstream

from pregate.models.biased_attention import biased_attention
from pregate.models.families.switch_config import PreGatedSwitchTransformersConfig
from pregate.models.families.switch_experts import SwitchExperts
from pregate.models.families.switch_router import SwitchGate
from pregate.models.pregated_models import experts_elsewhere
from pregate.models.rms_norm import rms_norm
from pregate.models.route_handover import BlockGates, Routes


class PreGatedSparseMLP(BlockGates):
    """An MoE block: the gates that sit in it, and its experts."""

    holds_experts = True

    def __init__(self, config: PreGatedSwitchTransformersConfig, stack: str, index: int, num_blocks: int) -> None:
        gating = config.pregating
        placed = gating.gates_at(stack, index, num_blocks)
        super().__init__(stack, index, placed)
        self.router = SwitchGate(config, in_place=gating.lookahead_of(stack) == 0) if placed.own else None
        self.pre_gate = SwitchGate(config, ahead=True) if placed.target is not None else None
        # thousands of modules would be made to be dropped
        self.experts = nn.Module() if experts_elsewhere() else SwitchExperts(config)

    def forward(self, hidden_BTD: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """The output (B, T, D) by the block's route, and the logits (B, T, E) behind that route."""
        routing = self.route(hidden_BTD, routes)
        output_TD = self.experts(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            routing.expert_ids_BTK.flatten(0, 1),
            routing.weights_BTK.flatten(0, 1),
        )
        return output_TD.view(hidden_BTD.shape), routing.logits_BTE


class PreGatedLayerFF(nn.Module):
    """Norm, dense or sparse feed-forward, residual."""

    def __init__(self, config: PreGatedSwitchTransformersConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.is_sparse = isinstance(mlp, PreGatedSparseMLP)
        self.mlp = mlp
        self.layer_norm = upstream.SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_BTD: Tensor, routes: Routes) -> Tensor:
        normed_BTD = self.layer_norm(hidden_BTD)
        output_BTD = self.mlp(normed_BTD, routes)[0] if self.is_sparse else self.mlp(normed_BTD)
        return hidden_BTD + self.dropout(output_BTD)


def finite(hidden_BTD: Tensor) -> Tensor:
    """Keep fp16 activations finite, as upstream does; other dtypes pass untouched."""
    if hidden_BTD.dtype != torch.float16:
        return hidden_BTD
    most = torch.finfo(torch.float16).max
    bound = torch.where(torch.isinf(hidden_BTD).any(), most - 1000, most)
    return torch.clamp(hidden_BTD, min=-bound, max=bound)


class PreGatedSwitchBlock(upstream.SwitchTransformersBlock):
    """One transformer layer. Its MoE block takes its route from `routes` and commits there what its gates decide."""

    def __init__(self, config: PreGatedSwitchTransformersConfig, layer: int, mlp: nn.Module) -> None:
        nn.Module.__init__(self)
        self.is_decoder = config.is_decoder
        self.is_sparse = isinstance(mlp, PreGatedSparseMLP)
        self.layer = nn.ModuleList([upstream.SwitchTransformersLayerSelfAttention(config, layer == 0, layer_idx=layer)])
        if self.is_decoder:
            self.layer.append(upstream.SwitchTransformersLayerCrossAttention(config, layer_idx=layer))
        self.layer.append(PreGatedLayerFF(config, mlp))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        routes: Routes | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden_states, self_bias, _ = self.layer[0](
            hidden_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = finite(hidden_states)
        cross_bias = None
        if self.is_decoder and encoder_hidden_states is not None:
            hidden_states, cross_bias, _ = self.layer[1](
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                position_bias=encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = finite(hidden_states)
        return finite(self.layer[-1](hidden_states, routes)), self_bias, cross_bias


class FastLayerNorm(upstream.SwitchTransformersLayerNorm):
    """Upstream's, but in training on a CPU and in float32 by `rms_norm`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        plain = self.training and hidden_states.device.type == "cpu"
        if plain and hidden_states.dtype == self.weight.dtype == torch.float32:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


def use_fast_norms(model: nn.Module, fast: bool) -> None:
    """Have every norm of `model` be a `FastLayerNorm`, or every one upstream's."""
    for module in model.modules():
        if isinstance(module, upstream.SwitchTransformersLayerNorm):
            # the class alone differs: parameters, hooks and names stay
            module.__class__ = FastLayerNorm if fast else upstream.SwitchTransformersLayerNorm


REFERENCE, FAST = "eager", "pregate_biased"
"""Attention with upstream's order of operations, and `fast_attention`, among transformers' implementations."""


def fast_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Upstream's, but in training on a CPU by `biased_attention`, which has no weights to return."""
    if not module.training or query.device.type != "cpu" or scaling != 1.0 or kwargs.get("output_attentions"):
        return upstream.eager_attention_forward(
            module, query, key, value, attention_mask, scaling, dropout, position_bias, **kwargs
        )
    return biased_attention(query, key, value, position_bias, attention_mask, dropout), None


AttentionInterface.register(FAST, fast_attention)
AttentionMaskInterface.register(FAST, eager_mask)
