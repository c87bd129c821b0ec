"""The Triton kernel behind `expert_outputs`: one linear map whose matrix is the one in a slot, used for both matrices.

A decoding step has so few tokens that reading the weights is all of the time. So each weight is read once, by the
first choice that wants its slot, for all choices that do; one choice is a matrix-vector product, several go through
the tensor cores. Knows bytes in slots and choices; knows nothing about how slabs came there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pregate.engine.device.ops.experts import ExpertScratch, up_and_down
from pregate.engine.device.ops.kernels_numbers import FLOATS, RAW, numbers, rounded, stored
from pregate.engine.storage.slabs import MatrixPlace, SlabLayout

NUM_WARPS = 4


@triton.jit
def operand(value, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """A rounded float32 as the tensor cores take it; the interpreter multiplies in float32, which is as exact."""
    if KIND == "fp16":
        value = value.to(tl.float16)
    elif KIND == "bf16" and NATIVE:
        value = value.to(tl.bfloat16)
    return value


@triton.jit
def finished(sums, weight, KIND: tl.constexpr, LAST: tl.constexpr, NATIVE: tl.constexpr):
    """relu after the first matrix, the choice's combine weight after the second, rounded where torch rounds."""
    sums = rounded(sums, KIND, NATIVE)
    return rounded(sums * weight, KIND, NATIVE) if LAST else tl.where(sums < 0, 0.0, sums)


@triton.jit
def slot_linear_kernel(
    inputs,
    slot_N,
    weights_N,
    slabs,
    scales,
    outputs,
    num_choices: tl.constexpr,
    SHARE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    MATRIX: tl.constexpr,
    SCALE_SLAB: tl.constexpr,
    SCALE: tl.constexpr,
    STORED: tl.constexpr,
    KIND: tl.constexpr,
    LAST: tl.constexpr,
    NATIVE: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """outputs (N, R) = inputs (N / SHARE, C) times the transposed (R, C) matrix of each choice's slot.

    Program (r, n) makes TILE_R columns of the outputs for all choices that share the slot of choice n, if n is the
    first of them. SLAB, MATRIX: numbers to a slab, and from its start to the matrix; SCALE_SLAB, SCALE: likewise in
    float32, for a quantised one.
    """
    choice = tl.program_id(1)
    row = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    slot = tl.load(slot_N + choice)
    order = tl.arange(0, CHOICES)
    is_mine = tl.load(slot_N + order, mask=order < num_choices, other=-1) == slot
    is_first = tl.min(tl.where(is_mine, order, CHOICES), axis=0) == choice
    if slot < 0:
        if LAST:
            tl.store(outputs + choice * R + row, stored(tl.zeros((TILE_R,), tl.float32), KIND), mask=row < R)
    elif is_first:
        matrix = slabs + slot.to(tl.int64) * SLAB + MATRIX
        scale = tl.full((TILE_R,), 1.0, tl.float32)
        if STORED == "int8" or STORED == "fp8":
            scale = tl.load(scales + slot.to(tl.int64) * SCALE_SLAB + SCALE + row, mask=row < R, other=0.0)
        if CHOICES == 1:
            products = tl.zeros((TILE_R, TILE_C), tl.float32)
            for first in tl.static_range(0, C, TILE_C):
                column = first + tl.arange(0, TILE_C)
                inside = (row[:, None] < R) & (column[None, :] < C)
                raw = tl.load(matrix + row[:, None] * C + column[None, :], mask=inside, other=0)
                weight = numbers(raw, STORED)
                if STORED != KIND:
                    weight = rounded(weight * scale[:, None], KIND, NATIVE)
                # every row loads the input for itself, from the L1 cache: handing it around would need a barrier a tile
                seen = tl.load(tl.broadcast_to(inputs + column[None, :], (TILE_R, TILE_C)), mask=inside, other=0)
                products += weight * numbers(seen, KIND)
            combine = numbers(tl.load(weights_N), KIND)
            result = finished(tl.sum(products, axis=1), combine, KIND, LAST, NATIVE)
            tl.store(outputs + row, stored(result, KIND), mask=row < R)
        else:
            sums = tl.zeros((CHOICES, TILE_R), tl.float32)
            for first in tl.range(0, C, TILE_C):
                column = first + tl.arange(0, TILE_C)
                inside = (row[:, None] < R) & (column[None, :] < C)
                raw = tl.load(matrix + row[:, None] * C + column[None, :], mask=inside, other=0)
                weight = numbers(raw, STORED)
                if STORED != KIND:
                    weight = rounded(weight * scale[:, None], KIND, NATIVE)
                wanted = is_mine[:, None] & (column[None, :] < C)
                seen = tl.load(inputs + (order // SHARE)[:, None] * C + column[None, :], mask=wanted, other=0)
                sums = tl.dot(
                    operand(numbers(seen, KIND), KIND, NATIVE),
                    tl.trans(operand(weight, KIND, NATIVE)),
                    sums,
                    input_precision="ieee",
                )
            combine = numbers(tl.load(weights_N + order, mask=is_mine, other=0), KIND)
            result = finished(sums, combine[:, None], KIND, LAST, NATIVE)
            tl.store(
                outputs + order[:, None] * R + row[None, :],
                stored(result, KIND),
                mask=is_mine[:, None] & (row[None, :] < R),
            )


def launch_expert_outputs(
    hidden_BD: Tensor,
    slot_N: Tensor,
    weights_N: Tensor,
    slots_SB: Tensor,
    layout: SlabLayout,
    scratch: ExpertScratch,
    out_BD: Tensor,
    activation: str,
) -> None:
    """See `expert_outputs`, which has refused what this cannot do."""
    assert activation == "relu", activation
    assert hidden_BD.is_contiguous() and out_BD.is_contiguous() and weights_N.is_contiguous()
    up, down = up_and_down(layout)
    num_tokens, num_choices = hidden_BD.shape[0], slot_N.shape[0]
    assert scratch.hidden_NF.shape[0] >= num_choices == weights_N.numel(), (scratch.hidden_NF.shape, num_choices)
    top_k = num_choices // num_tokens
    weighted_ND = out_BD if top_k == 1 else scratch.weighted_ND[:num_choices]
    _linear(hidden_BD, slot_N, weights_N, slots_SB, layout, up, scratch.hidden_NF, share=top_k, last=False)
    _linear(scratch.hidden_NF, slot_N, weights_N, slots_SB, layout, down, weighted_ND, share=1, last=True)
    if top_k > 1:
        torch.sum(weighted_ND.view(num_tokens, top_k, -1), 1, out=out_BD)


def _linear(
    inputs: Tensor,
    slot_N: Tensor,
    weights_N: Tensor,
    slots_SB: Tensor,
    layout: SlabLayout,
    place: MatrixPlace,
    outputs: Tensor,
    *,
    share: int,
    last: bool,
) -> None:
    constants = linear_constants(layout, place, slot_N.shape[0], share=share, last=last)
    raw = RAW[constants["KIND"]]
    launch: Any = slot_linear_kernel[(triton.cdiv(constants["R"], constants["TILE_R"]), slot_N.shape[0])]
    launch(
        inputs.view(raw),
        slot_N,
        weights_N.view(raw),
        slots_SB.view(RAW[constants["STORED"]]),
        slots_SB.view(torch.float32),
        outputs.view(raw),
        **constants,
        num_warps=NUM_WARPS,
    )


def linear_constants(
    layout: SlabLayout, place: MatrixPlace, num_choices: int, *, share: int, last: bool
) -> dict[str, Any]:
    """What `slot_linear_kernel` is compiled for, by the names of its arguments."""
    rows, columns = place.shape
    kind = FLOATS[layout.dtype]
    stored_kind = str(layout.stored) if layout.is_quantised else kind
    choices = 1 if num_choices == 1 else max(16, 1 << (num_choices - 1).bit_length())
    tile_rows, tile_columns = _tile(rows, columns, choices)
    return {
        "num_choices": num_choices,
        "SHARE": share,
        "R": rows,
        "C": columns,
        "SLAB": layout.slab_bytes // RAW[stored_kind].itemsize,
        "MATRIX": place.offset // RAW[stored_kind].itemsize,
        "SCALE_SLAB": layout.slab_bytes // torch.float32.itemsize,
        "SCALE": (place.scale_offset or 0) // torch.float32.itemsize,
        "STORED": stored_kind,
        "KIND": kind,
        "LAST": last,
        "NATIVE": isinstance(slot_linear_kernel, triton.JITFunction),
        "CHOICES": choices,
        "TILE_R": tile_rows,
        "TILE_C": tile_columns,
    }


def _tile(rows: int, columns: int, choices: int) -> tuple[int, int]:
    """Rows and columns of a matrix that a program looks at together. One choice: 4096 numbers, 32 a thread, and
    enough programs for the multiprocessors of a large GPU. Several: what the tensor cores take at a time."""
    widest = 1024 if choices == 1 else 128
    dividing = columns & -columns
    # whole tiles where the width allows it, else a masked one
    tile_columns = min(widest, dividing if dividing >= 64 else 1 << (columns - 1).bit_length())
    tile_columns = max(16, tile_columns)
    tile_rows = max(4, 4096 // tile_columns) if choices == 1 else 32
    while choices == 1 and tile_rows > 4 and rows // tile_rows < 192:
        tile_rows //= 2
    return tile_rows, tile_columns
