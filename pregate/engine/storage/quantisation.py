"""Weight-only quantisation: int8 or fp8 numbers with a scale for each row, a power of two.

Knows matrices; knows nothing about slabs. Letters: R rows and C columns of a matrix.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pregate.config import SlabDtype

STORED = {SlabDtype.int8: torch.int8, SlabDtype.fp8: torch.float8_e4m3fn}
STRIP = 512
"""Rows of fp8 that are looked up at a time on a CPU, so that their 32-bit indices stay in cache."""


def quantise(matrix_RC: Tensor, stored_RC: Tensor, scale_R1: Tensor) -> None:
    """Symmetric rounding with one scale a row, a power of two.

    Such a scale costs up to one bit of int8, and buys that `stored * scale` is exact in every dtype that holds the
    stored numbers, and that multiplying a product by it afterwards gives the same sum, bit for bit. The scale is the
    smallest that no number overflows, or half of that where clipping the largest costs less than it saves.
    """
    values_RC = matrix_RC.float()
    largest = 127.0 if stored_RC.dtype is torch.int8 else torch.finfo(stored_RC.dtype).max
    peak_R1 = values_RC.abs().amax(1, keepdim=True)
    exponent_R1 = (peak_R1 / largest).log2().ceil().nan_to_num(neginf=0.0).clamp(-125, 126)
    rounded, scale = _rounded(values_RC, exponent_R1, stored_RC.dtype, largest)
    if stored_RC.dtype is torch.int8:
        finer, half_scale = _rounded(values_RC, exponent_R1 - 1, stored_RC.dtype, largest)
        better = _row_errors(finer * half_scale, values_RC) < _row_errors(rounded * scale, values_RC)
        rounded, scale = torch.where(better, finer, rounded), torch.where(better, half_scale, scale)
    stored_RC.copy_(rounded)
    scale_R1.copy_(scale)


def _rounded(values_RC: Tensor, exponent_R1: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """What `dtype` stores of `values / 2^exponent`, as float32, and the scales; made of bits, since `exp2` rounds."""
    scale_R1 = ((exponent_R1.int() + 127) << 23).view(torch.float32)
    scaled_RC = (values_RC / scale_R1).clamp(-largest, largest)
    return scaled_RC.round() if dtype is torch.int8 else scaled_RC.to(dtype).float(), scale_R1


def _row_errors(approximate_RC: Tensor, values_RC: Tensor) -> Tensor:
    return (approximate_RC - values_RC).square().sum(1, keepdim=True)


def dequantise(stored_RC: Tensor, scale_R1: Tensor, out_RC: Tensor) -> None:
    """`stored * scale` in float32, rounded to the dtype of `out_RC`."""
    torch.mul(stored_RC.float(), scale_R1, out=out_RC)


def widen(stored_RC: Tensor, out_RC: Tensor) -> None:
    """The stored numbers, without their scale, in the dtype of `out_RC`."""
    if stored_RC.device.type != "cpu" or stored_RC.dtype is not torch.float8_e4m3fn:
        out_RC.copy_(stored_RC)
        return
    # torch converts fp8 one number at a time on a CPU; looking up all 256 values is several times faster
    values = _fp8_values(out_RC.dtype)
    for first in range(0, stored_RC.shape[0], STRIP):
        strip = stored_RC[first : first + STRIP]
        codes = strip.view(torch.uint8).flatten().int()
        torch.index_select(values, 0, codes, out=out_RC[first : first + STRIP].view(-1))


@lru_cache(maxsize=4)
def _fp8_values(dtype: torch.dtype) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
