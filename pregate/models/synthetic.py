"""A checkpoint that is nowhere on disk: any geometry, random weights made the moment they are read.

For measuring geometries whose trained weights are not at hand. Reads like a `SourceCheckpoint`, so that conversion,
packing and loading treat it as one. The same seed and name give the same tensor, whatever was read before.

Weights are runs of one pool of normal numbers, each run starting elsewhere: drawing 26 billion numbers for
Switch-Large-128 would take longer than measuring it. Two experts share no offset, so their outputs are unrelated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.models.checkpoint import SourceCheckpoint, TensorInfo
from pregate.models.families.switch import PreGatedSwitchTransformersForConditionalGeneration
from pregate.models.families.switch_layers import (
    PreGatedSwitchTransformersConfig,
    switch_expert_family,
    without_experts,
)

POOL = 3_999_971
"""Numbers in the pool; a prime, so that runs which wrap around do not line up with matrix rows."""


@dataclass(frozen=True)
class SyntheticCheckpoint(SourceCheckpoint):
    """`config` says what the model is; `seed` which one of its kind. Has no directory and no files."""

    seed: int = 0

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._draw(name) for name in names}

    def identity(self) -> dict[str, Any]:
        described = repr((sorted(self.config.items()), sorted(str(t.dtype) for t in self.tensors.values())))
        return {"synthetic": hashlib.sha256(described.encode()).hexdigest()[:16], "seed": self.seed}

    def settled(self) -> bool:
        return True

    def _draw(self, name: str) -> Tensor:
        info = self.tensors[name]
        if "layer_norm" in name:
            return torch.ones(info.shape, dtype=info.dtype)
        pool = _pool(self.seed, info.dtype)
        size = torch.Size(info.shape).numel()
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        offset = int.from_bytes(digest[:6], "little") % POOL
        values = torch.empty(size, dtype=info.dtype)
        done = 0
        while done < size:
            run = min(size - done, POOL - offset)
            values[done : done + run] = pool[offset : offset + run]
            done, offset = done + run, 0
        return values.mul_(_scale(name, self.config)).view(info.shape)


@lru_cache(maxsize=2)
def _pool(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).to(dtype)


BRANCH = 0.1
"""Share of upstream's scale for what attention and feed-forward add to the residual stream. With all of it the parts
that every token has in common outgrow the token's own embedding, and deep routers send all tokens to a few experts;
trained ones, with their balance loss, do not."""


def _scale(name: str, config: dict[str, Any]) -> float:
    """Standard deviations that keep activations near unit variance, as upstream's initialisation does."""
    if name.startswith("shared.") or "embed_tokens" in name:
        return 1.0
    if ".q." in name:
        return float((config["d_model"] * config["d_kv"]) ** -0.5)
    if ".o." in name:
        return BRANCH * float((config["num_heads"] * config["d_kv"]) ** -0.5)
    if ".wo." in name:
        return BRANCH * float(config["d_ff"] ** -0.5)
    return float(config["d_model"] ** -0.5)


def synthetic_checkpoint(
    geometry: dict[str, Any], pregate: dict[str, Any], dtype: torch.dtype, seed: int = 0
) -> SyntheticCheckpoint:
    """A pre-gated (or, with lookahead 0, conventional) Switch model of `geometry`, whose keys are those of
    `config.json`. Raises `UsageError` for a geometry that describes no model."""
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    described = {**special, **geometry, "pregate": pregate, "dtype": str(dtype).removeprefix("torch.")}
    config = PreGatedSwitchTransformersConfig.of_checkpoint(described)
    family = switch_expert_family(config)
    shapes = {
        name: shape
        for key in family.keys()  # noqa: SIM118 - not a mapping
        for name, shape in zip(family.tensor_names(key), family.matrices.values(), strict=True)
    }
    with without_experts(), torch.device("meta"):
        model = PreGatedSwitchTransformersForConditionalGeneration(config)
    tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
    shapes |= {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    tensors = {name: TensorInfo(Path(), shape, dtype) for name, shape in shapes.items()}
    return SyntheticCheckpoint(Path(), config.to_dict(), (), tensors, seed=seed)
