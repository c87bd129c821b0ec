"""The text that heals a split model: plain text and tasks as conversations, as documents of one file a split.

Both are read by the project's own tasks, from `data.root`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from torch import Tensor

from pregate.cli import compose_run
from pregate.config import Run, UsageError
from pregate.tasks.base import Example
from pregate.tasks.cell_values import document
from pregate.tasks.records import read_columns
from pregate.tasks.registry import build_task, build_training_task
from pregate.training.durable_directories import replaced
from studies.dense_to_moe.dense import end_of_text

TEXT = "language_modelling"
TASKS = ("squad", "sst2", "web_questions")
TOKENIZER = "tokenizer"
CHARACTERS = {"train": 16_000_000, "validation": 400_000}
"""How much of each split is written. Sixteen million are about four million tokens, more than two cores learn in five
hours; a longer training sees them again."""
CHUNK_DOCUMENTS = 1024
LONGEST = 20_000
"""Characters of a document; the rest of a book is left out, so that there are many documents."""


def check_sources(data_root: str, tasks: list[str]) -> list[Run]:
    """The runs that read plain text and each of the tasks. Raises `UsageError` for data that is missing."""
    text, *others = (compose_run([f"task={name}", f"data.root={data_root}"]) for name in (TEXT, *tasks))
    build_training_task(text)
    for run in others:
        build_task(run)
    return [text, *others]


def write_mixture(target: Path, tokenizer: Any, data_root: str, tasks: list[str], chat_share: float) -> None:
    """Write `target`/train.parquet, validation.parquet and a tokenizer that ends documents as in pre-training.

    `chat_share`: of the characters, in conversations. Raises `UsageError` for data that is missing.
    """
    text, *runs = check_sources(data_root, tasks)
    with replaced(target) as fresh:
        for split, characters in CHARACTERS.items():
            written = [_conversations(run, split, tokenizer) for run in runs]
            mixed = interleaved(_texts(text, split), _in_turn(written), chat_share if runs else 0.0)
            table = pyarrow.table({"text": list(_first(mixed, characters))})
            parquet.write_table(table, fresh / f"{split}.parquet")
        # the end of a turn of a conversation must not end the document
        closing = copy.deepcopy(tokenizer)
        closing.eos_token = end_of_text(tokenizer)
        closing.save_pretrained(fresh / TOKENIZER)


def interleaved(texts: Iterable[str], conversations: Iterable[str], chat_share: float) -> Iterator[str]:
    """Documents of both kinds, at each moment as many characters of conversations as `chat_share` says; ends where the
    kind that is due has no more."""
    kinds, written = (iter(texts), iter(conversations)), [0, 0]
    while True:
        due = int(written[1] < chat_share * (written[0] + written[1] + 1))
        found = next(kinds[due], None)
        if found is None:
            return
        written[due] += len(found)
        yield found


def packed_rows(texts: Iterable[str], tokenizer: Any, num_tokens: int, row_tokens: int) -> Tensor:
    """(B, T): documents one behind the other, each closed, cut to whole rows; at most `num_tokens` of them. Raises
    `UsageError` where there is too little text for one row."""
    ids: list[int] = []
    end = tokenizer.convert_tokens_to_ids(end_of_text(tokenizer))
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
        if len(ids) >= num_tokens:
            break
    count = min(len(ids), num_tokens) // row_tokens
    if not count:
        raise UsageError(f"There are {len(ids)} tokens of text, too few for a row of {row_tokens}: add text.")
    return torch.tensor(ids[: count * row_tokens]).view(count, row_tokens)


def read_texts(folder: Path, split: str) -> list[str]:
    return parquet.read_table(folder / f"{split}.parquet").column("text").to_pylist()


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _texts(run: Run, split: str) -> Iterator[str]:
    columns = {"text": run.task.columns.get("text") or "text"}
    for chunk in read_columns(run.task, run.data.root, split, columns, CHUNK_DOCUMENTS):
        for row in range(len(chunk)):
            if text := chunk.read(row, "text", document):
                yield text[:LONGEST]


def _conversations(run: Run, split: str, tokenizer: Any) -> Iterator[str]:
    """The examples of the task as the tokenizer's chat template writes them; without one, prompt and answer."""
    named = run.task.train_split if split == "train" else run.task.eval_split
    for example in build_task(run).stream(named):
        yield _written(run, example, tokenizer)


def _written(run: Run, example: Example, tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return f"{example.source} {run.task.separator} {example.target}"
    turns = [message._asdict() for message in example.conversation]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def _in_turn(sources: list[Iterator[str]]) -> Iterator[str]:
    """One document of each source after the other, as long as it has one."""
    while sources:
        for source in list(sources):
            found = next(source, None)
            if found is None:
                sources = [other for other in sources if other is not source]
            else:
                yield found
