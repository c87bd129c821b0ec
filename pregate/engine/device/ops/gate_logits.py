"""Expert logits of a decoding step's tokens. A fetch waits for them, so they are one short launch.

Letters: B rows, D model width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers, rounded, stored
from pregate.engine.device.ops.registry import operation
from pregate.models.routing import router_logits

TILE_E = 8
"""Experts that a program scores."""


@operation(fake=lambda hidden_B1D, weight_ED, _: weight_ED.new_empty(hidden_B1D.shape[0], 1, weight_ED.shape[0]))
def gate_logits(hidden_B1D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """Expert logits (B, 1, E) of one token a row, in the dtype of the weights."""
    return router_logits(hidden_B1D, weight_ED, bias_E, weight_ED.dtype)


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


@gate_logits.on_cuda
def launch_gate_logits(hidden_B1D: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    (num_experts, width), rows = weight_ED.shape, hidden_B1D.shape[0]
    kind, routed = FLOATS[hidden_B1D.dtype], FLOATS[weight_ED.dtype]
    logits_B1E = torch.empty(rows, 1, num_experts, dtype=weight_ED.dtype, device=hidden_B1D.device)
    gate_logits_kernel[(triton.cdiv(num_experts, TILE_E), rows)](
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
