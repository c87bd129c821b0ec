"""Summarization: ROUGE against one or several summaries.

Knows only its target column; `task.group_by` is what gathers several summaries of one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pregate.tasks.base import Example, Task
from pregate.tasks.cells import summary
from pregate.tasks.metrics import Rouge
from pregate.tasks.prompts import prompt_values
from pregate.tasks.trivial import lead, medoid


class Summarization(Task):
    """`summary` is one text or its sentences; rows merged by `task.group_by` give several references."""

    metric_names = ("rouge1", "rouge2", "rougeL")
    target_field = "summary"
    no_reference = "have no summary"

    def references(self, cell: Any) -> tuple[str, ...]:
        return summary(cell)

    def trivial(self, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, list[str]]:
        """The document is the longest field of the prompt."""
        metric = self.metric()

        def score(text: str, reference: str) -> float:
            return metric.best(text, [reference])[self.primary_metric]

        documents = [max(prompt_values(self.config.prompt, e.source).values(), key=len) for e in examples]
        constant = medoid([example.target for example in train], score)
        return {"first line": [lead(text) for text in documents], "one training summary": [constant] * len(examples)}

    def metric(self) -> Any:
        return Rouge(keep_in_memory=True)
