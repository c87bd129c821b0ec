"""Whether a model's logits are finite, noted while it generates and asked for when it has.

A NaN is chosen as a token like any number, so tokens tell nothing of it. Knows logits; knows nothing about what is done
with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

WHAT_TO_CHECK = "check its weights for NaN, and in float16 for numbers that only bfloat16 or float32 can hold"


class FiniteLogits:
    """Notes sums of logits, row by row, on their device: a sum is finite if and only if all its numbers are."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def note(self, logits: Tensor) -> None:
        """Of one step or of many, (rows, ..., V). Nothing waits for the device."""
        sums = logits.detach().flatten(1).sum(1, dtype=torch.float64)
        if self._sums and self._sums[-1].shape == sums.shape:
            sums = self._sums.pop() + sums
        self._sums.append(sums)

    def rows_not_finite(self) -> list[int]:
        """Rows with a NaN or an infinity among what was noted since the last call. Waits for the device."""
        found = sorted({row for sums in self._sums for row in (~sums.isfinite()).nonzero().flatten().tolist()})
        self._sums.clear()
        return found


@contextmanager
def finite_logits(model: Any) -> Iterator[FiniteLogits]:
    """While it lasts, the logits of every forward call of `model` are noted."""
    found = FiniteLogits()

    def note(_: Any, __: Any, output: Any) -> None:
        if output.logits is not None:
            found.note(output.logits)

    hook = model.register_forward_hook(note)
    try:
        yield found
    finally:
        hook.remove()
