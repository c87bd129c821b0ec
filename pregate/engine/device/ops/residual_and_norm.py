"""Residual and norm of a decoding step in one pass: what a part of a layer adds, and the normed input of the next one.

A step has some forty of these, each so small that its launch is most of its time; as separate operations of torch they
would be eight launches each. Knows numbers only. Letters: B rows, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers, rounded, stored
from pregate.engine.device.ops.registry import operation


@operation(fake=lambda hidden_B1D, *_: torch.empty_like(hidden_B1D))
def norm(hidden_B1D: Tensor, weight_D: Tensor, eps: float, factor: float = 1.0, rounds_last: bool = False) -> Tensor:
    """`hidden` divided by its root mean square and scaled by `weight_D`, then by `factor`.

    In the dtype of `hidden_B1D`, rounded where the family's own norm rounds: before and behind the product with
    `weight_D`, or behind it alone if it `rounds_last`; the mean is taken in float32 (T5's layer norm: no mean
    subtracted, no bias).
    """
    variance_B11 = hidden_B1D.float().pow(2).mean(-1, keepdim=True)
    normed_B1D = hidden_B1D * torch.rsqrt(variance_B11 + eps)
    if rounds_last:
        normed_B1D = (weight_D * normed_B1D.float()).to(hidden_B1D.dtype)
        return normed_B1D if factor == 1.0 else normed_B1D * factor
    if weight_D.dtype in (torch.float16, torch.bfloat16):
        normed_B1D = normed_B1D.to(weight_D.dtype)
    normed_B1D = weight_D * normed_B1D
    return normed_B1D if factor == 1.0 else normed_B1D * factor


@operation(fake=lambda hidden_B1D, *_: (torch.empty_like(hidden_B1D), torch.empty_like(hidden_B1D)))
def add_norm(
    hidden_B1D: Tensor, added_B1D: Tensor, weight_D: Tensor, eps: float, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`hidden + added`, and its `norm`."""
    summed_B1D = hidden_B1D + added_B1D
    return summed_B1D, norm.reference(summed_B1D, weight_D, eps, factor)


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
    ROUNDS_LAST: tl.constexpr,
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
    result = value * scale
    if not ROUNDS_LAST:
        result = rounded(result, KIND, NATIVE)
    result = rounded(weight * result, KIND, NATIVE)
    if SCALES:
        result = rounded(result * factor, KIND, NATIVE)
    tl.store(normed + row + column, stored(result, KIND), mask=inside)


@norm.on_cuda
def launch_norm(
    hidden_B1D: Tensor, weight_D: Tensor, eps: float, factor: float = 1.0, rounds_last: bool = False
) -> Tensor:
    if weight_D.dtype != hidden_B1D.dtype:
        return norm.reference(hidden_B1D, weight_D, eps, factor, rounds_last)
    return _launch(hidden_B1D, None, weight_D, eps, factor, rounds_last)[1]


@add_norm.on_cuda
def launch_add_norm(
    hidden_B1D: Tensor, added_B1D: Tensor, weight_D: Tensor, eps: float, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    if weight_D.dtype != hidden_B1D.dtype:
        return add_norm.reference(hidden_B1D, added_B1D, weight_D, eps, factor)
    return _launch(hidden_B1D, added_B1D, weight_D, eps, factor, False)


def _launch(
    hidden_B1D: Tensor, added_B1D: Tensor | None, weight_D: Tensor, eps: float, factor: float, rounds_last: bool
) -> tuple[Tensor, Tensor]:
    width, kind = hidden_B1D.shape[-1], FLOATS[hidden_B1D.dtype]
    raw, tile = RAW[kind], triton.next_power_of_2(width)
    hidden_B1D = hidden_B1D.contiguous()
    added = hidden_B1D if added_B1D is None else added_B1D.contiguous()
    normed_B1D = torch.empty_like(hidden_B1D)
    summed_B1D = hidden_B1D if added_B1D is None else torch.empty_like(hidden_B1D)
    add_norm_kernel[(hidden_B1D.numel() // width,)](
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
        ROUNDS_LAST=rounds_last,
        KIND=kind,
        NATIVE=isinstance(add_norm_kernel, triton.JITFunction),
        TILE=tile,
        num_warps=4 if tile <= 1024 else 8,
    )
    return summed_B1D, normed_B1D
