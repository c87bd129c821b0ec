"""The experts of one block in training: tokens sorted by expert, then one product for each expert and matrix, or one
for all of them.

On a CPU (`learn_sorted`) each expert's rows are filled up with zeros to a multiple of `ROWS`, because otherwise almost
every expert of every batch has a size of its own. Elsewhere `learn_grouped` is transformers' grouped computation, and
nothing waits for the device. Knows nothing about routers, modules or families.

Letters: T tokens, K experts per token, N choices that are not dropped, P rows with what fills them up, E experts,
D model width, F expert hidden width, R rows and C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pregate.models.expert_math import combine, group_by_expert
from pregate.models.linear import ROWS, active_autocast_dtype
from pregate.models.routing import DROPPED

GROUPED = "grouped_mm"
"""The name of the grouped computation among transformers' implementations of experts."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product with `x`: autocast's, where that is on."""
    return active_autocast_dtype(x.device.type) or x.dtype


class SortedRows:
    """Which rows of a sorted and filled-up matrix belong to which expert. `runs`: (expert, first, last) of them."""

    def __init__(self, expert_ids_TK: Tensor, dtype: torch.dtype) -> None:
        self._grouping = group_by_expert(expert_ids_TK)
        self._top_k = expert_ids_TK.shape[1]
        self.runs: list[tuple[int, int, int]] = []
        unit, places, self._num_rows = ROWS if dtype.itemsize < 4 else 1, [], 0
        for expert, first, last in self._grouping:
            begin, count = self._num_rows, last - first
            self._num_rows += -(-count // unit) * unit
            self.runs.append((expert, begin, self._num_rows))
            places.append(torch.arange(begin, begin + count))
        self._places_N = torch.cat(places) if places else expert_ids_TK.new_empty(0)

    def gather(self, hidden_TD: Tensor) -> Tensor:
        """(P, D): each expert's tokens, one run behind the other."""
        hidden_ND = hidden_TD[self._grouping.order // self._top_k]
        return hidden_TD.new_zeros(self._num_rows, hidden_TD.shape[1]).index_copy(0, self._places_N, hidden_ND)

    def combine(self, result_PD: Tensor, weights_TK: Tensor, hidden_TD: Tensor) -> Tensor:
        """The weighted results in the places of their tokens (T, D)."""
        return combine(result_PD[self._places_N], self._grouping, weights_TK, hidden_TD)


def grouped_linear(x_PC: Tensor, rows: SortedRows, weights: Sequence[Tensor] | Tensor) -> Tensor:
    """(P, R): each run of `x` times the transposed matrix of its expert, in autocast's dtype where that is on.

    `weights`: one matrix (R, C) an expert, of which those without tokens get no gradient, or all in one (E, R, C).
    """
    stacked = isinstance(weights, Tensor)
    used = (weights,) if stacked else tuple(weights[expert] for expert, _, _ in rows.runs)
    return _GroupedLinear.apply(x_PC, rows.runs, product_dtype(x_PC), stacked, *used)  # type: ignore[no-any-return]


class _GroupedLinear(torch.autograd.Function):
    """`weights`: the matrices of `runs`, in their order, or with `stacked` all matrices in one tensor."""

    @staticmethod
    def forward(
        ctx: Any, x_PC: Tensor, runs: list[tuple[int, int, int]], dtype: torch.dtype, stacked: bool, *weights: Tensor
    ) -> Tensor:
        used = [weights[0][expert] for expert, _, _ in runs] if stacked else weights
        with torch.autocast(x_PC.device.type, enabled=False):
            factor_PC, factors = x_PC.to(dtype), [matrix_RC.to(dtype) for matrix_RC in used]
            result_PR = factor_PC.new_empty(len(x_PC), factors[0].shape[0])
            for (_, first, last), factor_RC in zip(runs, factors, strict=True):
                torch.mm(factor_PC[first:last], factor_RC.t(), out=result_PR[first:last])
        ctx.save_for_backward(factor_PC, *factors)
        ctx.runs, ctx.stacked = runs, stacked
        ctx.x_dtype, ctx.shape, ctx.dtype = x_PC.dtype, weights[0].shape, weights[0].dtype
        return result_PR

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_PR: Tensor) -> tuple[Any, ...]:
        factor_PC, *factors = ctx.saved_tensors
        grad_PR = grad_PR.to(factor_PC.dtype)
        x_needed, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        grad_PC = torch.empty_like(factor_PC) if x_needed else None
        grads: list[Tensor | None] = [None] * len(needed)
        if ctx.stacked and needed[0]:
            grads = [torch.zeros(ctx.shape, dtype=ctx.dtype)]
        for position, ((expert, first, last), factor_RC) in enumerate(zip(ctx.runs, factors, strict=True)):
            run_NR, run_NC = grad_PR[first:last], factor_PC[first:last]
            if grad_PC is not None:
                torch.mm(run_NR, factor_RC, out=grad_PC[first:last])
            if not ctx.stacked and needed[position]:
                grads[position] = (run_NR.t() @ run_NC).to(ctx.dtype)
            elif ctx.stacked and (grad_ERC := grads[0]) is not None:
                grad_ERC[expert] = run_NR.t() @ run_NC
        return None if grad_PC is None else grad_PC.to(ctx.x_dtype), None, None, None, *grads


Between = Callable[[Tensor], Tensor]
"""From the product with the up matrices, (N, R), to what the down matrices multiply, (N, F)."""


def learn_sorted(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_RD: Sequence[Tensor] | Tensor,
    down_DF: Sequence[Tensor] | Tensor,
    between: Between,
) -> Tensor:
    """The output (T, D) of a block on a CPU; ids may be `DROPPED`. `up_RD`, `down_DF`: as for `grouped_linear`."""
    rows = SortedRows(expert_ids_TK, product_dtype(hidden_TD))
    if not rows.runs:
        return torch.zeros_like(hidden_TD)
    result_PD = grouped_linear(between(grouped_linear(rows.gather(hidden_TD), rows, up_RD)), rows, down_DF)
    return rows.combine(result_PD, weights_TK, hidden_TD)


def learn_grouped(
    hidden_TD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    up_RD: Sequence[Tensor],
    down_DF: Sequence[Tensor],
    between: Between,
) -> Tensor:
    """The output (T, D) of a block by transformers' grouped products, in autocast's dtype; ids may be `DROPPED`. Every
    expert has a gradient, those without tokens one of zeros."""
    dtype, num_experts = product_dtype(hidden_TD), len(up_RD)
    # its sentinel for an expert that another process has: behind the last one, and without a result
    dropped_TK = expert_ids_TK == DROPPED
    block = SimpleNamespace(
        num_experts=num_experts,
        up_proj=torch.stack(list(up_RD)).to(dtype),
        down_proj=torch.stack(list(down_DF)).to(dtype),
        act_fn=between,
        has_gate=False,
        has_bias=False,
        is_transposed=False,
        has_post_expert_norm=False,
        _is_expert_parallel=True,
    )
    ids_TK, weights_TK = expert_ids_TK.masked_fill(dropped_TK, num_experts), weights_TK.masked_fill(dropped_TK, 0.0)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        output_TD = ALL_EXPERTS_FUNCTIONS[GROUPED](block, hidden_TD.to(dtype), ids_TK, weights_TK)
    return output_TD.to(hidden_TD.dtype)


class _InDtype:
    """Experts of transformers with their matrices and biases in another dtype."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._experts, name)
        return found.to(self._dtype) if isinstance(found, Tensor) and found.is_floating_point() else found


def learning_experts(experts: Any, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """transformers' grouped computation of `experts`, but where gradients are wanted in autocast's dtype, and on a CPU
    by `grouped_linear`."""
    dtype, grouped = product_dtype(hidden_TD), ALL_EXPERTS_FUNCTIONS[GROUPED]
    if not (experts.training and torch.is_grad_enabled()):
        return grouped(experts, hidden_TD, expert_ids_TK, weights_TK)
    usual = experts.has_gate and not (experts.has_bias or experts.is_transposed or experts.has_post_expert_norm)
    if hidden_TD.device.type == "cpu" and usual and not experts._is_expert_parallel:
        matrices = experts.gate_up_proj, experts.down_proj
        return learn_sorted(hidden_TD, expert_ids_TK, weights_TK, *matrices, experts._apply_gate)
    if dtype == hidden_TD.dtype:
        return grouped(experts, hidden_TD, expert_ids_TK, weights_TK)
    with torch.autocast(hidden_TD.device.type, enabled=False):
        output_TD = grouped(_InDtype(experts, dtype), hidden_TD.to(dtype), expert_ids_TK, weights_TK)
    return output_TD.to(hidden_TD.dtype)


LEARNING = "pregate_learning"
ALL_EXPERTS_FUNCTIONS.register(LEARNING, learning_experts)
