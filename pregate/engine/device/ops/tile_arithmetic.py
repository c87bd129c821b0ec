"""What a program of the experts' kernel does with a tile: read weights and biases of a slot, and apply what is between
the matrices.

Knows numbers and how slabs store them; knows nothing about choices or slots.

Letters: R rows and C columns of a matrix.
"""

from __future__ import annotations

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import numbers, rounded


@triton.jit
def weights_of(
    matrix,
    scales,
    row,
    column,
    R: tl.constexpr,
    C: tl.constexpr,
    STORED: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """A tile of the (R, C) matrix in a slot, in float32, rounded to `KIND`. `scales`: one a row of the tile."""
    inside = (row[:, None] < R) & (column[None, :] < C)
    weight = numbers(tl.load(matrix + row[:, None] * C + column[None, :], mask=inside, other=0), STORED)
    if STORED != KIND:
        weight = rounded(weight * scales[:, None], KIND, NATIVE)
    return weight


@triton.jit
def scales_of(scales, row, R: tl.constexpr, STORED: tl.constexpr):
    """One scale a row of a tile; 1 where slabs hold numbers as they are."""
    if STORED == "int8" or STORED == "fp8":
        scale = tl.load(scales + row, mask=row < R, other=0.0)
    else:
        scale = tl.full(row.shape, 1.0, tl.float32)
    return scale


@triton.jit
def biases_of(biases, row, R: tl.constexpr, BIASED: tl.constexpr, KIND: tl.constexpr):
    """One bias a row of a tile; 0 where there are none."""
    bias = tl.zeros(row.shape, tl.float32)
    if BIASED:
        bias = numbers(tl.load(biases + row, mask=row < R, other=0), KIND)
    return bias


@triton.jit
def with_bias(sums, bias, BIASED: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """What a matrix gives, rounded where torch rounds."""
    sums = rounded(sums, KIND, NATIVE)
    if BIASED:
        sums = rounded(sums + bias, KIND, NATIVE)
    return sums


@triton.jit
def activated(
    first,
    up,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """What is between the matrices, rounded where torch rounds. `first`: the results of the only matrix, or of the gate
    matrix. `up`: those of the up matrix beside a gate."""
    if ACTIVATION == "relu":
        passed = tl.where(first < 0, 0.0, first)
    elif ACTIVATION == "gated_silu":
        passed = rounded(first / (1.0 + tl.exp(-first)), KIND, NATIVE)
        passed = rounded(passed * up, KIND, NATIVE)
    else:
        tl.static_assert(ACTIVATION == "gated_clamped")
        # not the minimum and the maximum, which lose a NaN
        gate = rounded(tl.where(first > LIMIT, LIMIT, first), KIND, NATIVE)
        up = rounded(tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)), KIND, NATIVE)
        share = rounded(1.0 / (1.0 + tl.exp(-rounded(gate * ALPHA, KIND, NATIVE))), KIND, NATIVE)
        passed = rounded(gate * share, KIND, NATIVE)
        passed = rounded(rounded(up + 1.0, KIND, NATIVE) * passed, KIND, NATIVE)
    return passed
