"""Where the rows of a split lie, and how they are read: chunks of plain Python columns.

Knows files, the hub's `datasets` and the generated set; knows nothing about prompts, targets or scores. The
first source that is set wins: `task.generated`, `task.files`, `data.root`, `task.hub`. Every source gives the
same values for the same rows, and a caller that stops early leaves the rest unread.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pregate.config import TaskConfig, UsageError

Chunk = dict[str, list[Any]]
Shard = TypeVar("Shard")
SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl")


def check_source(task: TaskConfig, data_root: str | None) -> None:
    """Refuse a task whose rows cannot come from anywhere, without reading one. Raises `UsageError`."""
    if task.generated is not None:
        from pregate.tasks.generated import check_generated

        check_generated(task.generated)
    elif named_files(task):
        for split, pattern in named_files(task).items():
            _matches(task, split, pattern)
    elif data_root is not None:
        _task_directory(task, data_root)
    elif not task.hub:
        raise UsageError(
            f"Task {task.name!r} has no source of data: set task.files.train=FILE and task.files.validation=FILE, "
            "data.root=DIR, or task.hub=ID."
        )


def named_files(task: TaskConfig) -> dict[str, str]:
    """`task.files` without the splits that are left null."""
    return {split: path for split, path in task.files.items() if path}


def read_columns(
    task: TaskConfig,
    data_root: str | None,
    split: str,
    columns: Mapping[str, str],
    chunk_rows: int,
    shuffle: Sequence[int] | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of `split` in order, at most `chunk_rows` at a time, as {field: values}.

    With `shuffle`, a seed, files come in a random order instead, and chunks do where there are no files (the hub).
    `columns` maps each field to a column name, or to a dotted path into a struct column (`answers.text`).
    Nothing is read before the first chunk is asked for, and nothing beyond the last one.

    Raises `UsageError` for a missing directory, split or column, a file that cannot be parsed, and a hub that
    cannot be reached.
    """
    check_source(task, data_root)
    if task.generated is not None:
        from pregate.tasks.generated import generate

        rows = generate(task.generated, split)
        return _row_chunks(task, rows, columns, chunk_rows, f"the generated split {split!r}")
    if named_files(task):
        files = _named_split(task, split)
    elif data_root is not None:
        files = _root_split(task, data_root, split)
    else:
        return _hub_chunks(task, split, columns, chunk_rows, shuffle)
    return (chunk for path in _ordered(files, shuffle) for chunk in _file_chunks(task, path, columns, chunk_rows))


def _ordered(shards: Sequence[Shard], shuffle: Sequence[int] | None) -> list[Shard]:
    order = range(len(shards)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(shards))
    return [shards[i] for i in order]


def _task_directory(task: TaskConfig, data_root: str) -> Path:
    root = Path(data_root).expanduser()
    if not root.is_dir():
        raise UsageError(
            f"data.root={data_root} is not a directory: point data.root (or PREGATE_DATA) at the directory that "
            f"holds {task.name}/, or set data.root=null to load {task.hub or 'the data'} from the hub."
        )
    if not (root / task.name).is_dir():
        names = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise UsageError(
            f"data.root={data_root} holds no directory {task.name!r} (directories there: {names}): "
            "add it, or set task.files.SPLIT=FILE or data.root=null."
        )
    return root / task.name


def _root_split(task: TaskConfig, data_root: str, split: str) -> list[Path]:
    directory = _task_directory(task, data_root)
    single = directory / f"{split}.parquet"
    shards = [single] if single.is_file() else sorted(directory.glob(f"{glob.escape(split)}-*.parquet"))
    if not shards:
        there = ", ".join(sorted(p.name for p in directory.iterdir())) or "nothing"
        raise UsageError(
            f"Task {task.name!r} finds no {split}.parquet or {split}-*.parquet in {directory}, which holds {there}: "
            "add the file, or choose another split with task.train_split or task.eval_split."
        )
    return shards


def _named_split(task: TaskConfig, split: str) -> list[Path]:
    files = named_files(task)
    if split not in files:
        raise UsageError(
            f"Task {task.name!r} has no file for split {split!r} (task.files names {', '.join(sorted(files))}): "
            f"set task.files.{split}=FILE, or choose another split with task.train_split or task.eval_split."
        )
    return _matches(task, split, files[split])


def _matches(task: TaskConfig, split: str, pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())  # noqa: PTH207
    if not found:
        raise UsageError(
            f"task.files.{split}={pattern} does not exist: give task {task.name!r} the path of a file "
            f"({', '.join(SUFFIXES)}), or a pattern such as 'DIR/{split}-*.parquet'."
        )
    wrong = [p for p in found if p.suffix not in SUFFIXES]
    if wrong:
        raise UsageError(f"{wrong[0]} cannot be read as data: use a file ending in {', '.join(SUFFIXES)}.")
    return found


def _file_chunks(task: TaskConfig, path: Path, columns: Mapping[str, str], chunk_rows: int) -> Iterator[Chunk]:
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            yield from _parquet_chunks(task, path, columns, chunk_rows)
        else:
            rows = _csv_rows(path) if path.suffix in (".csv", ".tsv") else _json_rows(path)
            yield from _row_chunks(task, rows, columns, chunk_rows, str(path))
    except UsageError:
        raise
    except (OSError, pa.ArrowException, csv.Error, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{path} cannot be read as {path.suffix[1:]} ({reason}): repair the file or write it as parquet."
        ) from error


def _parquet_chunks(task: TaskConfig, path: Path, columns: Mapping[str, str], chunk_rows: int) -> Iterator[Chunk]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        heads = _heads(task, file.schema_arrow, columns, str(path))
        for batch in file.iter_batches(batch_size=chunk_rows, columns=heads):
            yield _arrow_chunk(batch, columns)


def _hub_chunks(
    task: TaskConfig, split: str, columns: Mapping[str, str], chunk_rows: int, shuffle: Sequence[int] | None
) -> Iterator[Chunk]:
    import datasets

    assert task.hub, "check_source comes first"
    try:
        data: Any = datasets.load_dataset(task.hub, task.hub_config, split=split, revision=task.hub_revision)
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if isinstance(error, ValueError) and "split" in reason.lower():
            raise UsageError(
                f"{task.hub} has no split {split!r} ({reason}): choose one with task.train_split or task.eval_split."
            ) from error
        raise UsageError(
            f"{task.hub} cannot be loaded from the hub ({reason}): check the network and the id, or read local "
            f"files with data.root=DIR (holding {task.name}/{split}.parquet) or task.files.{split}=FILE."
        ) from error
    heads = _heads(task, data.features.arrow_schema, columns, str(task.hub))
    table = data.select_columns(heads).with_format("arrow")
    for start in _ordered(range(0, len(table), chunk_rows), shuffle):
        yield _arrow_chunk(table[start : start + chunk_rows], columns)


def _heads(task: TaskConfig, schema: Any, columns: Mapping[str, str], where: str) -> list[str]:
    """The top-level columns that `columns` needs from an Arrow schema."""
    import pyarrow as pa

    there = []
    for field in schema:
        inner = [f"{field.name}.{child.name}" for child in field.type] if pa.types.is_struct(field.type) else []
        there += [field.name, *inner]
    for field, column in columns.items():
        if column not in there:
            raise _missing_column(task, field, column, there, where)
    return list(dict.fromkeys(_path(column, schema.names)[0] for column in columns.values()))


def _path(column: str, names: Iterable[str]) -> tuple[str, str]:
    """(top-level column, field inside it or ""); a column whose own name holds a dot is taken as it is."""
    head, _, inner = column.partition(".")
    return (column, "") if column in names else (head, inner)


def _arrow_chunk(batch: Any, columns: Mapping[str, str]) -> Chunk:
    import pyarrow.compute as pc

    chunk = {}
    for field, column in columns.items():
        head, inner = _path(column, batch.schema.names)
        values = batch.column(head)
        # pyarrow makes its compute functions at import time, out of a type checker's sight.
        cells = pc.struct_field(values, inner) if inner else values  # type: ignore[attr-defined]
        chunk[field] = cells.to_pylist()
    return chunk


def _row_chunks(
    task: TaskConfig, rows: Iterable[dict[str, Any]], columns: Mapping[str, str], chunk_rows: int, where: str
) -> Iterator[Chunk]:
    stream, first = iter(rows), True
    while block := list(islice(stream, chunk_rows)):
        if first:
            there = [name for row in block for key in row for name in (key, *_inner_names(key, row[key]))]
            for field, column in columns.items():
                if column not in there:
                    raise _missing_column(task, field, column, list(dict.fromkeys(there)), where)
            first = False
        yield {field: [_at(row, column) for row in block] for field, column in columns.items()}


def _inner_names(key: str, value: Any) -> list[str]:
    inside = value[0] if isinstance(value, list) and value else value
    return [f"{key}.{name}" for name in inside] if isinstance(inside, dict) else []


def _at(row: dict[str, Any], column: str) -> Any:
    head, inner = _path(column, row)
    value = row.get(head)
    if not inner or value is None:
        return value
    return [item.get(inner) for item in value] if isinstance(value, list) else value.get(inner)


def _missing_column(task: TaskConfig, field: str, column: str, there: list[str], where: str) -> UsageError:
    return UsageError(
        f"Task {task.name!r} finds no column {column!r} in {where}, whose columns are {', '.join(there)}: "
        f"name the right one with task.columns.{field}=COLUMN."
    )


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than the header")
            yield row


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One object a line, or one list of objects."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        lines: Iterable[Any] = json.load(file) if start == "[" else (json.loads(t) for t in file if t.strip())
        for number, row in enumerate(lines, start=1):
            if not isinstance(row, dict):
                raise ValueError(f"record {number} is not an object with named columns")
            yield row
