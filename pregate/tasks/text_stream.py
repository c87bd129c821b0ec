"""Plain text to pre-train on, as an endless stream of packed rows.

Documents stand one behind the other, and rows of equal length are cut from them, so that a batch holds no padding.
Knows token ids; knows nothing about models or training steps.

Letters: R rows of a block, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from pregate.config import Run, UsageError
from pregate.tasks.cell_values import document
from pregate.tasks.records import Chunk, fingerprint, read_columns
from pregate.tasks.sources import check_source

BLOCK_DOCUMENTS = 1024
"""Documents that are in memory together: rows are shuffled among these, and a resumed run reads their block again."""
PackedRow = TypeVar("PackedRow")


class Position(NamedTuple):
    """A place in an endless stream of packed rows: pass over the corpus, block in it, rows taken of that block."""

    epoch: int = 0
    block: int = 0
    row: int = 0


START = Position()


class TextStream(Generic[PackedRow]):
    """Unlike a `Task` it has no examples with references, and is judged by its loss."""

    metric_names = ("loss",)

    def __init__(self, run: Run) -> None:
        self.config, self.data_root, self.seed = run.task, run.data.root, run.seed
        self.name, self.primary_metric = run.task.name, run.task.primary_metric
        if self.primary_metric not in self.metric_names:
            raise UsageError(
                f"task.primary_metric={self.primary_metric} is no metric of a {run.task.kind} task: set it to loss."
            )
        if run.data.max_train_examples is not None:
            raise UsageError(
                f"data.max_train_examples counts examples, and a {run.task.kind} task reads rows of text: leave it "
                "out, or name a shorter file."
            )
        check_source(run.task, run.data.root)

    @property
    def row_tokens(self) -> int:
        """L."""
        raise NotImplementedError

    def made_of(self, tokens_RL: np.ndarray, rng: np.random.Generator) -> list[PackedRow]:
        """The rows that a collator takes, of the tokens of a block."""
        raise NotImplementedError

    def collator(self, tokenizer: Any) -> Callable[[Sequence[PackedRow]], dict[str, torch.Tensor]]:
        """What makes one batch of rows. Raises `UsageError` for a tokenizer that cannot be used."""
        raise NotImplementedError

    def fingerprint(self, split: str) -> str:
        """What the content of a split is known by, wherever it lies. Raises `UsageError`."""
        return fingerprint(self.config, self.data_root, split)

    def opening(self, tokenizer: Any) -> list[int]:
        """The tokens that every document begins with."""
        return []

    def check(self, tokenizer: Any, splits: Iterable[str]) -> None:
        """Refuse a tokenizer that cannot be used, and splits that fill no row or hold a cell that is no text.

        Reads every document, without tokenizing it. Raises `UsageError`.
        """
        self.collator(tokenizer)
        for split in splits:
            next(self.rows(split, tokenizer))
            for chunk in self._chunks(split):
                self._texts(chunk)

    def first_rows(self, split: str, tokenizer: Any, count: int) -> list[PackedRow]:
        """`count` rows of the first pass over `split`, fewer where it has no more; always the same ones."""
        first_pass = takewhile(lambda found: found[1].epoch == 0, self.rows(split, tokenizer, shuffled=False))
        return [row for row, _ in islice(first_pass, count)]

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
            order = self._order(epoch) if shuffled else None
            blocks = self._chunks(split, order)
            for block, chunk in enumerate(islice(blocks, first_block, None), first_block):
                rng = np.random.default_rng([seed, 1, epoch, block]) if shuffled else None
                tokens_RL = self._packed(self._texts(chunk), tokenizer, rng)
                made = self.made_of(tokens_RL, np.random.default_rng([seed, 2, epoch, block]))
                found |= len(made) > 0
                for row in range(first_row, len(made)):
                    yield made[row], Position(epoch, block, row + 1)
                first_row = 0
            if not found:
                raise UsageError(
                    f"Split {split!r} of task {self.name!r} has too little text for one row of {self.row_tokens} "
                    "tokens: add text, or lower task.max_source_tokens."
                )
            epoch, first_block = epoch + 1, 0

    def place(self, split: str, position: Position) -> str:
        """The rows of the data that the packed rows behind `position` begin with, those of one block."""
        chunks = self._chunks(split, self._order(position.epoch))
        chunk = next(islice(chunks, position.block, None))
        return f"{chunk.place(0)} and the {len(chunk) - 1} rows behind it"

    def _order(self, epoch: int) -> list[int]:
        return [self.seed & 0xFFFFFFFF, 0, epoch]

    def _packed(self, texts: list[str], tokenizer: Any, rng: np.random.Generator | None) -> np.ndarray:
        """(R, L): the documents one behind the other, each closed by EOS."""
        if not texts:
            return np.empty((0, self.row_tokens), dtype=np.int32)
        if rng is not None:
            texts = [texts[i] for i in rng.permutation(len(texts))]
        documents = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        begin, end = self.opening(tokenizer), [tokenizer.eos_token_id]
        tokens = np.concatenate(
            [np.asarray(part, dtype=np.int32) for document in documents for part in (begin, document, end)]
        )
        count = len(tokens) // self.row_tokens
        tokens_RL = tokens[: count * self.row_tokens].reshape(count, self.row_tokens)
        return tokens_RL if rng is None else tokens_RL[rng.permutation(count)]

    def _chunks(self, split: str, shuffle: Sequence[int] | None = None) -> Iterator[Chunk]:
        columns = {"text": self.config.columns.get("text") or "text"}
        return read_columns(self.config, self.data_root, split, columns, BLOCK_DOCUMENTS, shuffle)

    def _texts(self, chunk: Chunk) -> list[str]:
        """The documents of a chunk; empty ones are passed over."""
        return [text for row in range(len(chunk)) if (text := chunk.read(row, "text", document))]
