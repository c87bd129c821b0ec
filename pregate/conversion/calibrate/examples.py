"""The examples that gates are fitted on and those that they are judged by, as batches of tokens.

Knows a seeded draw, a token budget and which tokens count; knows nothing about gates. Where rows come from: a task, a
text file, or what the model itself answers.

Letters: B batch, T tokens.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.config import CalibrationConfig, CalibrationData, Run, UsageError
from pregate.models.packing_and_padding import Row
from pregate.tasks.base import Example, Task
from pregate.tasks.own_answers import answers
from pregate.tasks.tokens import Collator

TEXT_CHARACTERS = 32
"""So many for each token that is asked for are read of a text file: windows are drawn from four times what is used,
if a token has eight characters, and from more if it has fewer."""


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
        return cls.of_rows(task_rows(examples, collate, settings, seed), collate, settings)

    @classmethod
    def of_rows(cls, rows: Sequence[Row], collate: Collator, settings: CalibrationConfig) -> Batches:
        """Raises `UsageError` for fewer than two rows."""
        if len(rows) < 2:
            raise UsageError(f"Calibration needs at least 2 training examples, but there is {len(rows)}: add more.")
        cut = min(max(1, round(len(rows) * settings.held_out)), len(rows) - 1)
        parts = []
        for part in (rows[cut:], rows[:cut]):
            by_length = sorted(part, key=lambda row: row.num_tokens)
            batches = []
            for start in range(0, len(part), settings.batch_size):
                inputs = _inputs(by_length[start : start + settings.batch_size], collate)
                batches.append(Batch(inputs, collate.objective.real_tokens(inputs)))
            parts.append(batches)
        return cls(*parts, num_examples=len(rows))

    def to(self, device: torch.device) -> None:
        for batch in (*self.fit, *self.held_out):
            batch.inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            batch.counted = {name: tensor.to(device) for name, tensor in batch.counted.items()}

    def num_tokens(self, stack: str) -> tuple[int, int]:
        """How many tokens of `stack` count: to fit on, held out."""
        fit, held = (sum(int(batch.counted[stack].sum()) for batch in part) for part in (self.fit, self.held_out))
        return fit, held


def rows_of(run: Run, task: Task | None, collate: Collator) -> list[Row]:
    """What `calibration.data` says; of the model's own answers the prompts, as many as may be asked for. `task`: None
    for a text."""
    settings = run.calibration
    if settings.text is not None:
        return text_rows(Path(settings.text).expanduser(), collate, settings, run.seed)
    assert task is not None
    examples = task.examples(run.task.train_split, run.data.max_train_examples)
    if settings.data is CalibrationData.generations:
        return collate.rows(drawn(examples, settings, run.seed))
    return task_rows(examples, collate, settings, run.seed)


def task_rows(examples: Sequence[Example], collate: Collator, settings: CalibrationConfig, seed: int) -> list[Row]:
    """A seeded draw of examples, up to the token budget."""
    chunks = _chunks(drawn(examples, settings, seed), settings.batch_size)
    return within_budget((collate.rows(part) for part in chunks), collate, settings)


def text_rows(file: Path, collate: Collator, settings: CalibrationConfig, seed: int) -> list[Row]:
    """A seeded draw of windows of a text: `max_source_tokens` of a window are its source, and `max_target_tokens` its
    target. Raises `UsageError` for a file that cannot be read, or has fewer than two windows."""
    try:
        with file.open(encoding="utf-8") as opened:
            text = opened.read(TEXT_CHARACTERS * settings.tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration.text={file} cannot be read as UTF-8 text ({error}): name another.") from error
    ids = collate.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    closed = [collate.tokenizer.eos_token_id] if collate.objective.closes_sources else []
    first = collate.max_source_tokens - len(closed)
    window = first + collate.max_target_tokens
    windows = [ids[start : start + window] for start in range(0, len(ids) - window + 1, window)]
    if len(windows) < 2:
        raise UsageError(
            f"calibration.text={file} has {len(ids)} tokens, too few for 2 examples of {window}: name a longer text, "
            "or lower task.max_source_tokens or task.max_target_tokens."
        )
    rows = [Row(array("i", ids[:first] + closed), array("i", ids[first:])) for ids in windows]
    return within_budget(_chunks(drawn(rows, settings, seed), settings.batch_size), collate, settings)


def answered_rows(
    prompts: Sequence[Row], model: Any, generate: Callable[..., Tensor], collate: Collator, settings: CalibrationConfig
) -> Iterator[list[Row]]:
    """The sources of `prompts` with what `model` answers, greedily, a batch at a time. `generate`: the model's, or that
    of the engine that serves it."""
    for part in _chunks(prompts, settings.batch_size):
        found = answers(part, model, generate, collate)
        yield [Row(row.source, answer) for row, answer in zip(part, found, strict=True)]


def within_budget(chunks: Iterator[Sequence[Row]], collate: Collator, settings: CalibrationConfig) -> list[Row]:
    """The first rows that fit into the token budget, and two whatever their length. No more chunks are asked for."""
    kept: list[Row] = []
    left = settings.tokens
    for part in chunks:
        masks = collate.objective.real_tokens(_inputs(part, collate)).values()
        lengths_B = torch.stack([mask.sum(1) for mask in masks]).sum(0)
        for row, length in zip(part, lengths_B.tolist(), strict=True):
            left -= length
            if left < 0 and len(kept) >= 2:
                return kept
            kept.append(row)
    return kept


def drawn(items: Sequence[Any], settings: CalibrationConfig, seed: int) -> list[Any]:
    """In a seeded order, at most `settings.examples`."""
    return random.Random(seed).sample(list(items), min(settings.examples, len(items)))


def _inputs(rows: Sequence[Row], collate: Collator) -> dict[str, Tensor]:
    return collate.objective.batch(rows, collate.padding)


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
