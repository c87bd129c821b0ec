"""The Triton kernels behind `gate_logits` and `first_choice`: a fetch waits for both, so each is one short launch.

Knows hidden states and logits only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pregate.engine.device.ops.kernels_numbers import FLOATS, RAW, numbers, rounded, stored

TILE_E = 8
"""Experts that a program scores."""


@triton.jit
def gate_logits_kernel(
    hidden,
    weight,
    bias,
    logits,
    E: tl.constexpr,
    D: tl.constexpr,
    BIASED: tl.constexpr,
    KIND: tl.constexpr,
    ROUTED: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_D: tl.constexpr,
):
    """TILE_E experts of a token a program. KIND: of the hidden states, ROUTED: of weights and logits."""
    row = tl.program_id(1)
    expert = tl.program_id(0) * TILE_E + tl.arange(0, TILE_E)
    column = tl.arange(0, TILE_D)
    inside = (expert[:, None] < E) & (column[None, :] < D)
    seen = rounded(numbers(tl.load(hidden + row * D + column, mask=column < D, other=0), KIND), ROUTED, NATIVE)
    factors = numbers(tl.load(weight + expert[:, None] * D + column[None, :], mask=inside, other=0), ROUTED)
    logit = rounded(tl.sum(factors * seen[None, :], axis=1), ROUTED, NATIVE)
    if BIASED:
        logit = rounded(logit + numbers(tl.load(bias + expert, mask=expert < E, other=0), ROUTED), ROUTED, NATIVE)
    tl.store(logits + row * E + expert, stored(logit, ROUTED), mask=expert < E)


def launch_gate_logits(hidden_B1D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """See `gate_logits`."""
    (num_experts, width), rows = weight_ED.shape, hidden_B1D.shape[0]
    kind, routed = FLOATS[hidden_B1D.dtype], FLOATS[weight_ED.dtype]
    logits_B1E = torch.empty(rows, 1, num_experts, dtype=weight_ED.dtype, device=hidden_B1D.device)
    launch: Any = gate_logits_kernel[(triton.cdiv(num_experts, TILE_E), rows)]
    launch(
        hidden_B1D.contiguous().view(RAW[kind]),
        weight_ED.contiguous().view(RAW[routed]),
        (weight_ED if bias_E is None else bias_E).view(RAW[routed]),
        logits_B1E.view(RAW[routed]),
        E=num_experts,
        D=width,
        BIASED=bias_E is not None,
        KIND=kind,
        ROUTED=routed,
        NATIVE=isinstance(gate_logits_kernel, triton.JITFunction),
        TILE_E=TILE_E,
        TILE_D=triton.next_power_of_2(width),
        num_warps=8,
    )
    return logits_B1E


@triton.jit
def first_choice_kernel(
    logits,
    ids,
    weights,
    E: tl.constexpr,
    ROUTED: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program a token. ROUTED: the kind of the logits, KIND: of the weights."""
    row = tl.program_id(0)
    expert = tl.arange(0, TILE)
    inside = expert < E
    logit = tl.where(inside, numbers(tl.load(logits + row * E + expert, mask=inside, other=0), ROUTED), -float("inf"))
    share = tl.exp(logit - tl.max(logit, axis=0))
    share = rounded(rounded(share / tl.sum(share, axis=0), ROUTED, NATIVE), KIND, NATIVE)
    best = tl.max(share, axis=0)
    chosen = tl.min(tl.where(inside & (share == best), expert, E - 1), axis=0)
    tl.store(ids + row, chosen.to(tl.int64))
    tl.store(weights + row, stored(best, KIND))


def launch_first_choice(logits_B1E: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `first_choice`."""
    *shape, num_experts = logits_B1E.shape
    routed, kind = FLOATS[logits_B1E.dtype], FLOATS[dtype]
    ids = torch.empty(*shape, 1, dtype=torch.int64, device=logits_B1E.device)
    weights = torch.empty(*shape, 1, dtype=dtype, device=logits_B1E.device)
    launch: Any = first_choice_kernel[(ids.numel(),)]
    launch(
        logits_B1E.contiguous().view(RAW[routed]),
        ids,
        weights.view(RAW[kind]),
        E=num_experts,
        ROUTED=routed,
        KIND=kind,
        NATIVE=isinstance(first_choice_kernel, triton.JITFunction),
        TILE=max(16, triton.next_power_of_2(num_experts)),
        num_warps=1 if num_experts <= 128 else 4,
    )
    return ids, weights
