"""The Triton kernel behind `add_norm`: a row of the residual stream is read once, added to, normed and written.

A step has some forty of these, each so small that its launch is most of its time; as separate operations of torch they
would be eight launches each. Knows numbers only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pregate.engine.device.ops.kernels_numbers import FLOATS, RAW, numbers, rounded, stored


@triton.jit
def add_norm_kernel(
    hidden,
    added,
    weight_D,
    summed,
    normed,
    eps,
    factor,
    D: tl.constexpr,
    ADDS: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program a row; TILE is the power of two at or above D. `added` is read, and `summed` written, if ADDS."""
    row = tl.program_id(0) * D
    column = tl.arange(0, TILE)
    inside = column < D
    value = numbers(tl.load(hidden + row + column, mask=inside, other=0), KIND)
    if ADDS:
        value = rounded(value + numbers(tl.load(added + row + column, mask=inside, other=0), KIND), KIND, NATIVE)
        tl.store(summed + row + column, stored(value, KIND), mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / D + eps)
    weight = numbers(tl.load(weight_D + column, mask=inside, other=0), KIND)
    result = rounded(weight * rounded(value * scale, KIND, NATIVE), KIND, NATIVE)
    if SCALES:
        result = rounded(result * factor, KIND, NATIVE)
    tl.store(normed + row + column, stored(result, KIND), mask=inside)


def launch_add_norm(
    hidden_B1D: Tensor, added_B1D: Tensor | None, weight_D: Tensor, eps: float, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """See `add_norm`."""
    width, kind = hidden_B1D.shape[-1], FLOATS[hidden_B1D.dtype]
    raw, tile = RAW[kind], triton.next_power_of_2(width)
    hidden_B1D = hidden_B1D.contiguous()
    added = hidden_B1D if added_B1D is None else added_B1D.contiguous()
    normed_B1D = torch.empty_like(hidden_B1D)
    summed_B1D = hidden_B1D if added_B1D is None else torch.empty_like(hidden_B1D)
    launch: Any = add_norm_kernel[(hidden_B1D.numel() // width,)]
    launch(
        hidden_B1D.view(raw),
        added.view(raw),
        weight_D.view(raw),
        summed_B1D.view(raw),
        normed_B1D.view(raw),
        eps,
        factor,
        D=width,
        SCALES=factor != 1.0,
        ADDS=added_B1D is not None,
        KIND=kind,
        NATIVE=isinstance(add_norm_kernel, triton.JITFunction),
        TILE=tile,
        num_warps=4 if tile <= 1024 else 8,
    )
    return summed_B1D, normed_B1D
