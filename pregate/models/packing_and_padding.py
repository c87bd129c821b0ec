"""Examples in tokens as rows of a batch: padded, or several packed into one row in which they do not see each other.

Knows token ids; knows nothing about models or about what is learnt beside the target.

Letters: B batch, T length of a row.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pregate.models.vocabulary_losses import IGNORED

Rows = Sequence["array[int]"]
"""Token ids, one array a row."""


class Row(NamedTuple):
    """An example in tokens. learnt: the places of the source that are learnt as the target is."""

    source: array[int]
    target: array[int]
    learnt: tuple[range, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.source) + len(self.target)


def document_batch(tokens_BT: Tensor, starts_BT: Tensor) -> dict[str, Tensor]:
    """A batch of packed text, of which all is learnt, in rows without padding. `starts_BT`: the first token of each
    document, and of each row, which nothing comes before and so nobody predicts."""
    index_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    first_BT = index_BT.masked_fill(~starts_BT, 0).cummax(1).values
    return {
        "input_ids": tokens_BT,
        "attention_mask": torch.ones_like(tokens_BT),
        "labels": tokens_BT.masked_fill(starts_BT, IGNORED),
        "position_ids": index_BT - first_BT,
    }


def _learnt(row: Row) -> list[range]:
    """The places of the whole row that are learnt; its first token, which nothing predicts, is none of them."""
    places = (*row.learnt, range(len(row.source), row.num_tokens))
    return [range(max(1, place.start), place.stop) for place in places]


def labels_of(row: Row) -> array[int]:
    """Of the whole row, source and target, the tokens that are learnt, the others -100."""
    whole = row.source + row.target
    labels = array("i", [IGNORED]) * len(whole)
    for place in _learnt(row):
        labels[place.start : place.stop] = whole[place.start : place.stop]
    return labels


def end_to_end(rows: Sequence[Row]) -> Row:
    """One row of several, each learnt as it was."""
    whole, learnt = array("i"), []
    for row in rows:
        learnt += [range(len(whole) + place.start, len(whole) + place.stop) for place in _learnt(row)]
        whole += row.source + row.target
    return Row(whole, array("i"), tuple(learnt))


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices of `lengths`: the longest comes first, and each goes into the first bin that has room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        found = next((number for number, left in enumerate(room) if lengths[index] <= left), len(bins))
        if found == len(bins):
            bins.append([])
            room.append(capacity)
        bins[found].append(index)
        room[found] -= lengths[index]
    return bins


def ones(rows: Rows) -> Rows:
    return [array("i", [1]) * len(row) for row in rows]


def padded(rows: Rows, value: int, left: bool = False, multiple: int = 1) -> Tensor:
    """int64 (rows, longest), the rest filled with `value`, on the right unless `left`. `longest` is rounded up to a
    multiple of `multiple`."""
    longest = -(-max(len(row) for row in rows) // multiple) * multiple
    filled = np.full((len(rows), longest), value, dtype=np.int64)
    for number, row in enumerate(rows):
        first = longest - len(row) if left else 0
        filled[number, first : first + len(row)] = row
    return torch.from_numpy(filled)
