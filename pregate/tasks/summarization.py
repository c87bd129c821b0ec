"""Summarization: ROUGE against one or several summaries.

Knows only its target column; `task.group_by` is what gathers several summaries of one document.
"""

from __future__ import annotations

from typing import Any

from pregate.tasks.base import Task
from pregate.tasks.cell_values import summary
from pregate.tasks.metrics import Rouge


class Summarization(Task):
    """`summary` is one text or its sentences; rows merged by `task.group_by` give several references."""

    metric = Rouge
    target_field = "summary"
    no_reference = "have no summary"

    def references(self, cell: Any) -> tuple[str, ...]:
        return summary(cell)
