"""Training rows whose targets are what the teacher answers to their prompts (Kim and Rush 2016, "Sequence-level
knowledge distillation").

The answers are generated before the first step, for the rows that the steps will use, and kept in the run's directory,
so that a resumed run learns from the same ones. Knows rows, a file and `generate`; knows nothing about losses.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pregate.models.packing_and_padding import Row
from pregate.system.console import say
from pregate.system.durable import append_line, make_directory, read_lines, write_lines
from pregate.system.process_group import main_only
from pregate.tasks.own_answers import answers
from pregate.tasks.token_cache import TokenRows
from pregate.tasks.tokens import Collator

FILE = "teacher_answers.jsonl"
WINDOW_BATCHES = 16
"""Rows are sorted by length within so many batches."""
TELL_EVERY_S = 60.0


class AnsweredRows(TokenRows):
    """`rows`, of which those that are keys of `taught` have its values as their targets."""

    def __init__(self, rows: TokenRows, taught: dict[int, array[int]]) -> None:
        super().__init__(rows.directory)
        self.taught = taught

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        found = zip(indices, super().__getitems__(indices), strict=True)
        return [row._replace(target=self.taught.get(index, row.target)) for index, row in found]


def batches_to_answer(used: Iterable[int], lengths: Callable[[list[int]], Sequence[int]], size: int) -> list[list[int]]:
    """The rows that the steps use, each once, in batches of like length.

    A run with more steps has the same batches, and more behind them, but for the last few.
    """
    once, found = iter(dict.fromkeys(used)), []
    while window := list(islice(once, WINDOW_BATCHES * size)):
        length = dict(zip(window, lengths(window), strict=True))
        window.sort(key=length.__getitem__)
        found += [window[start : start + size] for start in range(0, len(window), size)]
    return found


@dataclass(frozen=True)
class TeacherAnswers:
    """What `teacher` answers to prompts of `rows`, kept in `file`. Answers there that were not made from `made_from`,
    which is plain JSON, are replaced."""

    teacher: Any
    rows: TokenRows
    collate: Collator
    autocast: Callable[[], AbstractContextManager[Any]]
    file: Path
    made_from: dict[str, Any]

    def to(self, batches: Sequence[list[int]]) -> AnsweredRows:
        """The rows with the answers to those of `batches`. The main process generates, the others wait."""
        main_only(lambda: self._complete(batches), "asking the teacher")
        kept = self._kept()
        taught = {index: row for batch in batches for index, row in zip(batch, kept[tuple(batch)], strict=True)}
        return AnsweredRows(self.rows, taught)

    @torch.no_grad()
    def _complete(self, batches: Sequence[list[int]]) -> None:
        """Bring the file to hold an answer to every row of `batches`."""
        kept = self._kept()
        missing = [batch for batch in batches if tuple(batch) not in kept]
        if not missing:
            return
        make_directory(self.file.parent)
        write_lines(self.file, [self.made_from, *(_answered(*answered) for answered in kept.items())])
        say(f"the teacher answers {sum(map(len, missing))} training examples.")
        begun = told = time.perf_counter()
        for number, batch in enumerate(missing, 1):
            with self.autocast():
                found = answers(self.rows.__getitems__(batch), self.teacher, self.teacher.generate, self.collate)
            append_line(self.file, _answered(batch, found))
            now = time.perf_counter()
            if now - told > TELL_EVERY_S:
                told = now
                left = (now - begun) / number * (len(missing) - number)
                say(f"{number} of {len(missing)} batches are answered; about {left:.0f} s left.")

    def _kept(self) -> dict[tuple[int, ...], list[array[int]]]:
        """The batches that the file holds; none if it is missing or was made from something else."""
        made_from, *answered = read_lines(self.file) or [None]
        if made_from != self.made_from:
            return {}
        return {tuple(value["rows"]): [array("i", ids) for ids in value["answers"]] for value in answered}


def _answered(batch: Sequence[int], found: Sequence[array[int]]) -> dict[str, Any]:
    return {"rows": list(batch), "answers": [ids.tolist() for ids in found]}
