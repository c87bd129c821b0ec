"""The examples of a split in tokens: made once, kept on the disk under a name that says what they depend on, and read
from there as they are needed, so that a set may be larger than memory.

Knows Arrow files and how the kept rows are found again; knows nothing about training steps.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
import xxhash

from pregate.config import Run, UsageError
from pregate.models.packing_and_padding import Row
from pregate.system.console import reason_of, say
from pregate.system.durable import clear_abandoned, discard, partial_beside, put, read_object, refusal, write_json
from pregate.system.process_group import each_machine
from pregate.tasks.base import Example, Task
from pregate.tasks.tokens import Collator

FORMAT = 2
PROBE = Example("probe", "Who wrote it, and when?\nSay both.", "Ada Bell, 1843", ())
"""Its tokens are part of the identity, which so changes with the code that writes them."""
CHUNK_EXAMPLES = 512
LARGE = 10_000
"""Examples from which on it is told that they are tokenized, as it takes a while."""
ROWS_FILE, ABOUT_FILE = "rows.arrow", "about.json"
TOKENS = pa.large_list(pa.int32())
SCHEMA = pa.schema(
    {"id": pa.string(), "prompt_tokens": pa.int32(), "source": TOKENS, "target": TOKENS, "learnt": pa.list_(pa.int32())}
)
"""`learnt`: beginnings and ends in turn."""
ELSEWHERE = ("name", "hub", "hub_config", "hub_revision", "files", "generated", "primary_metric", "chat_template")
"""Task settings that say nothing of the tokens of given data: the data and the tokenizer hold what these lead to."""


class TokenRows(Sequence[Row]):
    """The kept rows, read as they are asked for. Indices are positions in the data. The name of `directory` says what
    they depend on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._rows: Any = datasets.Dataset.from_file(str(directory / ROWS_FILE))
        self._prompt_tokens = self._rows.data.column("prompt_tokens").to_numpy()

    def __len__(self) -> int:
        return len(self._prompt_tokens)

    def __getitem__(self, index: Any) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        """Several at once, which is how a data loader asks."""
        found = self._rows[list(indices)]
        learnt = [tuple(range(*ends) for ends in zip(each[::2], each[1::2], strict=True)) for each in found["learnt"]]
        tokens = ((array("i", row) for row in found[side]) for side in ("source", "target"))
        return [Row(*row) for row in zip(*tokens, learnt, strict=True)]

    def prompt_lengths(self, indices: Sequence[int]) -> list[int]:
        """How many tokens the prompt of each has."""
        return self._prompt_tokens[np.asarray(indices, dtype=np.int64)].tolist()

    def ids(self, indices: Sequence[int]) -> list[str]:
        return self._rows.select_columns("id")[list(indices)]["id"]


def token_rows(run: Run, task: Task, split: str, fingerprint: str, limit: int | None, collate: Collator) -> TokenRows:
    """The first `limit` examples (None: all) of `split`, whose content has `fingerprint`, as `collate` makes rows.

    They are tokenized if no run has done so before with this content, tokenizer and settings, by one process of each
    machine. Raises `UsageError` as `Task.stream` does, and for a directory that cannot be written.
    """
    folder = cache_folder(run)
    depends_on = json.dumps(identity(run, split, fingerprint, limit, collate), sort_keys=True)
    target = folder / f"tokens-{xxhash.xxh3_128(depends_on.encode()).hexdigest()}"

    def make() -> None:
        if not _is_whole(target):
            discard(target)
            try:
                _write(target, task, split, limit, collate)
            except OSError as error:
                reason = refusal(error) or error.strerror or reason_of(error)
                raise UsageError(
                    f"The tokens of split {split!r} cannot be kept in {folder} ({reason}): make room, or set "
                    "data.cache=DIR."
                ) from error

    each_machine(make, f"tokenizing split {split!r}")
    return TokenRows(target)


def cache_folder(run: Run) -> Path:
    """`data.cache`, else `PREGATE_CACHE`, else a folder beside what Hugging Face's libraries keep."""
    named = run.data.cache or os.environ.get("PREGATE_CACHE")
    return Path(named).expanduser() if named else Path(datasets.config.HF_CACHE_HOME) / "pregate"


def identity(run: Run, split: str, fingerprint: str, limit: int | None, collate: Collator) -> dict[str, Any]:
    """Everything that the rows depend on."""
    settings = {name: value for name, value in asdict(run.task).items() if name not in ELSEWHERE}
    return {
        "format": FORMAT,
        "versions": [tokenizers.__version__, transformers.__version__],
        "data": fingerprint,
        "split": split,
        "limit": limit,
        "tokenizer": _tokenizer_hash(collate.tokenizer),
        "objective": type(collate.objective).__name__,
        "chat": collate.chat is not None,
        "task": settings,
        "written": _written(collate),
    }


def _written(collate: Collator) -> list[Any] | str:
    try:
        return collate.rendering(PROBE)
    except UsageError as error:  # limits without room for it
        return str(error)


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of the files that it saves, which is all that it consists of."""
    digest = xxhash.xxh3_128()
    with TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        for path in sorted(path for path in Path(place).rglob("*") if path.is_file()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _is_whole(target: Path) -> bool:
    about = read_object(target / ABOUT_FILE)
    rows = target / ROWS_FILE
    return about is not None and rows.is_file() and rows.stat().st_size == about.get("bytes")


def _write(target: Path, task: Task, split: str, limit: int | None, collate: Collator) -> None:
    clear_abandoned(target)
    with partial_beside(target) as folder:
        rows = 0
        with pa.OSFile(str(folder / ROWS_FILE), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for examples in _chunks(task.stream(split, limit)):
                writer.write_batch(_record_batch(examples, collate))
                collate.forget()
                if rows < LARGE <= rows + len(examples):
                    say(f"tokenizing split {split!r} of task {task.name!r}, once: the tokens are kept in {target}.")
                rows += len(examples)
        write_json(folder / ABOUT_FILE, {"rows": rows, "bytes": (folder / ROWS_FILE).stat().st_size})
        try:
            put(folder, target)
        except OSError:
            if not _is_whole(target):  # else another process was faster
                raise


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    stream = iter(examples)
    while chunk := list(islice(stream, CHUNK_EXAMPLES)):
        yield chunk


def _record_batch(examples: Sequence[Example], collate: Collator) -> pa.RecordBatch:
    rows = collate.rows(examples)
    columns = {
        "id": [example.id for example in examples],
        "prompt_tokens": collate.source_lengths(examples),
        "source": [np.asarray(row.source, dtype=np.int32) for row in rows],
        "target": [np.asarray(row.target, dtype=np.int32) for row in rows],
        "learnt": [[end for part in row.learnt for end in (part.start, part.stop)] for row in rows],
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
