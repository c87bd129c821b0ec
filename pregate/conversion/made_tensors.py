"""Tensors that a conversion makes, because no source has them: random ones, the same whenever they are asked for.

Knows names, shapes and numbers; knows nothing about files or models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pregate.models.nonlinear import up_std


@dataclass(frozen=True)
class MadeTensor:
    """A tensor of a gate's `Nonlinear` as it starts: `up` (H, D) random, `down` (E, H) zero."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def draw(self) -> Tensor:
        if self.name.endswith(".down"):
            return torch.zeros(self.shape, dtype=self.dtype)
        return drawn(self.name, self.shape, self.dtype, up_std(self.shape[1]), self.seed)


def drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype, std: float, seed: int) -> Tensor:
    """Normal numbers that depend on `seed` and `name` alone, not on the order of calls."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return (torch.randn(shape, generator=generator) * std).to(dtype)
