"""Files of this machine as data sets of lm-evaluation-harness, for the YAML files beside this one.

A split of a task is `DIR/<folder>/<split>.jsonl` or `.parquet`, with the columns that the data set has where it is
published. DIR is `--metadata data_root=DIR`, or PREGATE_DATA. Every function takes what the harness knows of a task,
and returns the split under its name. Raises `UsageError` for files that are missing, cannot be read, or hold something
else. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from lm_eval.tasks.hellaswag.utils import process_docs  # pyright: ignore[reportMissingImports]

from pregate.config import UsageError
from pregate.config.validators import need
from pregate.system.console import first_of, reason_of
from pregate.tasks.csv_and_json import json_rows

SUFFIXES = (".jsonl", ".json", ".parquet")
Row = dict[str, Any]
Splits = dict[str, Dataset]
SENTENCE = re.compile(r"(?<=[.!?])\s+")
FEWEST, MOST = 25, 100
"""Words of a passage of `last_words`."""
LAST = re.compile(r"([A-Za-z]{4,})[.!?]?")


def lambada(local_split: str, **known: Any) -> Splits:
    """Column `text`: a passage. Its last word is what the model has to find."""
    return _split(known, "lambada", local_split, lambda row: _cut(_text(row, "text")))


def hellaswag(local_split: str, **known: Any) -> Splits:
    """Columns `activity_label`, `ctx_a`, `ctx_b`, `endings` and `label`. The harness's own function cleans them."""
    found = _split(known, "hellaswag", local_split, _endings)
    return {split: process_docs(rows) for split, rows in found.items()}


def arc(local_split: str, **known: Any) -> Splits:
    """Columns `question`, `choices` (`text` and `label`) and `answerKey`, as on the hub; or `question` with a `stem`
    and its `choices`, as in the archive of its authors."""
    return _split(known, "arc", local_split, _choices)


def web_questions(local_split: str, **known: Any) -> Splits:
    """Columns `question` and `answers`."""

    def read(row: Row) -> Row:
        return {"question": _text(row, "question"), "answers": _texts(row, "answers")}

    return _split(known, "web_questions", local_split, read)


def documents(local_split: str, **known: Any) -> Splits:
    """Column `text`, of the folder `corpus`."""
    return _split(known, "corpus", local_split, lambda row: {"text": _text(row, "text")})


def last_words(local_split: str, **known: Any) -> Splits:
    """As LAMBADA, from plain text, the column `text` of the folder `corpus`: of each document at most one passage of
    whole sentences whose last word stands in it before."""
    return _split(known, "corpus", local_split, lambda row: _passage(_text(row, "text")))


# --- what a row says ------------------------------------------------------------------------------------------------


def _cut(text: str) -> Row:
    context, _, word = text.strip().rpartition(" ")
    need(bool(context), "a text of a single word")
    return {"context": context, "word": word}


def _endings(row: Row) -> Row:
    texts = {name: _text(row, name) for name in ("activity_label", "ctx_a")}
    # of some records the second part of the context is empty
    after = row.get("ctx_b") or ""
    endings, label = _texts(row, "endings"), str(row.get("label"))
    need(isinstance(after, str), f"{after!r} in ctx_b, which is not text")
    right = label.isdecimal() and int(label) < len(endings)
    need(right, f"label {label}, which is none of its {len(endings)} endings")
    return {**texts, "ctx_b": after, "endings": endings, "label": label}


def _choices(row: Row) -> Row:
    question = row.get("question")
    holder, name = (question, "stem") if isinstance(question, dict) else (row, "question")
    text, choices = _text(holder, name), holder.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, dict):
        raise UsageError("no choices, each with a text and a label")
    texts, labels = _texts(choices, "text"), _texts(choices, "label")
    answer = _text(row, "answerKey")
    right = len(labels) == len(texts) and answer in labels
    need(right, f"the answerKey {answer}, which is none of the labels {', '.join(labels)}")
    return {"question": text, "choices": texts, "gold": labels.index(answer)}


def _passage(text: str) -> Row | None:
    words: list[str] = []
    for sentence in SENTENCE.split(" ".join(text.split())):
        words += sentence.split(" ")
        if len(words) > MOST:
            return None
        last = LAST.fullmatch(words[-1])
        if len(words) >= FEWEST and last and last[1] in {word.strip(",;:.!?\"'()") for word in words[:-1]}:
            return {"context": " ".join(words[:-1]), "word": last[1]}
    return None


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{'no text' if value is None else repr(value)} in {name}, which must be text")
    return value


def _texts(row: Row, name: str) -> list[str]:
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise UsageError(f"{'nothing' if values is None else repr(values)} in {name}, which must be a list of texts")
    return [_text({name: value}, name) for value in values]


# --- files ----------------------------------------------------------------------------------------------------------


def _split(known: Row, folder: str, split: str, read: Callable[[Row], Row | None]) -> Splits:
    path = _file(known.get("data_root") or os.environ.get("PREGATE_DATA"), folder, split)
    docs = []
    for number, row in enumerate(_rows(path), start=1):
        try:
            doc = read(row)
        except UsageError as error:
            raise UsageError(f"Row {number} of {path} holds {error}: repair or remove it.") from error
        docs += [] if doc is None else [doc]
    need(bool(docs), f"{path} holds nothing to score: give a file with other rows.")
    return {split: Dataset.from_list(docs)}


def _file(root: str | None, folder: str, split: str) -> Path:
    need(bool(root), f"There is no data: set PREGATE_DATA=DIR, or --metadata data_root=DIR, where DIR holds {folder}/.")
    names: Sequence[str] = [f"{split}{suffix}" for suffix in SUFFIXES]
    directory = Path(str(root)).expanduser() / folder
    found = [directory / name for name in names if (directory / name).is_file()]
    there = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    held = first_of(there, 5) if there else "nothing"
    need(bool(found), f"{directory} holds {held}, but one of {', '.join(names)} is needed: add it.")
    need(len(found) < 2, f"{directory} holds {' and '.join(p.name for p in found)}: leave one of them there.")
    return found[0]


def _rows(path: Path) -> Iterator[Row]:
    try:
        if path.suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        else:
            yield from (row for _, row in json_rows(path))
    except (OSError, pa.ArrowException, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read as {path.suffix[1:]} ({reason_of(error)}): repair it.") from error
