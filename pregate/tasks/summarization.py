"""Summarization: ROUGE against one or several summaries.

Knows only its target column; `task.group_by` is what gathers several summaries of one document.
"""

from __future__ import annotations

from typing import Any

from pregate.tasks.base import Task


class Summarization(Task):
    """`summary` is one text; rows merged by `task.group_by` give several references."""

    metric_names = ("rouge1", "rouge2", "rougeL")
    target_field = "summary"
    no_reference = "have no summary"

    def references(self, values: list[Any]) -> list[tuple[str, ...]]:
        texts = ["" if value is None else str(value).strip() for value in values]
        return [(text,) if text else () for text in texts]

    def metric(self) -> Any:
        from pregate.tasks.metrics import Rouge

        return Rouge(keep_in_memory=True)
