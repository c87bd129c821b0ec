"""Question answering, open or closed book: exact match and F1 against any of several answers.

The prompt alone decides whether a context is shown.
"""

from __future__ import annotations

from typing import Any

from pregate.tasks.base import Task
from pregate.tasks.cell_values import answers
from pregate.tasks.metrics import ExactMatchF1


class QuestionAnswering(Task):
    """`answers` is one text or a list of them; training teaches the first."""

    metric = ExactMatchF1
    target_field = "answers"
    no_reference = "have no answer"

    def references(self, cell: Any) -> tuple[str, ...]:
        return answers(cell)
