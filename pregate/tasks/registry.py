"""Which class a kind of task has, and how much of its data a run reads.

Add a kind of task here, beside its class. Knows every kind; knows nothing about how any of them works.
"""

from __future__ import annotations

from pregate.config import PRE_TRAINING, Run, TaskKind, UsageError
from pregate.tasks.base import Task
from pregate.tasks.chat import Chat
from pregate.tasks.classification import Classification
from pregate.tasks.language_modelling import LanguageModelling
from pregate.tasks.qa import QuestionAnswering
from pregate.tasks.span_corruption import SpanCorruption
from pregate.tasks.summarization import Summarization
from pregate.tasks.text_stream import TextStream

KINDS: dict[TaskKind, type[Task]] = {
    TaskKind.qa: QuestionAnswering,
    TaskKind.summarization: Summarization,
    TaskKind.classification: Classification,
    TaskKind.chat: Chat,
}
STREAMS: dict[TaskKind, type[TextStream]] = {
    TaskKind.denoising: SpanCorruption,
    TaskKind.language_modelling: LanguageModelling,
}


def splits_read(run: Run) -> dict[str, int | None]:
    """How many examples of each split a training run reads, its validation and evaluation included; None for all."""
    task, validating = run.task, [train.eval_examples for train in (run.train, run.source_train) if train is not None]
    reads: list[tuple[str, int | None]] = [(task.train_split, run.data.max_train_examples)]
    reads += [(task.eval_split, count) for count in validating]
    reads += [(run.eval.split or task.eval_split, run.eval.examples)] if run.then_eval else []
    counts: dict[str, int | None] = {}
    for split, count in reads:
        before = counts.get(split, 0)
        counts[split] = None if before is None or count is None else max(before, count)
    return counts


def build_training_task(run: Run) -> Task | TextStream:
    """What `run` learns from: a task, or text alone. Raises `UsageError` as `build_task` does."""
    return STREAMS[run.task.kind](run) if run.task.kind in PRE_TRAINING else build_task(run)


def build_task(run: Run) -> Task:
    """The task of `run`. Reads no data yet, but raises `UsageError` where there is no source of any, and for a task
    that has no predictions to score."""
    if run.task.kind in PRE_TRAINING:
        raise UsageError(
            f"Task {run.task.name!r} pre-trains and has no predictions to score: choose another task, or pregate.train."
        )
    return KINDS[run.task.kind](run)
