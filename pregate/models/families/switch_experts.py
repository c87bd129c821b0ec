"""The experts of a Switch model: an up and a down matrix, in memory and in checkpoints.

`expert_spec` gives engines the same arithmetic as `SwitchExperts`. The kernel for captured steps is
`pregate.engine.device.ops.expert_outputs`.

Letters: N tokens of one expert, D model width, F expert hidden width, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SwitchTransformersConfig
from transformers.activations import ACT2FN
from transformers.models.switch_transformers import modeling_switch_transformers as upstream

from pregate.models.dropout import FastDropout
from pregate.models.expert_math import Factor, grouped_experts, project, reference_experts
from pregate.models.experts import ExpertSpec, TensorSlice
from pregate.models.families.switch_config import STACKS, moe_layers
from pregate.models.linear import has_hooks, is_plain
from pregate.models.training_experts import learn_grouped, learn_sorted

DROPOUTS = (nn.Dropout, FastDropout)
"""Those that act on the tokens of all experts together as on each expert's own."""


class SwitchExperts(nn.ModuleDict):
    """The resident experts of one block. `path` chooses the reference order of operations or the grouped one."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.path = "grouped"
        for expert in range(config.num_experts):
            self[f"expert_{expert}"] = upstream.SwitchTransformersDenseActDense(config)

    def forward(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if self.path != "reference" and self.training and torch.is_grad_enabled() and self._are_plain():
            return self._learn(hidden_TD, expert_ids_TK, weights_TK)
        run = reference_experts if self.path == "reference" else grouped_experts
        return run(hidden_TD, expert_ids_TK, weights_TK, self.num_experts, lambda e, x: self[f"expert_{e}"](x))

    def _are_plain(self) -> bool:
        """Whether calling the experts is no more than their matrices and one dropout for all."""
        dropouts: list[Any] = [expert.dropout for expert in self.values()]
        rates = {dropout.p if type(dropout) in DROPOUTS else None for dropout in dropouts}
        return len(rates - {None}) == len(rates) == 1 and all(
            type(expert) is upstream.SwitchTransformersDenseActDense
            and not has_hooks(expert)
            and is_plain(expert.wi)
            and is_plain(expert.wo)
            for expert in self.values()
        )

    def _learn(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """All experts together, equal to one after the other within rounding."""
        experts: list[Any] = list(self.values())
        wi, wo = [expert.wi.weight for expert in experts], [expert.wo.weight for expert in experts]
        act, dropout = experts[0].act, experts[0].dropout
        learn = learn_sorted if hidden_TD.device.type == "cpu" else learn_grouped
        return learn(hidden_TD, expert_ids_TK, weights_TK, wi, wo, lambda hidden_NF: dropout(act(hidden_NF)))


def expert_spec(config: Any) -> ExpertSpec:
    """Where checkpoints keep the experts of the model that `config` describes, and what one computes."""
    activation = ACT2FN[config.dense_act_fn]

    def layout(stack: str, layer: int, expert: int) -> list[TensorSlice]:
        prefix = f"{feed_forward(stack, layer)}.mlp.experts.expert_{expert}"
        return [TensorSlice(f"{prefix}.wi.weight"), TensorSlice(f"{prefix}.wo.weight")]

    def apply(matrices: Sequence[Factor], hidden_ND: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        wi_FD, wo_DF = matrices
        active_NF = activation(project(hidden_ND, wi_FD))
        return project(active_NF if drop is None else drop(active_NF), wo_DF)

    return ExpertSpec(
        num_experts=config.num_experts,
        top_k=1,
        lookahead=config.pregating.lookahead,
        matrices={"wi": (config.d_ff, config.d_model), "wo": (config.d_model, config.d_ff)},
        layers={stack: moe_layers(config, stack) for stack in STACKS},
        layouts=(layout,),
        apply=apply,
        activation=config.dense_act_fn,
        dropout=config.dropout_rate,
    )


def feed_forward(stack: str, layer: int) -> str:
    """The name of the feed-forward part of a layer."""
    return f"{stack}.block.{layer}.layer.{1 if stack == STACKS[0] else 2}"
