"""The Triton kernel behind `first_choice`: softmax, rounding and the choice of one token in one program.

Knows logits only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pregate.engine.device.kernels_numbers import FLOATS, RAW, numbers, rounded, stored


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
