"""Span corruption, the pre-training task of T5: hide spans of plain text, have the model write them.

Raffel et al. 2020, section 3.1.4, and `random_spans_noise_mask` of the reference code: runs of tokens are replaced by
one sentinel each, the target lists every sentinel with what it hides, both are closed by EOS. Lengths are functions of
the settings, so rows fill a batch without padding. Knows token ids; knows nothing about models or training steps.

Letters: B rows of a batch, R rows of a block, L tokens of a row, S source length, T target length, N hidden spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from pregate.config import Run, UsageError
from pregate.tasks.cells import document
from pregate.tasks.records import Chunk, read_columns
from pregate.tasks.sources import check_source

BLOCK_DOCUMENTS = 1024
"""Documents that are in memory together: rows are shuffled among these, and a resumed run reads their block again."""


class PackedRow(NamedTuple):
    """`tokens` (L,) of a row, and which of them are hidden."""

    tokens: np.ndarray
    hidden: np.ndarray


class Position(NamedTuple):
    """A place in an endless stream of packed rows: pass over the corpus, block in it, rows taken of that block."""

    epoch: int = 0
    block: int = 0
    row: int = 0


START = Position()


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


class SpanCorruption:
    """Plain text to pre-train on. Unlike a `Task` it has no examples with references, and is judged by its loss."""

    metric_names = ("loss",)

    def __init__(self, run: Run) -> None:
        self.config, self.data_root, self.seed = run.task, run.data.root, run.seed
        self.name, self.primary_metric = run.task.name, run.task.primary_metric
        if self.primary_metric not in self.metric_names:
            raise UsageError(
                f"task.primary_metric={self.primary_metric} is no metric of a {run.task.kind} task: set it to loss."
            )
        self.lengths = self._lengths()
        check_source(run.task, run.data.root)

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

    def check(self, tokenizer: Any, splits: Iterable[str]) -> None:
        """Refuse a tokenizer without enough sentinels, and splits that fill no row or hold a cell that is no text.

        Reads every document, without tokenizing it. Raises `UsageError`.
        """
        self.collator(tokenizer)
        for split in splits:
            next(self.rows(split, tokenizer))
            for chunk in self._chunks(split):
                self._texts(chunk)

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

    def first_rows(self, split: str, tokenizer: Any, count: int) -> list[PackedRow]:
        """`count` rows of the first pass over `split`, fewer where it has no more; always the same ones."""
        stream = self.rows(split, tokenizer, shuffled=False)
        return [row for row, after in islice(stream, count) if after.epoch == 0]

    def rows(
        self, split: str, tokenizer: Any, start: Position = START, shuffled: bool = True
    ) -> Iterator[tuple[PackedRow, Position]]:
        """The endless stream of rows behind `start`, each with the position behind it.

        A pure function of the data and the run's seed. Each pass takes the files in another order, and within blocks of
        `BLOCK_DOCUMENTS` documents it shuffles documents and the rows packed of them. At the end of a block the tokens
        that fill no row are dropped. Raises `UsageError` if a whole pass fills none.
        """
        epoch, first_block, first_row = start
        seed = self.seed & 0xFFFFFFFF if shuffled else 0
        while True:
            found = first_block > 0
            order = [seed, 0, epoch] if shuffled else None
            blocks = self._chunks(split, order)
            for block, chunk in enumerate(islice(blocks, first_block, None), first_block):
                rng = np.random.default_rng([seed, 1, epoch, block]) if shuffled else None
                tokens_RL = self._packed(self._texts(chunk), tokenizer, rng)
                hidden_RL = noise_masks(self.lengths, len(tokens_RL), np.random.default_rng([seed, 2, epoch, block]))
                found |= len(tokens_RL) > 0
                for row in range(first_row, len(tokens_RL)):
                    yield PackedRow(tokens_RL[row], hidden_RL[row]), Position(epoch, block, row + 1)
                first_row = 0
            if not found:
                raise UsageError(
                    f"Split {split!r} of task {self.name!r} has too little text for one row of {self.lengths.row} "
                    "tokens: add text, or lower task.max_source_tokens."
                )
            epoch, first_block = epoch + 1, 0

    def _packed(self, texts: list[str], tokenizer: Any, rng: np.random.Generator | None) -> np.ndarray:
        """(rows, L): the documents one behind the other, each closed by EOS."""
        if not texts:
            return np.empty((0, self.lengths.row), dtype=np.int32)
        if rng is not None:
            texts = [texts[i] for i in rng.permutation(len(texts))]
        documents = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        end = [tokenizer.eos_token_id]
        tokens = np.concatenate(
            [np.asarray(part, dtype=np.int32) for document in documents for part in (document, end)]
        )
        count = len(tokens) // self.lengths.row
        tokens_RL = tokens[: count * self.lengths.row].reshape(count, self.lengths.row)
        return tokens_RL if rng is None else tokens_RL[rng.permutation(count)]

    def _chunks(self, split: str, shuffle: Sequence[int] | None = None) -> Iterator[Chunk]:
        columns = {"text": self.config.columns.get("text") or "text"}
        return read_columns(self.config, self.data_root, split, columns, BLOCK_DOCUMENTS, shuffle)

    def _texts(self, chunk: Chunk) -> list[str]:
        """The documents of a chunk; empty ones are passed over."""
        return [text for row in range(len(chunk)) if (text := chunk.read(row, "text", document))]
