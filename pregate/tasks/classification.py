"""Classification as text: the model writes a label's word, and accuracy counts how often it is right.

Knows how a label column becomes a word; knows nothing about the number of classes beyond `task.labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pregate.config import Run
from pregate.tasks.base import Example, Task
from pregate.tasks.trivial import most_frequent


class Classification(Task):
    """`label` is a position in `task.labels` counted from 0, or one of those words."""

    metric_names = ("accuracy",)
    target_field = "label"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        labels = list(run.task.labels)
        self.no_reference = f"have a label that is neither 0 to {len(labels) - 1} nor one of {', '.join(labels)}"
        # A label that is itself a number wins over a position.
        self._words = {str(position): word for position, word in enumerate(labels)} | {word: word for word in labels}

    def references(self, values: list[Any]) -> list[tuple[str, ...]]:
        words = [self._words.get(_key(value)) for value in values]
        return [() if word is None else (word,) for word in words]

    def trivial(self, train: Sequence[Example], examples: Sequence[Example]) -> dict[str, list[str]]:
        label = most_frequent([example.target for example in train])
        return {"most frequent label": [label] * len(examples)}

    def metric(self) -> Any:
        from pregate.tasks.metrics import Accuracy

        return Accuracy(keep_in_memory=True)


def _key(value: Any) -> str:
    """A label cell as text; bools count as 0 and 1, and 1.0 (an integer column with gaps) as 1."""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return str(value).strip()
