"""Classification as text: the model writes a label's word, and accuracy counts how often it is right.

Knows how a label column becomes a word; knows nothing about the number of classes beyond `task.labels`.
"""

from __future__ import annotations

from typing import Any

from pregate.config import Run
from pregate.tasks.base import Task
from pregate.tasks.cell_values import CellError, inside, label_names, of_type
from pregate.tasks.metrics import Accuracy

NEEDS = "a label is a word of task.labels or a position in it"


class Classification(Task):
    """`label` is a position in `task.labels` counted from 0, or one of those words."""

    metric = Accuracy
    target_field = "label"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        labels = list(run.task.labels)
        self._words = {word: word for word in labels}
        places = {str(place): word for place, word in enumerate(labels)}
        if all(places.get(word, word) == word for word in labels):
            self._words |= places
            self.no_reference = f"have a label that is neither 0 to {len(labels) - 1} nor one of {', '.join(labels)}"
        else:  # with labels 1 to 5, a rating of 0 has no word, rather than the first of them
            self.no_reference = f"have a label that is not one of {', '.join(labels)}"

    def references(self, cell: Any) -> tuple[str, ...]:
        cell = inside(cell)
        if isinstance(cell, bool):
            return self._of_boolean(cell)
        found = [self._words[name] for name in label_names(cell) if name in self._words]
        if not found and isinstance(cell, float) and not cell.is_integer():
            raise CellError(of_type(cell), NEEDS)
        return tuple(found[:1])

    def _of_boolean(self, cell: bool) -> tuple[str, ...]:
        """The label true or false where there is one, else of two labels that of 1 or 0."""
        spelt = {word.casefold(): word for word in self.config.labels}
        if spelt.keys() & {"true", "false"}:
            word = spelt.get(str(cell).casefold())
        elif len(self.config.labels) == 2:
            word = self._words.get(str(int(cell)))
        else:
            raise CellError(of_type(cell), NEEDS)
        return () if word is None else (word,)
