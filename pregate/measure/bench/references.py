"""What the whole model decodes and with which logits: what every other row is compared with.

Kept in files, so that a resumed run need not ask the whole model again. Knows tokens and logits; knows nothing about
who gave them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pregate.config import SlabDtype
from pregate.measure.bench.grid import RESIDENT, RowSpec


@dataclass(frozen=True)
class Reference:
    """The tokens of the whole model, request by request (R, B, T), and its logits for the first ones (B, t, V)."""

    tokens: Tensor
    logits: Tensor | None = None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in vars(self).items() if tensor is not None}, scratch)
        scratch.replace(path)

    @classmethod
    def load(cls, path: Path) -> Reference | None:
        try:
            tensors = load_file(path)
            return cls(tensors["tokens"], tensors.get("logits"))
        except (OSError, KeyError, SafetensorError):
            return None

    def equal_until(self, number: int, tokens_BT: Tensor, new_tokens: int) -> int | None:
        """How many new tokens of request `number` are equal in all rows before the first that is not; None if all are
        that were decoded. `new_tokens`: at the end of `tokens_BT`, behind a start token or the prompt."""
        differs_T = (self.tokens[number, :, : tokens_BT.shape[1]] != tokens_BT).any(0)
        if not differs_T.any():
            return None
        return max(int(differs_T.int().argmax()) - (tokens_BT.shape[1] - new_tokens), 0)


@dataclass(frozen=True)
class References:
    """What the whole model decodes, by load and weights, kept in `folder`. `fingerprint`: of the model; after it has
    changed, what is kept is of another."""

    folder: Path
    repeats: int
    new_tokens: int
    fingerprint: str

    def path(self, spec: RowSpec, weights: str) -> Path:
        said = repr((resident_of(spec, self.new_tokens), str(weights), self.repeats, self.fingerprint))
        return self.folder / f"reference-{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"

    def get(self, spec: RowSpec, weights: str = SlabDtype.source) -> Reference | None:
        return Reference.load(self.path(spec, weights))


def resident_of(spec: RowSpec, new_tokens: int) -> RowSpec:
    """The row of the whole model under the load of `spec`."""
    plain = dict.fromkeys(("tier", "slab_dtype", "cache", "budget", "host_budget", "drive", "prefill_chunk"))
    return replace(spec, policy=RESIDENT, new_tokens=new_tokens, **plain)
