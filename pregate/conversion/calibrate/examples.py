"""The examples that gates are fitted on and those that they are judged by, as batches of tokens.

Knows a seeded draw, a token budget and which tokens count; knows nothing about gates.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pregate.config import CalibrationConfig, UsageError
from pregate.tasks.base import Example
from pregate.tasks.tokens import Collator


@dataclass
class Batch:
    """Inputs of the models; which tokens count (stack -> mask_BT); and what stacks that are settled give to later
    ones."""

    inputs: dict[str, Tensor]
    counted: dict[str, Tensor]
    settled: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batches:
    """The examples to fit on and those to judge by, in batches of like length."""

    fit: list[Batch]
    held_out: list[Batch]
    num_examples: int

    @classmethod
    def of(cls, examples: Sequence[Example], collate: Collator, settings: CalibrationConfig, seed: int) -> Batches:
        """Of a seeded draw of `examples`, see `CalibrationConfig`. Raises `UsageError` for fewer than two."""
        drawn = _drawn(examples, collate, settings, seed)
        if len(drawn) < 2:
            raise UsageError(f"Calibration needs at least 2 training examples, but there is {len(drawn)}: add more.")
        cut = min(max(1, round(len(drawn) * settings.held_out)), len(drawn) - 1)
        parts = []
        for part in (drawn[cut:], drawn[:cut]):
            part.sort(key=lambda example: len(example.source))
            batches = []
            for start in range(0, len(part), settings.batch_size):
                inputs = collate(part[start : start + settings.batch_size])
                batches.append(Batch(inputs, collate.objective.real_tokens(inputs)))
            parts.append(batches)
        return cls(*parts, num_examples=len(drawn))

    def to(self, device: torch.device) -> None:
        for batch in (*self.fit, *self.held_out):
            batch.inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            batch.counted = {name: tensor.to(device) for name, tensor in batch.counted.items()}

    def num_tokens(self, stack: str) -> tuple[int, int]:
        """How many tokens of `stack` count: to fit on, held out."""
        fit, held = (sum(int(batch.counted[stack].sum()) for batch in part) for part in (self.fit, self.held_out))
        return fit, held


def _drawn(examples: Sequence[Example], collate: Collator, settings: CalibrationConfig, seed: int) -> list[Example]:
    """The first of a seeded order that fit into the token budget, and two whatever their length."""
    order = random.Random(seed).sample(list(examples), min(settings.examples, len(examples)))
    kept: list[Example] = []
    left = settings.tokens
    for start in range(0, len(order), settings.batch_size):
        part = order[start : start + settings.batch_size]
        lengths_B = torch.stack([mask.sum(1) for mask in collate.objective.real_tokens(collate(part)).values()]).sum(0)
        for example, length in zip(part, lengths_B.tolist(), strict=True):
            left -= length
            if left < 0 and len(kept) >= 2:
                return kept
            kept.append(example)
    return kept
