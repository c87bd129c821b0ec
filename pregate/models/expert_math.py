"""How the experts of one block are applied to its tokens, resident or offloaded.

A family gives `apply_expert(expert, hidden_ND) -> hidden_ND`; these functions gather each expert's tokens, call
it and put the results back. The resident model and the offloading engine use the same functions, so their
arithmetic is the same. Knows nothing about routers, slots or model families.

Letters: T tokens (batch and sequence flattened), N tokens of one expert, D model width, K experts per token, R rows and
C columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pregate.models.routing import DROPPED

ApplyExpert = Callable[[int, Tensor], Tensor]


class RowScaled(NamedTuple):
    """A matrix (R, C) whose row r is `scale_R[r] * values_RC[r]`. Scales are powers of two, in the same dtype."""

    values_RC: Tensor
    scale_R: Tensor


Factor = Tensor | RowScaled
"""A matrix (R, C) that an expert multiplies its tokens with."""


def in_dtype(factor: Factor, dtype: torch.dtype) -> Factor:
    """The factor for tokens in `dtype`, itself where it has that already. In float16 a product with the values alone
    could overflow, so they are scaled first."""
    if isinstance(factor, RowScaled):
        if factor.values_RC.dtype == dtype:
            return factor
        if dtype is torch.float16:
            return (factor.values_RC * factor.scale_R[:, None]).to(dtype)
        return RowScaled(factor.values_RC.to(dtype), factor.scale_R.to(dtype))
    # even where it does nothing, `to` takes microseconds, and an engine comes here for every expert
    return factor if factor.dtype == dtype else factor.to(dtype)


def project(hidden_NC: Tensor, factor: Factor) -> Tensor:
    """`hidden` times the transposed matrix: (N, R)."""
    if isinstance(factor, RowScaled):
        return torch.nn.functional.linear(hidden_NC, factor.values_RC) * factor.scale_R
    return torch.nn.functional.linear(hidden_NC, factor)


def reference_experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int, apply_expert: ApplyExpert
) -> Tensor:
    """One expert after the other, its tokens found with a mask: the upstream order of operations, bit for bit."""
    output_TD = torch.zeros_like(hidden_TD)
    for expert in range(num_experts):
        token_N, choice_N = torch.where(expert_ids_TK == expert)
        if token_N.numel() == 0:
            continue
        result_ND = apply_expert(expert, hidden_TD[token_N]) * weights_TK[token_N, choice_N, None]
        output_TD.index_add_(0, token_N, result_ND.to(hidden_TD.dtype))
    return output_TD


class Grouping(NamedTuple):
    """Tokens sorted by expert. `order` (N,) indexes the flattened (T*K) choices without the dropped ones;
    `groups` lists (expert, first, last) runs in it, by ascending expert."""

    order: Tensor
    groups: list[tuple[int, int, int]]

    def experts(self) -> list[int]:
        return [expert for expert, _, _ in self.groups]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]
        return iter(self.groups)


def group_by_expert(expert_ids_TK: Tensor) -> Grouping:
    """Sort all kept choices by expert, stably, so that both the permutation and the offsets have one source."""
    flat = expert_ids_TK.reshape(-1)
    sorted_ids, order = flat.sort(stable=True)
    present, counts = sorted_ids.unique_consecutive(return_counts=True)
    groups: list[tuple[int, int, int]] = []
    first = 0
    dropped = 0
    for expert, count in zip(present.tolist(), counts.tolist(), strict=True):
        if expert == DROPPED:
            dropped = count
            continue
        groups.append((expert, first, first + count))
        first += count
    return Grouping(order[dropped:], groups)


def combine(result_ND: Tensor, grouping: Grouping, weights_TK: Tensor, hidden_TD: Tensor) -> Tensor:
    """Weight each result, put it back in its token's place and add up a token's K choices in their order. The sum is
    rounded once, as in upstream's grouped products: weights may be wider than the hidden states."""
    T, K = weights_TK.shape
    weighted_ND = result_ND * weights_TK.reshape(-1)[grouping.order, None]
    spread = weighted_ND.new_zeros(T * K, hidden_TD.shape[1]).index_copy(0, grouping.order, weighted_ND)
    return (spread if K == 1 else spread.view(T, K, -1).sum(1)).to(hidden_TD.dtype)


def grouped_experts(
    hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int, apply_expert: ApplyExpert
) -> Tensor:
    """One sort, one gather, one contiguous slice per present expert, one scatter; absent experts cost nothing."""
    grouping = group_by_expert(expert_ids_TK)
    if not grouping.groups:
        return torch.zeros_like(hidden_TD)
    gathered_ND = hidden_TD[grouping.order // weights_TK.shape[1]]
    results = [apply_expert(expert, gathered_ND[first:last]) for expert, first, last in grouping]
    result_ND = results[0] if len(results) == 1 else torch.cat(results)
    return combine(result_ND, grouping, weights_TK, hidden_TD)
