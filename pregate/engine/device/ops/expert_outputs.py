"""The experts of one block for the few tokens of a decoding step, their weights read from slots.

The slot of each choice is known to the device alone, so nothing here depends on it but addresses. A step has so few
tokens that reading the weights is all of the time. So the kernel reads each weight once, by the first choice that wants
its slot, for all choices that do; one choice is a matrix-vector product, several go through the tensor cores. Knows
slabs and their arithmetic; knows nothing about routers, tables or moving.

Letters: B tokens (one of each sequence), K experts a token, N = B * K choices, S slots, D model width, F expert
hidden width. Choice n belongs to token n // K.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pregate.config import UsageError
from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers, rounded, stored
from pregate.engine.device.ops.registry import operation
from pregate.engine.storage.slabs import MatrixPlace, SlabLayout

NUM_WARPS = 4
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu}
"""By the names that a model's config gives them."""


def up_and_down(layout: SlabLayout) -> tuple[MatrixPlace, MatrixPlace]:
    """The two matrices of an expert, (F, D) and (D, F). Raises `UsageError` for experts of another form."""
    shapes = [place.shape for place in layout.matrices]
    if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != shapes[0][::-1]:
        named = ", ".join(f"{place.name} {place.shape}" for place in layout.matrices)
        raise UsageError(
            f"Experts of {named} cannot be computed on the device, only an up and a down matrix: use the host engine."
        )
    return layout.matrices[0], layout.matrices[1]


def check_activation(activation: str) -> None:
    """Raises `UsageError` for an activation, by its name in a model's config, that no kernel has."""
    if activation not in ACTIVATIONS:
        raise UsageError(
            f"Experts with the activation {activation!r} cannot be computed on the device, only "
            f"{', '.join(ACTIVATIONS)}: use the host engine."
        )


class ExpertScratch(NamedTuple):
    """Room for what lies between an expert's matrices, made once. hidden_NF: after the activation. weighted_ND: each
    choice's weighted result, before a token's are added up. Both in the compute dtype."""

    hidden_NF: Tensor
    weighted_ND: Tensor

    @classmethod
    def empty(cls, num_choices: int, layout: SlabLayout, device: torch.device | str) -> ExpertScratch:
        width_F, width_D = up_and_down(layout)[0].shape
        return cls(
            torch.empty(num_choices, width_F, dtype=layout.dtype, device=device),
            torch.empty(num_choices, width_D, dtype=layout.dtype, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return self.hidden_NF.nbytes + self.weighted_ND.nbytes


@lru_cache
def _layout(text: str) -> SlabLayout:
    """An operation takes tensors and plain values, so a layout comes as its `text`."""
    return SlabLayout.from_json(json.loads(text))


@operation("hidden_NF", "weighted_ND", "out_BD")
def expert_outputs(
    hidden_BD: Tensor,
    slot_N: Tensor,
    weights_N: Tensor,
    slots_SB: Tensor,
    hidden_NF: Tensor,
    weighted_ND: Tensor,
    out_BD: Tensor,
    layout_text: str,
    activation: str = "relu",
) -> None:
    """Into `out_BD`: for each token the sum over its choices of weight * down(activation(up(hidden))).

    hidden_BD, weights_N, out_BD: in the layout's dtype. slot_N: int32, where each choice's slab is; a choice with -1
    adds nothing. hidden_NF, weighted_ND: an `ExpertScratch`. layout_text: `SlabLayout.text`. Rounds to the dtype where
    the resident expert does: after each matrix, after weighting, after the sum; dequantised weights are rounded to it
    as well. Raises `UsageError` for an activation or experts it lacks.
    """
    check_activation(activation)
    layout = _layout(layout_text)
    up_and_down(layout)
    num_tokens, num_choices = hidden_BD.shape[0], slot_N.shape[0]
    top_k = num_choices // num_tokens
    # one choice after the other, without reading a slot's number back
    for choice in range(num_choices):
        token = choice // top_k
        slot_1 = slot_N[choice : choice + 1]
        slab_B = slots_SB.index_select(0, slot_1.clamp_min(0).long())[0]
        up_FD, down_DF = layout.decode(slab_B)
        hidden_1F = ACTIVATIONS[activation](F.linear(hidden_BD[token : token + 1], up_FD))
        weighted_1D = F.linear(hidden_1F, down_DF) * weights_N[choice]
        weighted_ND[choice : choice + 1] = torch.where(slot_1[:, None] >= 0, weighted_1D, 0)
    weighted_ND = weighted_ND[:num_choices]
    out_BD.copy_(weighted_ND if top_k == 1 else weighted_ND.view(num_tokens, top_k, -1).sum(1))


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


@expert_outputs.on_cuda
def launch_expert_outputs(
    hidden_BD: Tensor,
    slot_N: Tensor,
    weights_N: Tensor,
    slots_SB: Tensor,
    hidden_NF: Tensor,
    weighted_ND: Tensor,
    out_BD: Tensor,
    layout_text: str,
    activation: str = "relu",
) -> None:
    layout = _layout(layout_text)
    check_activation(activation)
    assert hidden_BD.is_contiguous() and out_BD.is_contiguous() and weights_N.is_contiguous()
    up, down = up_and_down(layout)
    num_tokens, num_choices = hidden_BD.shape[0], slot_N.shape[0]
    assert hidden_NF.shape[0] >= num_choices == weights_N.numel(), (hidden_NF.shape, num_choices)
    top_k = num_choices // num_tokens
    weighted_ND = out_BD if top_k == 1 else weighted_ND[:num_choices]
    _linear(hidden_BD, slot_N, weights_N, slots_SB, layout, up, hidden_NF, share=top_k, last=False)
    _linear(hidden_NF, slot_N, weights_N, slots_SB, layout, down, weighted_ND, share=1, last=True)
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
    slot_linear_kernel[(triton.cdiv(constants["R"], constants["TILE_R"]), slot_N.shape[0])](
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
