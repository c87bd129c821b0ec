"""A checkpoint that is nowhere on disk: any geometry, random weights made the moment they are read.

For measuring geometries whose trained weights are not at hand. Reads like a `SourceCheckpoint`, so that conversion,
packing and loading treat it as one. The same seed and name give the same tensor, whatever was read before.

Weights are runs of one pool of normal numbers, each run starting elsewhere: drawing 26 billion numbers for
Switch-Large-128 would take longer than measuring it. Two experts share no offset, so their outputs are unrelated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.models.checkpoint import SourceCheckpoint, TensorInfo
from pregate.models.experts import ExpertSpec
from pregate.models.family import Family, dtype_name, family_of
from pregate.models.loading import parameter_shapes
from pregate.models.pregated_models import without_experts
from pregate.models.pregating import PreGating

DEFAULT_VOCABULARY = 32128
"""Of the T5 tokenizer; a tokenizer or a geometry may bring another."""
POOL = 3_999_971
"""Numbers in the pool; a prime, so that runs which wrap around do not line up with matrix rows."""


@dataclass(frozen=True)
class SyntheticCheckpoint(SourceCheckpoint):
    """`config` says what the model is; `seed` which one of its kind. Has no directory and no files."""

    seed: int = 0

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._draw(name) for name in names}

    def will_read(self, names: Iterable[str]) -> None:
        """Nothing is to be read."""

    def identity(self) -> dict[str, Any]:
        described = repr((sorted(self.config.items()), sorted(str(t.dtype) for t in self.tensors.values())))
        return {"synthetic": hashlib.sha256(described.encode()).hexdigest()[:16], "seed": self.seed}

    def settled(self) -> bool:
        return True

    def _draw(self, name: str) -> Tensor:
        info = self.tensors[name]
        scale = family_of(self.config).random_scale(name, self.config)
        if scale is None:
            return torch.ones(info.shape, dtype=info.dtype)
        pool = _pool(self.seed, info.dtype)
        size = torch.Size(info.shape).numel()
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        offset = int.from_bytes(digest[:6], "little") % POOL
        values = torch.empty(size, dtype=info.dtype)
        done = 0
        while done < size:
            run = min(size - done, POOL - offset)
            torch.mul(pool[offset : offset + run], scale, out=values[done : done + run])
            done, offset = done + run, 0
        return values.view(info.shape)


@lru_cache(maxsize=2)
def _pool(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).to(dtype)


def synthetic_checkpoint(
    family: Family, geometry: Mapping[str, Any], gating: PreGating, dtype: torch.dtype, seed: int = 0
) -> SyntheticCheckpoint:
    """A pre-gated (or, with lookahead 0, conventional) model of `geometry`, whose keys are those of `config.json`.
    Raises `UsageError` for a geometry that describes no model."""
    described = family.from_scratch(geometry, DEFAULT_VOCABULARY) | {
        "model_type": family.model_type,
        "pregate": gating.to_dict(),
        "dtype": dtype_name(dtype),
    }
    config = family.config(described)
    own = family.experts(config)
    # in the layout of the most tensors, as most checkpoints are: to draw one expert must not mean to draw all
    finest = max((replace(own, layouts=(layout,)) for layout in own.layouts), key=_tensors_of_a_block)
    shapes = parameter_shapes(family, config, finest)
    with without_experts(), torch.device("meta"):
        tied = family.model_class(config).all_tied_weights_keys if config.tie_word_embeddings else {}
    tensors = {name: TensorInfo(Path(), shape, dtype) for name, shape in shapes.items() if name not in tied}
    return SyntheticCheckpoint(Path(), config.to_dict(), (), tensors, seed=seed)


def _tensors_of_a_block(experts: ExpertSpec) -> int:
    return next((len(experts.tensors_of(stack, 0)) for stack, layers in experts.layers.items() if layers), 0)
