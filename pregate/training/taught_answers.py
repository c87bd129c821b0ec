"""Training rows whose targets are what the teacher answers to their prompts (Kim and Rush 2016, "Sequence-level
knowledge distillation").

The answers are generated before the first step, for the rows that the steps will use, and kept in the run's directory,
so that a resumed run learns from the same ones. Knows rows, a file and `generate`; knows nothing about losses.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pregate.models.loading import open_model
from pregate.models.objectives import Row
from pregate.system.console import say
from pregate.system.durable import append_text, make_directory, to_jsonable, write_text
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
        self._rows, self._prompt_tokens = rows._rows, rows._prompt_tokens
        self.taught = taught

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        found = zip(indices, super().__getitems__(indices), strict=True)
        return [row._replace(target=self.taught.get(index, row.target)) for index, row in found]


def teacher_weights(teacher: str) -> dict[str, Any]:
    """What the files of a teacher are known by."""
    return to_jsonable(open_model(teacher).identity())


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


def answered_by(
    teacher: Any,
    rows: TokenRows,
    batches: Sequence[list[int]],
    collate: Collator,
    file: Path,
    made_from: dict[str, Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> AnsweredRows:
    """`rows` with the answers of `teacher` to those of `batches`. `file` keeps them; what it holds of other answers
    than those `made_from` the same teacher and data is replaced. The main process generates, the others wait."""
    made_from = json.loads(json.dumps(made_from))  # as it is read back
    main_only(lambda: _complete(teacher, rows, batches, collate, file, made_from, autocast), "asking the teacher")
    kept = _kept(file, made_from)
    taught = {index: row for batch in batches for index, row in zip(batch, kept[tuple(batch)], strict=True)}
    return AnsweredRows(rows, taught)


@torch.no_grad()
def _complete(
    teacher: Any,
    rows: TokenRows,
    batches: Sequence[list[int]],
    collate: Collator,
    file: Path,
    made_from: dict[str, Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Bring the file to hold an answer to every row of `batches`."""
    kept = _kept(file, made_from)
    missing = [batch for batch in batches if tuple(batch) not in kept]
    if not missing:
        return
    make_directory(file.parent)
    write_text(file, "".join([_line(made_from), *(_batch_line(batch, kept[batch]) for batch in kept)]))
    say(f"the teacher answers {sum(map(len, missing))} training examples.")
    begun = told = time.perf_counter()
    for number, batch in enumerate(missing, 1):
        with autocast():
            found = answers(rows.__getitems__(batch), teacher, teacher.generate, collate)
        append_text(file, _batch_line(batch, found))
        now = time.perf_counter()
        if now - told > TELL_EVERY_S:
            told = now
            left = (now - begun) / number * (len(missing) - number)
            say(f"{number} of {len(missing)} batches are answered; about {left:.0f} s left.")


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _batch_line(batch: Sequence[int], found: Sequence[array[int]]) -> str:
    return _line({"rows": list(batch), "answers": [ids.tolist() for ids in found]})


def _kept(file: Path, made_from: dict[str, Any]) -> dict[tuple[int, ...], list[array[int]]]:
    """The batches that `file` holds; none if it is missing or was made from something else. A torn last line is left
    out."""
    if not file.is_file():
        return {}
    found: dict[tuple[int, ...], list[array[int]]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        try:
            value = json.loads(line)
        except ValueError:
            break
        if number == 0:
            if value != made_from:
                return {}
            continue
        found[tuple(value["rows"])] = [array("i", ids) for ids in value["answers"]]
    return found
