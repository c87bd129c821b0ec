"""What a task is: examples in, predictions scored.

Knows how rows become `Example`s and which metrics a kind of task has; knows nothing about tokens, models or
where the rows lie (`records`). A kind is a small subclass of `Task` with one rule: which texts of a row are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pregate.config import Run, TaskKind, UsageError
from pregate.tasks.records import check_source, read_columns
from pregate.tasks.text import prompt_fields

if TYPE_CHECKING:
    from pregate.tasks.span_corruption import SpanCorruption

CHUNK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn or to score: `target` is what training teaches, `references` what counts as right."""

    id: str
    source: str
    target: str
    references: tuple[str, ...]


@dataclass
class Scores:
    """Percentages: `overall` by metric, and `per_example` in the order of the predictions."""

    overall: dict[str, float]
    per_example: dict[str, list[float]]


class Task:
    """Examples of one split at a time, and the scores of predictions. Build one with `build_task`."""

    metric_names: ClassVar[tuple[str, ...]]
    target_field: ClassVar[str]
    no_reference: str

    def __init__(self, run: Run) -> None:
        self.config = run.task
        self.data_root = run.data.root
        self.name = run.task.name
        self.primary_metric = run.task.primary_metric
        if self.primary_metric not in self.metric_names:
            raise UsageError(
                f"task.primary_metric={self.primary_metric} is no metric of a {run.task.kind} task: "
                f"choose one of {', '.join(self.metric_names)}."
            )
        self.prompt_fields = prompt_fields(run.task.prompt)
        check_source(run.task, run.data.root)

    def references(self, values: list[Any]) -> list[tuple[str, ...]]:
        """The right texts of each row, first the one that training teaches; () where a row has none."""
        raise NotImplementedError

    def metric(self) -> Any:
        """The `evaluate.Metric` of this kind of task."""
        raise NotImplementedError

    def trivial(self, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, list[str]]:
        """Predictions for `examples` that need no model, by name; they may look at `train` but at no reference."""
        raise NotImplementedError

    def trivial_scores(self, split: str, limit: int | None = None) -> dict[str, dict[str, float]]:
        """The metrics of each trivial prediction on the first `limit` examples of `split`, in percent."""
        examples = self.examples(split, limit)
        predictions = self.trivial(self.examples(self.config.train_split), examples)
        right = [example.references for example in examples]
        return {name: self.score(texts, right).overall for name, texts in predictions.items()}

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of `split` (all of them for None), in the order of the data.

        Consecutive rows that agree in `task.group_by` become one example with the references of all of them.

        Raises `UsageError` for data that is missing or cannot be read, a missing column, a null in a column
        that the prompt shows, an empty split, and examples without a reference.
        """
        if limit is not None and limit < 1:
            raise UsageError(f"{limit} examples of split {split!r} are too few: ask for at least 1, or null for all.")
        found: list[Example] = []
        previous: Any = None
        # One row beyond the limit shows that the last group is complete.
        chunk_rows = CHUNK_ROWS if limit is None else min(limit + 1, CHUNK_ROWS)
        rows = 0
        for chunk in read_columns(self.config, self.data_root, split, self._columns(), chunk_rows):
            references = self.references(chunk[self.target_field])
            sources = self._sources(chunk, split)
            ids = chunk.get("id") or [f"{split}-{rows + i}" for i in range(len(sources))]
            keys = chunk[self.config.group_by] if self.config.group_by else [None] * len(sources)
            rows += len(sources)
            for identity, source, right, key in zip(ids, sources, references, keys, strict=True):
                if found and key is not None and key == previous:
                    merged = tuple(dict.fromkeys(found[-1].references + right))
                    found[-1] = replace(found[-1], references=merged, target=merged[0] if merged else "")
                elif len(found) == limit:
                    return self._checked(found, split)
                else:
                    found.append(Example(str(identity), source, right[0] if right else "", right))
                previous = key
        return self._checked(found, split)

    def check(self, tokenizer: Any, splits: Sequence[str]) -> None:
        """Refuse data that nothing can be learned from, by the first example of each split. Raises `UsageError`."""
        for split in splits:
            self.examples(split, limit=1)

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
        result = self.metric().compute(
            predictions=list(predictions), references=[list(right) for right in references], per_example=True
        )
        per_example = result.pop("per_example")
        return Scores(result, per_example)

    def _columns(self) -> dict[str, str]:
        named = {field: column for field, column in self.config.columns.items() if column}
        needed = [*self.prompt_fields, self.target_field, *(["id"] if "id" in named else [])]
        needed += [self.config.group_by] if self.config.group_by else []
        return {field: named.get(field, field) for field in needed}

    def _sources(self, chunk: dict[str, list[Any]], split: str) -> list[str]:
        shown = {field: chunk[field] for field in self.prompt_fields}
        for field, values in shown.items():
            if None in values:
                raise UsageError(
                    f"Split {split!r} of task {self.name!r} has rows without {field!r}, which task.prompt shows: "
                    f"fill or remove them, or name another column with task.columns.{field}=COLUMN."
                )
        prompt = self.config.prompt
        return [prompt.format(**dict(zip(shown, row, strict=True))) for row in zip(*shown.values(), strict=True)]

    def _checked(self, examples: list[Example], split: str) -> list[Example]:
        if not examples:
            raise UsageError(
                f"Split {split!r} of task {self.name!r} is empty: add rows to it, or choose another split with "
                "task.train_split or task.eval_split."
            )
        bad = [example.id for example in examples if not example.references]
        if bad:
            shown = ", ".join(bad[:3]) + (", …" if len(bad) > 3 else "")
            raise UsageError(
                f"{len(bad)} of {len(examples)} examples in split {split!r} of task {self.name!r} {self.no_reference} "
                f"(id {shown}): repair or remove them, choose another split, or name the right column with "
                f"task.columns.{self.target_field}=COLUMN."
            )
        return examples


def build_training_task(run: Run) -> Task | SpanCorruption:
    """What `run` learns from: a task, or text alone. Raises `UsageError` as `build_task` does."""
    from pregate.tasks.span_corruption import SpanCorruption

    return SpanCorruption(run) if run.task.kind is TaskKind.denoising else build_task(run)


def build_task(run: Run) -> Task:
    """The task of `run`. Reads no data yet, but raises `UsageError` where there is no source of any, and for a task
    that has no predictions to score."""
    from pregate.tasks.classification import Classification
    from pregate.tasks.qa import QuestionAnswering
    from pregate.tasks.summarization import Summarization

    if run.task.kind is TaskKind.denoising:
        raise UsageError(
            f"Task {run.task.name!r} pre-trains and has no predictions to score: choose another task, or pregate.train."
        )
    kinds: dict[TaskKind, type[Task]] = {
        TaskKind.qa: QuestionAnswering,
        TaskKind.summarization: Summarization,
        TaskKind.classification: Classification,
    }
    return kinds[run.task.kind](run)
