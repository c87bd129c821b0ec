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
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pregate.engine.device.ops.expert_forms import ACTIVATIONS, Linear, into_and_out
from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers, operand, rounded, stored
from pregate.engine.device.ops.registry import operation
from pregate.engine.device.ops.tile_arithmetic import activated, biases_of, scales_of, weights_of, with_bias
from pregate.engine.storage.slabs import SlabLayout

NUM_WARPS = 4


class ExpertScratch(NamedTuple):
    """Room for what lies between an expert's matrices, made once. hidden_NF: after the activation. weighted_ND: each
    choice's weighted result, before a token's are added up. Both in the compute dtype."""

    hidden_NF: Tensor
    weighted_ND: Tensor

    @classmethod
    def empty(cls, num_choices: int, layout: SlabLayout, device: torch.device | str) -> ExpertScratch:
        width_F, width_D = layout.matrices[0].shape
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
    activation: str,
    constants: Sequence[float],
) -> None:
    """Into `out_BD`: for each token the sum over its choices of weight * down(activation(up(hidden))), or of weight *
    down(activation(gate(hidden), up(hidden))).

    hidden_BD, out_BD: in the layout's dtype. weights_N: in that or in float32. slot_N: int32, where each choice's slab
    is; a choice with -1 adds nothing. hidden_NF, weighted_ND: an `ExpertScratch`. layout_text: `SlabLayout.text`.
    activation, constants: of the family's `ExpertSpec`. Rounds to the dtype where the resident expert does: after each
    matrix and its bias, after each operation of the activation, after weighting, after the sum; dequantised weights are
    rounded to it as well. Raises `UsageError` for an activation or experts it lacks.
    """
    layout = _layout(layout_text)
    into, _ = into_and_out(layout, activation)
    form, num_sides = ACTIVATIONS[activation], len(into.matrices)
    num_tokens, num_choices = hidden_BD.shape[0], slot_N.shape[0]
    top_k = num_choices // num_tokens
    # one choice after the other, without reading a slot's number back
    for choice in range(num_choices):
        token = choice // top_k
        slot_1 = slot_N[choice : choice + 1]
        slab_B = slots_SB.index_select(0, slot_1.clamp_min(0).long())[0]
        parts = layout.decode(slab_B)
        *sides, down = zip_longest(parts[: num_sides + 1], parts[num_sides + 1 :])
        hidden_1D = hidden_BD[token : token + 1]
        hidden_1F = form.apply(*(_linear_of(hidden_1D, *side) for side in sides), *constants)
        weighted_1D = _linear_of(hidden_1F, *down) * weights_N[choice : choice + 1, None]
        weighted_ND[choice : choice + 1] = torch.where(slot_1[:, None] >= 0, weighted_1D, 0)
    weighted_ND = weighted_ND[:num_choices]
    out_BD.copy_(weighted_ND if top_k == 1 else weighted_ND.view(num_tokens, top_k, -1).sum(1))


def _linear_of(hidden_1C: Tensor, matrix_RC: Tensor, bias_R: Tensor | None) -> Tensor:
    # not one operation, which would round once
    result_1R = F.linear(hidden_1C, matrix_RC)
    return result_1R if bias_R is None else result_1R + bias_R


@triton.jit
def slot_linear_kernel(
    inputs,
    slot_N,
    weights_N,
    slabs,
    scales,
    biases,
    outputs,
    num_choices: tl.constexpr,
    SHARE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SLAB: tl.constexpr,
    MATRIX: tl.constexpr,
    UP: tl.constexpr,
    SCALE_SLAB: tl.constexpr,
    SCALE: tl.constexpr,
    UP_SCALE: tl.constexpr,
    BIAS_SLAB: tl.constexpr,
    BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    STORED: tl.constexpr,
    KIND: tl.constexpr,
    WEIGHED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    NATIVE: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """outputs (N, R) = inputs (N / SHARE, C) times the transposed (R, C) matrix of each choice's slot.

    Program (r, n) makes TILE_R columns of the outputs for all choices that share the slot of choice n, if n is the
    first of them. ACTIVATION: what follows the matrix, with ALPHA and LIMIT; behind the last one it is none, and the
    combine weights, of the kind WEIGHED, do. SLAB, MATRIX, UP: numbers to a slab, and from its start to the matrix and
    to the up matrix, read beside it if UP is above 0; SCALE_SLAB, SCALE, UP_SCALE: likewise in float32, for a quantised
    one; BIAS_SLAB, BIAS, UP_BIAS: likewise in the compute dtype, read if BIAS is above 0.
    """
    choice = tl.program_id(1)
    row = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    slot = tl.load(slot_N + choice)
    order = tl.arange(0, CHOICES)
    is_mine = tl.load(slot_N + order, mask=order < num_choices, other=-1) == slot
    is_first = tl.min(tl.where(is_mine, order, CHOICES), axis=0) == choice
    if slot < 0:
        if ACTIVATION == "":
            tl.store(outputs + choice * R + row, stored(tl.zeros((TILE_R,), tl.float32), KIND), mask=row < R)
    elif is_first:
        slab = slabs + slot.to(tl.int64) * SLAB
        slab_scales = scales + slot.to(tl.int64) * SCALE_SLAB
        scale = scales_of(slab_scales + SCALE, row, R, STORED)
        up_scale = scales_of(slab_scales + UP_SCALE, row, R, STORED)
        slab_biases = biases + slot.to(tl.int64) * BIAS_SLAB
        bias = biases_of(slab_biases + BIAS, row, R, BIAS > 0, KIND)
        up_bias = biases_of(slab_biases + UP_BIAS, row, R, UP_BIAS > 0, KIND)
        if CHOICES == 1:
            products = tl.zeros((TILE_R, TILE_C), tl.float32)
            gated = tl.zeros((TILE_R, TILE_C), tl.float32)
            for first in tl.static_range(0, C, TILE_C):
                column = first + tl.arange(0, TILE_C)
                inside = (row[:, None] < R) & (column[None, :] < C)
                # every row loads the input for itself, from the L1 cache: handing it around would need a barrier a tile
                seen = tl.load(tl.broadcast_to(inputs + column[None, :], (TILE_R, TILE_C)), mask=inside, other=0)
                seen = numbers(seen, KIND)
                products += weights_of(slab + MATRIX, scale, row, column, R, C, STORED, KIND, NATIVE) * seen
                if UP > 0:
                    gated += weights_of(slab + UP, up_scale, row, column, R, C, STORED, KIND, NATIVE) * seen
            sums = with_bias(tl.sum(products, axis=1), bias, BIAS > 0, KIND, NATIVE)
            if ACTIVATION == "":
                combine = numbers(tl.load(weights_N), WEIGHED)
                result = rounded(sums * combine, KIND, NATIVE)
            else:
                up = with_bias(tl.sum(gated, axis=1), up_bias, UP_BIAS > 0, KIND, NATIVE)
                result = activated(sums, up, ACTIVATION, ALPHA, LIMIT, KIND, NATIVE)
            tl.store(outputs + row, stored(result, KIND), mask=row < R)
        else:
            sums = tl.zeros((CHOICES, TILE_R), tl.float32)
            gated = tl.zeros((CHOICES, TILE_R), tl.float32)
            for first in tl.range(0, C, TILE_C):
                column = first + tl.arange(0, TILE_C)
                wanted = is_mine[:, None] & (column[None, :] < C)
                seen = tl.load(inputs + (order // SHARE)[:, None] * C + column[None, :], mask=wanted, other=0)
                seen = operand(numbers(seen, KIND), KIND, NATIVE)
                weight = weights_of(slab + MATRIX, scale, row, column, R, C, STORED, KIND, NATIVE)
                sums = tl.dot(seen, tl.trans(operand(weight, KIND, NATIVE)), sums, input_precision="ieee")
                if UP > 0:
                    weight = weights_of(slab + UP, up_scale, row, column, R, C, STORED, KIND, NATIVE)
                    gated = tl.dot(seen, tl.trans(operand(weight, KIND, NATIVE)), gated, input_precision="ieee")
            sums = with_bias(sums, bias[None, :], BIAS > 0, KIND, NATIVE)
            if ACTIVATION == "":
                combine = numbers(tl.load(weights_N + order, mask=is_mine, other=0), WEIGHED)
                result = rounded(sums * combine[:, None], KIND, NATIVE)
            else:
                up = with_bias(gated, up_bias[None, :], UP_BIAS > 0, KIND, NATIVE)
                result = activated(sums, up, ACTIVATION, ALPHA, LIMIT, KIND, NATIVE)
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
    activation: str,
    constants: Sequence[float],
) -> None:
    layout = _layout(layout_text)
    assert hidden_BD.is_contiguous() and out_BD.is_contiguous() and weights_N.is_contiguous()
    into, out = into_and_out(layout, activation)
    num_tokens, num_choices = hidden_BD.shape[0], slot_N.shape[0]
    assert len(constants) == ACTIVATIONS[activation].constants, constants
    assert hidden_NF.shape[0] >= num_choices == weights_N.numel(), (hidden_NF.shape, num_choices)
    top_k = num_choices // num_tokens
    weighted_ND = out_BD if top_k == 1 else weighted_ND[:num_choices]
    given, between = (slot_N, weights_N, slots_SB, layout), {"activation": activation, "constants": constants}
    _launch(hidden_BD, *given, into, hidden_NF, share=top_k, **between)
    _launch(hidden_NF, *given, out, weighted_ND, share=1, activation="", constants=())
    if top_k > 1:
        torch.sum(weighted_ND.view(num_tokens, top_k, -1), 1, out=out_BD)


def _launch(
    inputs: Tensor,
    slot_N: Tensor,
    weights_N: Tensor,
    slots_SB: Tensor,
    layout: SlabLayout,
    linear: Linear,
    outputs: Tensor,
    *,
    share: int,
    activation: str,
    constants: Sequence[float],
) -> None:
    compiled = linear_constants(layout, linear, slot_N.shape[0], share, activation, constants, FLOATS[weights_N.dtype])
    raw = RAW[compiled["KIND"]]
    slot_linear_kernel[(triton.cdiv(compiled["R"], compiled["TILE_R"]), slot_N.shape[0])](
        inputs.view(raw),
        slot_N,
        weights_N.view(RAW[compiled["WEIGHED"]]),
        slots_SB.view(RAW[compiled["STORED"]]),
        slots_SB.view(torch.float32),
        slots_SB.view(raw),
        outputs.view(raw),
        **compiled,
        num_warps=NUM_WARPS,
    )


def linear_constants(
    layout: SlabLayout,
    linear: Linear,
    num_choices: int,
    share: int,
    activation: str,
    constants: Sequence[float],
    weighed: str,
) -> dict[str, Any]:
    """What `slot_linear_kernel` is compiled for, by the names of its arguments. activation: what follows, "" behind the
    last matrix. weighed: the kind of the combine weights."""
    place, *up = linear.matrices
    bias, up_bias = [*(found.offset // layout.dtype.itemsize for found in linear.biases), 0, 0][:2]
    alpha, limit = constants or (0.0, 0.0)
    rows, columns = place.shape
    kind = FLOATS[layout.dtype]
    stored_kind = str(layout.stored) if layout.is_quantised else kind
    choices = 1 if num_choices == 1 else max(16, 1 << (num_choices - 1).bit_length())
    tile_rows, tile_columns = _tile(rows, columns, choices)
    itemsize, scale_size = RAW[stored_kind].itemsize, torch.float32.itemsize
    return {
        "num_choices": num_choices,
        "SHARE": share,
        "R": rows,
        "C": columns,
        "SLAB": layout.slab_bytes // itemsize,
        "MATRIX": place.offset // itemsize,
        "UP": up[0].offset // itemsize if up else 0,
        "SCALE_SLAB": layout.slab_bytes // scale_size,
        "SCALE": (place.scale_offset or 0) // scale_size,
        "UP_SCALE": (up[0].scale_offset or 0) // scale_size if up else 0,
        "BIAS_SLAB": layout.slab_bytes // layout.dtype.itemsize,
        "BIAS": bias,
        "UP_BIAS": up_bias,
        "STORED": stored_kind,
        "KIND": kind,
        "WEIGHED": weighed,
        "ACTIVATION": activation,
        "ALPHA": alpha,
        "LIMIT": limit,
        "NATIVE": isinstance(slot_linear_kernel, triton.JITFunction),
        "CHOICES": choices,
        "TILE_R": tile_rows,
        "TILE_C": tile_columns,
    }


def _tile(rows: int, columns: int, choices: int) -> tuple[int, int]:
    """Rows and columns of a matrix that a program looks at together. One choice: 4096 numbers, 32 a thread, and
    enough programs for the multiprocessors of a large GPU. Several: what the tensor cores take at a time."""
    widest = 1024 if choices == 1 else max(16, min(128, 4096 // choices))
    widest = min(widest, max(16, 1 << (columns - 1).bit_length()))
    narrowest = min(widest, 256 if choices == 1 else 64)
    tile_columns = min(widest, columns & -columns)
    if tile_columns < narrowest:
        # whole tiles would be too narrow: masked ones, with as few columns too many as can be
        sizes = [narrowest << power for power in range((widest // narrowest).bit_length())]
        tile_columns = min(sizes, key=lambda size: (-columns % size, -size))
    tile_rows = max(4, 4096 // tile_columns) if choices == 1 else 32
    while choices == 1 and tile_rows > 4 and rows // tile_rows < 192:
        tile_rows //= 2
    return tile_rows, tile_columns
