"""What a task is: examples in, predictions scored.

Knows how rows become `Example`s and which metrics a kind of task has; knows nothing about tokens, models or
where the rows lie (`records`). A kind is a small subclass of `Task` with one rule: which texts of a row are right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from pregate.config import Run, UsageError
from pregate.tasks.cell_values import identity
from pregate.tasks.metrics import TextMetric
from pregate.tasks.prompts import prompt_fields, prompt_of
from pregate.tasks.records import Chunk, fingerprint, read_columns
from pregate.tasks.sources import OTHER_SPLIT, check_source, key_of

CHUNK_ROWS = 1024
SHOWN = 3
"""Ids that a message names."""


SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn or to score: `target` is what training teaches, `references` what counts as right.
    `messages`: of a conversation, whose last answer is the target."""

    id: str
    source: str
    target: str
    references: tuple[str, ...]
    messages: tuple[Message, ...] = ()

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages; of an example that has none, a question and its answer."""
        return self.messages or (Message(USER, self.source), Message(ASSISTANT, self.target))


@dataclass
class Scores:
    """Percentages: `overall` by metric, and `per_example` in the order of the predictions."""

    overall: dict[str, float]
    per_example: dict[str, list[float]]


class Task:
    """Examples of one split at a time, and the scores of predictions. Build one with `build_task`."""

    metric: ClassVar[type[TextMetric]]
    target_field: ClassVar[str]
    no_reference: str

    def __init__(self, run: Run) -> None:
        self.config = run.task
        self.data_root = run.data.root
        self.name = run.task.name
        self.primary_metric = run.task.primary_metric
        self.metric_names = self.metric.names
        if self.primary_metric not in self.metric_names:
            raise UsageError(
                f"task.primary_metric={self.primary_metric} is no metric of a {run.task.kind} task: "
                f"choose one of {', '.join(self.metric_names)}."
            )
        self.prompt_fields = prompt_fields(run.task.prompt)
        check_source(run.task, run.data.root)

    def references(self, cell: Any) -> tuple[str, ...]:
        """The right texts of a cell, first the one that training teaches; () for none. Raises `CellError`."""
        raise NotImplementedError

    def example(self, chunk: Chunk, row: int, split: str) -> Example:
        """The example of one row, without an id. Raises `UsageError`."""
        source = prompt_of(self.config, self.prompt_fields, chunk, row, split)
        right = chunk.read(row, self.target_field, self.references)
        return Example("", source, right[0] if right else "", right)

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of `split` (all of them for None), in the order of the data.

        Consecutive rows that agree in `task.group_by` become one example with the references of all of them.

        Raises `UsageError` for data that is missing or cannot be read, a missing column, a null in a column
        that the prompt shows, a cell that is no text, an empty split, and examples without a reference.
        """
        return list(self.stream(split, limit))

    def stream(self, split: str, limit: int | None = None) -> Iterator[Example]:
        """What `examples` gives, one at a time. It raises at the end what concerns several of them."""
        if limit is not None and limit < 1:
            raise UsageError(f"{limit} examples of split {split!r} are too few: ask for at least 1, or null for all.")
        count, bad, shown = 0, 0, []
        for example in self._merged(split, limit):
            count += 1
            if not example.references:
                bad += 1
                shown += [" ".join(example.id.split())[:40]] if bad <= SHOWN else []
            yield example
        if not count:
            raise UsageError(f"Split {split!r} of task {self.name!r} is empty: add rows to it, or {OTHER_SPLIT}.")
        if bad:
            raise UsageError(
                f"{bad} of {count} examples in split {split!r} of task {self.name!r} {self.no_reference} "
                f"(id {', '.join(shown)}{', …' if bad > SHOWN else ''}): repair or remove them, choose another split, "
                f"or name the right column with {key_of(self.config, 'columns', self.target_field)}=COLUMN."
            )

    def _merged(self, split: str, limit: int | None) -> Iterator[Example]:
        """At most `limit` examples, rows that belong together as one."""
        found, last, previous = 0, None, None
        # One row beyond the limit shows that the last group is complete.
        chunk_rows = CHUNK_ROWS if limit is None else min(limit + 1, CHUNK_ROWS)
        rows = 0
        for chunk in read_columns(self.config, self.data_root, split, self._columns(), chunk_rows):
            for row in range(len(chunk)):
                key = chunk.read(row, self.config.group_by, lambda cell: cell) if self.config.group_by else None
                grouped = last is not None and key is not None and key == previous
                if last is not None and not grouped:
                    yield last
                    found += 1
                    if found == limit:
                        return
                read = self.example(chunk, row, split)
                if grouped:
                    assert last is not None
                    merged = tuple(dict.fromkeys(last.references + read.references))
                    last = replace(last, references=merged, target=merged[0] if merged else "")
                else:
                    own = chunk.read(row, "id", identity) if chunk.has("id") else None
                    last = replace(read, id=f"{split}-{rows + row}" if own is None else own)
                previous = key
            rows += len(chunk)
        if last is not None:
            yield last

    def fingerprint(self, split: str) -> str:
        """What the content of a split is known by, wherever it lies. Raises `UsageError`."""
        return fingerprint(self.config, self.data_root, split)

    def check(self, tokenizer: Any, splits: Mapping[str, int | None]) -> None:
        """Refuse data that nothing can be learned from: reads so many examples of each split, all of them for None.

        Raises `UsageError`.
        """
        for split, limit in splits.items():
            for _ in self.stream(split, limit):
                pass

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        """Score predictions, in percent; each counts against the best of its references.

        Raises `UsageError` where there is nothing to score, or a prediction has no reference.
        """
        assert len(predictions) == len(references), (len(predictions), len(references))
        if not predictions:
            raise UsageError("There are no predictions to score: evaluate at least one example.")
        empty = sum(not right for right in references)
        if empty:
            raise UsageError(f"{empty} of {len(references)} predictions have no reference to be scored against.")
        result: Any = self.metric(keep_in_memory=True).compute(
            predictions=list(predictions), references=[list(right) for right in references], per_example=True
        )
        return Scores({name: result[name] for name in self.metric_names}, result["per_example"])

    def _columns(self) -> dict[str, str]:
        named = {field: column for field, column in self.config.columns.items() if column}
        needed = [*self.prompt_fields, self.target_field, *(["id"] if "id" in named else [])]
        needed += [self.config.group_by] if self.config.group_by else []
        return {field: named.get(field, field) for field in needed}
