"""Question answering, open or closed book: exact match and F1 against any of several answers.

Knows what an answers column may look like; the prompt alone decides whether a context is shown.
"""

from __future__ import annotations

from typing import Any

from pregate.tasks.base import Task


class QuestionAnswering(Task):
    """`answers` is one text or a list of them; training teaches the first."""

    metric_names = ("em", "f1")
    target_field = "answers"
    no_reference = "have no answer"

    def references(self, values: list[Any]) -> list[tuple[str, ...]]:
        return [_texts(value) for value in values]

    def metric(self) -> Any:
        from pregate.tasks.metrics import ExactMatchF1

        return ExactMatchF1(keep_in_memory=True)


def _texts(value: Any) -> tuple[str, ...]:
    """The distinct non-empty texts of a cell, in order."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = [str(item).strip() for item in items if item is not None]
    return tuple(dict.fromkeys(text for text in texts if text))
