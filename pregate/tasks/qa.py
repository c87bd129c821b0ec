"""Question answering, open or closed book: exact match and F1 against any of several answers.

The prompt alone decides whether a context is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pregate.tasks.base import Example, Task
from pregate.tasks.cells import answers
from pregate.tasks.metrics import ExactMatchF1
from pregate.tasks.prompts import prompt_values
from pregate.tasks.trivial import first_new_name, most_frequent


class QuestionAnswering(Task):
    """`answers` is one text or a list of them; training teaches the first."""

    metric_names = ("em", "f1")
    target_field = "answers"
    no_reference = "have no answer"

    def references(self, cell: Any) -> tuple[str, ...]:
        return answers(cell)

    def trivial(self, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, list[str]]:
        """A name from the context needs prompt fields called `context` and `question`."""
        answer = most_frequent([example.target for example in train])
        found = {"most frequent answer": [answer] * len(examples)}
        if {"context", "question"} <= set(self.prompt_fields):
            shown = [prompt_values(self.config.prompt, example.source) for example in examples]
            found["first name not asked for"] = [first_new_name(v["context"], v["question"]) for v in shown]
        return found

    def metric(self) -> Any:
        return ExactMatchF1(keep_in_memory=True)
