"""Span corruption, the pre-training task of T5: hide spans of plain text, have the model write them.

Raffel et al. 2020, section 3.1.4, and `random_spans_noise_mask` of the reference code: runs of tokens are replaced by
one sentinel each, the target lists every sentinel with what it hides, both are closed by EOS. Lengths are functions of
the settings, so rows fill a batch without padding. Knows token ids; knows nothing about models or training steps.

Letters: B rows of a batch, R rows of a block, L tokens of a row, S source length, T target length, N hidden spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pregate.config import Run, UsageError
from pregate.tasks.text_stream import TextStream


class PackedRow(NamedTuple):
    """`tokens` (L,) of a row, and which of them are hidden."""

    tokens: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class SpanLengths:
    """Tokens of a row before corruption, how many of them are hidden, and in how many spans."""

    row: int
    hidden: int
    spans: int

    @property
    def source(self) -> int:
        return self.row - self.hidden + self.spans + 1

    @property
    def target(self) -> int:
        return self.hidden + self.spans + 1

    @classmethod
    def of_row(cls, row: int, density: float, mean_span: float) -> SpanLengths:
        """As `random_spans_noise_mask` counts for rows of `row` tokens."""
        hidden = min(max(round(row * density), 1), row - 1)
        return cls(row, hidden, min(max(round(hidden / mean_span), 1), row - hidden))

    @classmethod
    def filling(cls, source: int, density: float, mean_span: float) -> SpanLengths:
        """Those of the longest row that gives no more than `source` source tokens.

        It gives exactly as many, except for a source below 3 tokens and for densities so high and spans so short that
        visible tokens become fewer than spans ought to be.
        """
        row = 2
        while cls.of_row(row + 1, density, mean_span).source <= source:
            row += 1
        return cls.of_row(row, density, mean_span)


def noise_masks(lengths: SpanLengths, rows: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, L) bool, true where a token is hidden: visible and hidden spans in turn, of random lengths from 1."""
    visible_RN = _segments(rows, lengths.row - lengths.hidden, lengths.spans, rng)
    hidden_RN = _segments(rows, lengths.hidden, lengths.spans, rng)
    kinds = np.tile([False, True], rows * lengths.spans)
    return np.repeat(kinds, np.stack([visible_RN, hidden_RN], 2).ravel()).reshape(rows, lengths.row)


def _segments(rows: int, items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, segments) lengths of at least 1 that add up to `items`; every such partition is equally likely."""
    cuts = np.sort(rng.random((rows, items - 1)).argsort(1)[:, : segments - 1], 1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=items)


class SpanCollator:
    """Turns rows into one batch without padding: `input_ids` (B, S), `attention_mask` (B, S), `labels` (B, T).

    Every span takes the next sentinel, in the source and in the target alike.
    """

    def __init__(self, lengths: SpanLengths, sentinels: Sequence[int], end: int) -> None:
        self.end = end
        self.sentinels = np.asarray(sentinels[: lengths.spans])

    def __call__(self, rows: Sequence[PackedRow]) -> dict[str, torch.Tensor]:
        tokens_BL = np.stack([row.tokens for row in rows])
        hidden_BL = np.stack([row.hidden for row in rows])
        source = self._with_sentinels(tokens_BL, hidden_BL)
        target = self._with_sentinels(tokens_BL, ~hidden_BL)
        return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target}

    def _with_sentinels(self, tokens_BL: np.ndarray, replaced_BL: np.ndarray) -> torch.Tensor:
        """Each run of `replaced` becomes a sentinel, the rest stays, EOS closes the row."""
        starts_BL = replaced_BL.copy()
        starts_BL[:, 1:] &= ~replaced_BL[:, :-1]
        kept = np.where(starts_BL, self.sentinels[np.maximum(starts_BL.cumsum(1) - 1, 0)], tokens_BL)
        rows = kept[starts_BL | ~replaced_BL].reshape(len(tokens_BL), -1)
        return torch.from_numpy(np.pad(rows, ((0, 0), (0, 1)), constant_values=self.end).astype(np.int64))


class SpanCorruption(TextStream[PackedRow]):
    """Plain text for models that read a source and write a target."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.lengths = self._lengths()

    @property
    def row_tokens(self) -> int:
        return self.lengths.row

    def made_of(self, tokens_RL: np.ndarray, rng: np.random.Generator) -> list[PackedRow]:
        return [*map(PackedRow, tokens_RL, noise_masks(self.lengths, len(tokens_RL), rng))]

    def _lengths(self) -> SpanLengths:
        task = self.config
        lengths = SpanLengths.filling(task.max_source_tokens, task.noise_density, task.mean_span_tokens)
        if lengths.source != task.max_source_tokens:
            raise UsageError(
                f"task.max_source_tokens={task.max_source_tokens} cannot be filled exactly with these hidden spans: "
                f"set it to {lengths.source}."
            )
        if lengths.target > task.max_target_tokens:
            raise UsageError(
                f"Hiding {task.noise_density:.0%} of {task.max_source_tokens} source tokens makes targets of "
                f"{lengths.target} tokens: set task.max_target_tokens={lengths.target} or more."
            )
        return lengths

    def collator(self, tokenizer: Any) -> SpanCollator:
        """Raises `UsageError` if `tokenizer` has fewer sentinels than a row has hidden spans."""
        known = tokenizer.get_vocab()
        sentinels = [known.get(f"<extra_id_{number}>") for number in range(self.lengths.spans)]
        if None in sentinels:
            raise UsageError(
                f"The tokenizer has no <extra_id_{sentinels.index(None)}>, but {self.lengths.spans} sentinels mark the "
                "hidden spans of a row: set model.tokenizer to one of the T5 family, or shorten task.max_source_tokens."
            )
        return SpanCollator(self.lengths, [s for s in sentinels if s is not None], tokenizer.eos_token_id)
