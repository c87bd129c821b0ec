"""What a slab is: all matrices of one expert as one contiguous run of bytes, a multiple of 4 KiB.

A slab holds the matrices as they are, or weight-only quantised to int8 or fp8 with a scale for each row, a power of
two, stored beside them as float32. Biases stay as they are. Knows tensors and bytes; knows nothing about files, slots
or models' arithmetic.

Letters: R rows and C columns of a matrix, B bytes of a slab.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pregate.config import SlabDtype
from pregate.engine.storage.aligned_memory import PAGE, round_up
from pregate.engine.storage.quantisation import STORED, dequantise, quantise, widen
from pregate.models.expert_math import Factor, RowScaled
from pregate.models.family import ExpertSpec, dtype_name

LINE = 64
"""Matrices start on cache lines, where BLAS reads fastest."""


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
        for name, shape in family.matrices.items():
            size = torch.Size(shape)
            quantised = stored in STORED and len(size) > 1
            itemsize = STORED.get(stored, dtype).itemsize if quantised else dtype.itemsize
            place, offset = offset, round_up(offset + size.numel() * itemsize, LINE)
            scales = None
            if quantised:
                scales, offset = offset, round_up(offset + size[0] * torch.float32.itemsize, LINE)
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
        dtypes = (self.dtype if place.scale_offset is None else STORED[self.stored] for place in self.matrices)
        return [
            _view(slab_B, place.offset, place.shape, dtype) for place, dtype in zip(self.matrices, dtypes, strict=True)
        ]

    def scales(self, slab_B: Tensor) -> list[Tensor]:
        """The scales (R, 1) of each quantised matrix, sharing the slab's memory."""
        return [scale for scale in self._scales(slab_B) if scale is not None]

    def _scales(self, slab_B: Tensor) -> list[Tensor | None]:
        """Those of every matrix; None for one that is stored as it is."""
        return [
            None
            if place.scale_offset is None
            else _view(slab_B, place.scale_offset, (place.shape[0], 1), torch.float32)
            for place in self.matrices
        ]

    def encode(self, matrices: Sequence[Tensor], slab_B: Tensor) -> None:
        """Write `matrices` into a CPU slab, quantised if that is what it stores; padding is zeroed."""
        slab_B.zero_()
        for view, scale, matrix in zip(self.views(slab_B), self._scales(slab_B), matrices, strict=True):
            if scale is None:
                view.copy_(matrix)
            else:
                quantise(matrix, view, scale)

    def decode(self, slab_B: Tensor) -> list[Tensor]:
        """The matrices in the compute dtype: views of the slab, or new tensors with the dequantised numbers."""
        stored = self.views(slab_B)
        if not self.is_quantised:
            return stored
        into = self.scratch(slab_B.device)
        for matrix, scale, out in zip(stored, self._scales(slab_B), into, strict=True):
            if scale is None:
                out.copy_(matrix)
            else:
                dequantise(matrix, scale, out)
        return into

    def scratch(self, device: torch.device) -> list[Tensor]:
        """Room for one expert's matrices in the compute dtype; none where slabs hold all of them as they are."""
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
        for matrix, scale_R1, wide in zip(stored, self._scales(slab_B), scratch, strict=True):
            if scale_R1 is None:
                factors.append(matrix)
            elif self.dtype is torch.float16:
                dequantise(matrix, scale_R1, wide)
                factors.append(wide)
            else:
                widen(matrix, wide)
                factors.append(RowScaled(wide, scale_R1.flatten().to(self.dtype)))
        return factors

    @cached_property
    def text(self) -> str:
        """`to_json` as one line."""
        return json.dumps(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": dtype_name(self.dtype),
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


def _view(slab_B: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return slab_B[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(*shape)
