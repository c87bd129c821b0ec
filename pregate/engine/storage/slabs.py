"""What a slab is: all matrices of one expert as one contiguous run of bytes, a multiple of 4 KiB.

A slab holds the matrices as they are, or weight-only quantised to int8 or fp8 with a scale for each row, a power of
two, stored beside them as float32. Knows tensors and bytes; knows nothing about files, slots or models' arithmetic.

Letters: R rows and C columns of a matrix, B bytes of a slab.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from pregate.config import SlabDtype, UsageError
from pregate.models.experts import Factor, RowScaled
from pregate.models.family import ExpertSpec
from pregate.system.memory import is_out_of_memory
from pregate.system.runtime import human_bytes

PAGE = 4096
"""O_DIRECT wants addresses, offsets and lengths in multiples of the logical block, at most a page."""
HUGE_PAGE = 2 << 20
LINE = 64
"""Matrices start on cache lines, where BLAS reads fastest."""
HOST_REGISTER_MAPPED = 2
"""cudaHostRegisterMapped. Devices with unified addressing map registered memory without it; it is promised with it."""
CANNOT_LOCK = (2, 304, 801)
"""cudaErrorMemoryAllocation, cudaErrorOperatingSystem, cudaErrorNotSupported: the system locks no more, or none."""
STRIP = 512
"""Rows of fp8 that are looked up at a time on a CPU, so that their 32-bit indices stay in cache."""

STORED = {SlabDtype.int8: torch.int8, SlabDtype.fp8: torch.float8_e4m3fn}


def round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class MatrixPlace:
    """Where one matrix lies in a slab: offsets in bytes; `scale_offset` is None where it is stored as it is."""

    name: str
    shape: tuple[int, ...]
    offset: int
    scale_offset: int | None = None


@dataclass(frozen=True)
class SlabLayout:
    """Where each matrix of an expert lies inside its slab. All slabs of a checkpoint share one layout.

    dtype: what the model computes in; stored: what the bytes are.
    """

    dtype: torch.dtype
    stored: SlabDtype
    matrices: tuple[MatrixPlace, ...]
    slab_bytes: int

    @classmethod
    def of(cls, family: ExpertSpec, dtype: torch.dtype, stored: SlabDtype = SlabDtype.source) -> SlabLayout:
        offset, matrices = 0, []
        itemsize = STORED.get(stored, dtype).itemsize
        for name, shape in family.matrices.items():
            place, offset = offset, round_up(offset + torch.Size(shape).numel() * itemsize, LINE)
            scales = None
            if stored is not SlabDtype.source:
                scales, offset = offset, round_up(offset + shape[0] * torch.float32.itemsize, LINE)
            matrices.append(MatrixPlace(name, tuple(shape), place, scales))
        return cls(dtype, stored, tuple(matrices), round_up(offset, PAGE))

    @property
    def is_quantised(self) -> bool:
        return self.stored is not SlabDtype.source

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one expert's matrices in the compute dtype."""
        return sum(torch.Size(place.shape).numel() for place in self.matrices) * self.dtype.itemsize

    def views(self, slab_B: Tensor) -> list[Tensor]:
        """The stored matrices of a slab (uint8) as tensors that share its memory."""
        dtype = STORED.get(self.stored, self.dtype)
        return [_view(slab_B, place.offset, place.shape, dtype) for place in self.matrices]

    def scales(self, slab_B: Tensor) -> list[Tensor]:
        """The scales (R, 1) of each quantised matrix, sharing the slab's memory."""
        return [
            _view(slab_B, place.scale_offset, (place.shape[0], 1), torch.float32)
            for place in self.matrices
            if place.scale_offset is not None
        ]

    def encode(self, matrices: Sequence[Tensor], slab_B: Tensor) -> None:
        """Write `matrices` into a CPU slab, quantised if that is what it stores; padding is zeroed."""
        slab_B.zero_()
        if not self.is_quantised:
            for view, matrix in zip(self.views(slab_B), matrices, strict=True):
                view.copy_(matrix)
            return
        for view, scale, matrix in zip(self.views(slab_B), self.scales(slab_B), matrices, strict=True):
            quantise(matrix, view, scale)

    def decode(self, slab_B: Tensor) -> list[Tensor]:
        """The matrices in the compute dtype: views of the slab, or new tensors with the dequantised numbers."""
        stored = self.views(slab_B)
        if not self.is_quantised:
            return stored
        into = self.scratch(slab_B.device)
        for matrix, scale, out in zip(stored, self.scales(slab_B), into, strict=True):
            dequantise(matrix, scale, out)
        return into

    def scratch(self, device: torch.device) -> list[Tensor]:
        """Room for one expert's matrices in the compute dtype; none where slabs hold them as they are."""
        places = self.matrices if self.is_quantised else ()
        return [torch.empty(place.shape, dtype=self.dtype, device=device) for place in places]

    def factors(self, slab_B: Tensor, scratch: Sequence[Tensor]) -> list[Factor]:
        """What an expert multiplies with, valid until `scratch` is used again.

        The same products as with what `decode` gives, bit for bit, with the scales applied behind them, where there is
        much less to multiply; but in float16, where a product without its scale could overflow.
        """
        stored = self.views(slab_B)
        if not self.is_quantised:
            return list(stored)
        factors: list[Factor] = []
        for matrix, scale_R1, wide in zip(stored, self.scales(slab_B), scratch, strict=True):
            if self.dtype is torch.float16:
                dequantise(matrix, scale_R1, wide)
                factors.append(wide)
            else:
                widen(matrix, wide)
                factors.append(RowScaled(wide, scale_R1.flatten().to(self.dtype)))
        return factors

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "stored": str(self.stored),
            "slab_bytes": self.slab_bytes,
            "matrices": [
                {"name": p.name, "shape": list(p.shape), "offset": p.offset, "scale_offset": p.scale_offset}
                for p in self.matrices
            ],
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SlabLayout:
        """Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for what `to_json` did not write."""
        matrices = tuple(
            MatrixPlace(m["name"], tuple(m["shape"]), m["offset"], m["scale_offset"]) for m in raw["matrices"]
        )
        return cls(getattr(torch, raw["dtype"]), SlabDtype(raw["stored"]), matrices, raw["slab_bytes"])


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


def _view(slab_B: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return slab_B[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(*shape)


def aligned_bytes(size: int) -> Tensor:
    """A uint8 tensor of `size` bytes on the CPU that starts at a page boundary; of a huge page, where the system has
    those and `size` is one or more. Large matrices are read with fewer address translations then, and a read past
    the page cache pins fewer pages. Raises `MemoryError`."""
    huge = getattr(mmap, "MADV_HUGEPAGE", None)
    try:
        if size < HUGE_PAGE or huge is None:
            raw, unit = torch.empty(size + PAGE, dtype=torch.uint8), PAGE
        else:
            # private: the kernel gives shared memory no huge pages by default
            memory, unit = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), HUGE_PAGE
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(huge)
            raw = torch.frombuffer(memory, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:  # mmap and torch
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"There are no {human_bytes(size)} of host memory left.") from error
    start = -raw.data_ptr() % unit
    # a tensor of its own, not a view: of a view, torch asks whether what it is a view of is page-locked
    return torch.from_numpy(raw.numpy()[start : start + size])


def as_buffer(slab_B: Tensor) -> memoryview:
    """The bytes of a CPU uint8 tensor, for reading and writing files."""
    return memoryview(cast(Any, slab_B.numpy()))


def page_lock(memory: Tensor) -> None:
    """Page-lock `memory` in place for CUDA copies, and map it for kernels that read it themselves. Raises
    `UsageError` if the system allows no more of it, `RuntimeError` for any other fault."""
    register = cast(Any, torch.cuda.cudart()).cudaHostRegister
    status = int(register(memory.data_ptr(), memory.numel(), HOST_REGISTER_MAPPED))
    if status not in (0, *CANNOT_LOCK):
        raise RuntimeError(f"Page-locking {human_bytes(memory.numel())} of host memory ended in CUDA error {status}.")
    if status != 0:
        raise UsageError(
            f"{human_bytes(memory.numel())} of host memory could not be page-locked (CUDA error {status}): raise the "
            "limit with ulimit -l, or use engine.tier=disk."
        )


def page_unlock(memory: Tensor) -> None:
    cast(Any, torch.cuda.cudart()).cudaHostUnregister(memory.data_ptr())
