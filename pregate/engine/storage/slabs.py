"""What a slab is: all matrices of one expert as one contiguous run of bytes, a multiple of 4 KiB.

A slab holds the matrices as they are, or weight-only quantised to int8 or fp8 with a scale for each row, a power of
two, stored beside them as float32. Biases stay as they are. Knows tensors and bytes; knows nothing about files, slots
or models' arithmetic.

Letters: R rows and C columns of a matrix, B bytes of a slab.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pregate.config import SlabDtype
from pregate.engine.storage.aligned_memory import PAGE, round_up
from pregate.engine.storage.quantisation import STORED, dequantise, quantise, widen
from pregate.models.expert_math import Factor, RowScaled
from pregate.models.experts import ExpertSpec
from pregate.models.family import dtype_name

LINE = 64
"""Matrices start on cache lines, where BLAS reads fastest."""


@dataclass(frozen=True)
class MatrixPlace:
    """Where one matrix lies in a slab: offsets in bytes; `scale_offset` is None where it is stored as it is. `joined`:
    it continues the matrix before it, without a gap."""

    name: str
    shape: tuple[int, ...]
    offset: int
    scale_offset: int | None = None
    joined: bool = False

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


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
        for names in family.products:
            # a bias has few numbers, and every one of them counts
            quantised = stored in STORED and all(len(family.matrices[name]) > 1 for name in names)
            itemsize = STORED.get(stored, dtype).itemsize if quantised else dtype.itemsize
            run = []
            for name in names:
                run.append(MatrixPlace(name, tuple(family.matrices[name]), offset, joined=bool(run)))
                offset += run[-1].numel * itemsize
            offset = round_up(offset, LINE)
            if quantised:
                for number, place in enumerate(run):
                    run[number] = replace(place, scale_offset=offset)
                    offset += place.shape[0] * torch.float32.itemsize
                offset = round_up(offset, LINE)
            matrices += run
        return cls(dtype, stored, tuple(matrices), round_up(offset, PAGE))

    @cached_property
    def products(self) -> tuple[MatrixPlace, ...]:
        """What an expert multiplies with: the matrices, those that lie together as one."""
        found: list[MatrixPlace] = []
        for place in self.matrices:
            if place.joined:
                rows = found[-1].shape[0] + place.shape[0]
                place = replace(found.pop(), shape=(rows, *place.shape[1:]))
            found.append(place)
        return tuple(found)

    @property
    def is_quantised(self) -> bool:
        return self.stored is not SlabDtype.source

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one expert's matrices in the compute dtype."""
        return sum(place.numel for place in self.matrices) * self.dtype.itemsize

    def views(self, slab_B: Tensor, places: Sequence[MatrixPlace] | None = None) -> list[Tensor]:
        """The stored matrices of a slab (uint8), or `places` of it, as tensors that share its memory."""
        return [
            _view(slab_B, place.offset, place.shape, self.dtype if place.scale_offset is None else STORED[self.stored])
            for place in places or self.matrices
        ]

    def scales(self, slab_B: Tensor, places: Sequence[MatrixPlace] | None = None) -> list[Tensor | None]:
        """The scales (R, 1) of each matrix, or of `places`, sharing the slab's memory; None for one that is stored as
        it is."""
        return [
            None
            if place.scale_offset is None
            else _view(slab_B, place.scale_offset, (place.shape[0], 1), torch.float32)
            for place in places or self.matrices
        ]

    def encode(self, matrices: Sequence[Tensor], slab_B: Tensor) -> None:
        """Write `matrices` into a CPU slab, quantised if that is what it stores; padding is zeroed."""
        slab_B.zero_()
        for view, scale, matrix in zip(self.views(slab_B), self.scales(slab_B), matrices, strict=True):
            if scale is None:
                view.copy_(matrix)
            else:
                quantise(matrix, view, scale)

    def decode(self, slab_B: Tensor) -> list[Tensor]:
        """The matrices in the compute dtype: views of the slab, or new tensors with the dequantised numbers."""
        stored = self.views(slab_B)
        if not self.is_quantised:
            return stored
        into = self._empty(self.matrices, slab_B.device)
        for matrix, scale, out in zip(stored, self.scales(slab_B), into, strict=True):
            if scale is None:
                out.copy_(matrix)
            else:
                dequantise(matrix, scale, out)
        return into

    def scratch(self, device: torch.device) -> list[Tensor]:
        """Room for one expert's `products` in the compute dtype; none where slabs hold all of them as they are."""
        return self._empty(self.products if self.is_quantised else (), device)

    def _empty(self, places: Sequence[MatrixPlace], device: torch.device) -> list[Tensor]:
        return [torch.empty(place.shape, dtype=self.dtype, device=device) for place in places]

    def factors(self, slab_B: Tensor, scratch: Sequence[Tensor]) -> list[Factor]:
        """`products` as an expert takes them, valid until `scratch` is used again.

        The same products as with what `decode` gives, bit for bit, with the scales applied behind them, where there is
        much less to multiply; but in float16, where a product without its scale could overflow.
        """
        stored = self.views(slab_B, self.products)
        if not self.is_quantised:
            return list(stored)
        factors: list[Factor] = []
        for matrix, scale_R1, wide in zip(stored, self.scales(slab_B, self.products), scratch, strict=True):
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
            "matrices": [asdict(place) | {"shape": list(place.shape)} for place in self.matrices],
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> SlabLayout:
        """Raises `KeyError`, `TypeError`, `ValueError` or `AttributeError` for what `to_json` did not write."""
        matrices = tuple(
            MatrixPlace(m["name"], tuple(m["shape"]), m["offset"], m["scale_offset"], m.get("joined", False))
            for m in raw["matrices"]
        )
        return cls(getattr(torch, raw["dtype"]), SlabDtype(raw["stored"]), matrices, raw["slab_bytes"])


def _view(slab_B: Tensor, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return slab_B[offset : offset + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(*shape)
