"""Where the rows of a split lie, and how they are read: chunks of plain Python columns.

Knows files, the hub's `datasets` and the generated set; knows nothing about prompts, targets or scores. The
first source that is set wins: `task.generated`, `task.files`, `data.root`, `task.hub`. Every source gives the
same values for the same rows, and a caller that stops early leaves the rest unread.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pregate.config import TaskConfig, UsageError
from pregate.system.runtime import first_of
from pregate.tasks.cells import CellError, of_type
from pregate.tasks.text_files import TABLES, Record, header_advice, json_rows, table_cell, table_rows, undecodable

Meaning = TypeVar("Meaning")
Shard = TypeVar("Shard")
DOTTED = "a dotted column is a field of a struct, or of each struct in a list"
SUFFIXES = (".parquet", *TABLES, ".json", ".jsonl")


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one source: the cells of each field, and where they stand.

    `first` counts the rows of the source ahead of them; `lines` are those of the file that the rows begin in. A cell
    that cannot be read is there as a `CellError`.
    """

    task: TaskConfig
    columns: Mapping[str, str]
    where: str
    first: int
    lines: Sequence[int | None] = ()
    cells: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.cells.values())))

    def __getitem__(self, field: str) -> list[Any]:
        return self.cells[field]

    def place(self, row: int) -> str:
        line = self.lines[row] if self.lines else None
        return f"row {self.first + row + 1}{'' if line is None else f' (line {line})'} of {self.where}"

    def read(self, row: int, field: str, meaning: Callable[[Any], Meaning]) -> Meaning:
        """What the cell says; `meaning` may raise `CellError`. Raises `UsageError`, naming row, column and type."""
        cell = self.cells[field][row]
        try:
            if isinstance(cell, CellError):
                raise cell
            return meaning(cell)
        except CellError as error:
            place = self.place(row)
            raise UsageError(
                f"{place[0].upper()}{place[1:]} holds {error.holds} in column {self.columns[field]!r}, but "
                f"{error.needs}: repair or remove it, or name another column with "
                f"{key_of(self.task, 'columns', field)}=COLUMN."
            ) from error


def key_of(task: TaskConfig, section: str, name: str) -> str:
    """The setting `name` of `task.files` or `task.columns` as the command line takes it: a new one needs a plus."""
    return f"{'' if name in getattr(task, section) else '+'}task.{section}.{name}"


def check_source(task: TaskConfig, data_root: str | None) -> None:
    """Refuse a task whose rows cannot come from anywhere, without reading one. Raises `UsageError`."""
    tables = False
    if task.generated is not None:
        from pregate.tasks.generated import check_generated

        check_generated(task.generated)
    elif named_files(task):
        found = [path for split, pattern in named_files(task).items() for path in _matches(task, split, pattern)]
        tables = any(path.suffix in TABLES for path in found)
    elif data_root is not None:
        _task_directory(task, data_root)
    elif not task.hub:
        raise UsageError(
            f"Task {task.name!r} has no source of data: set task.files.train=FILE and task.files.validation=FILE, "
            "data.root=DIR, or task.hub=ID."
        )
    if task.header and not tables:
        raise UsageError(
            f"task.header names the columns of csv and tsv files, of which task {task.name!r} reads none: leave it out."
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

        rows: Iterator[Record] = ((None, row) for row in generate(task.generated, split))
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
            f"holds {task.name}/, or {_elsewhere(task)}."
        )
    if not (root / task.name).is_dir():
        names = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise UsageError(
            f"data.root={data_root} holds no directory {task.name!r} (directories there: {names}): "
            f"add it, or {_elsewhere(task)}."
        )
    return root / task.name


def _elsewhere(task: TaskConfig) -> str:
    """The settings with which the rows come from somewhere else than `data.root`."""
    splits = dict.fromkeys((task.train_split, task.eval_split))
    files = " and ".join(f"{key_of(task, 'files', split)}=FILE" for split in splits)
    return f"set {files}" + (f", or data.root=null to load {task.hub} from the hub" if task.hub else "")


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
            f"set {key_of(task, 'files', split)}=FILE, or choose another split with task.train_split or "
            "task.eval_split."
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

    advice = "repair the file or write it as parquet"
    try:
        if path.suffix == ".parquet":
            yield from _parquet_chunks(task, path, columns, chunk_rows)
        elif path.suffix in TABLES:
            yield from _row_chunks(task, table_rows(path, task.header), columns, chunk_rows, str(path), table=True)
        else:
            advice = "write one whole object {…} on each line, or one list [{…}, …] of objects"
            yield from _row_chunks(task, json_rows(path), columns, chunk_rows, str(path))
        return
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        reason, advice, cause = undecodable(path), "save the whole of it as UTF-8", error
    except (OSError, pa.ArrowException, ValueError, RecursionError) as error:
        reason, cause = " ".join(str(error).split()) or type(error).__name__, error
    raise UsageError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): {advice}.") from cause


def _parquet_chunks(task: TaskConfig, path: Path, columns: Mapping[str, str], chunk_rows: int) -> Iterator[Chunk]:
    import pyarrow.parquet as pq

    first = 0
    with pq.ParquetFile(path) as file:
        heads = _heads(task, file.schema_arrow, columns, str(path))
        for batch in file.iter_batches(batch_size=chunk_rows, columns=heads):
            yield _arrow_chunk(Chunk(task, columns, str(path), first), batch)
            first += len(batch)


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
            f"files with data.root=DIR (holding {task.name}/{split}.parquet) or "
            f"{key_of(task, 'files', split)}=FILE."
        ) from error
    heads = _heads(task, data.features.arrow_schema, columns, str(task.hub))
    table = data.select_columns(heads).with_format("arrow")
    for start in _ordered(range(0, len(table), chunk_rows), shuffle):
        chunk = Chunk(task, columns, f"split {split!r} of {task.hub}", start)
        yield _arrow_chunk(chunk, table[start : start + chunk_rows])


def _heads(task: TaskConfig, schema: Any, columns: Mapping[str, str], where: str) -> list[str]:
    """The top-level columns that `columns` needs from an Arrow schema."""
    import pyarrow as pa

    there = []
    for column in schema:
        inside = _item_type(column.type) or column.type
        names = [f"{column.name}.{child.name}" for child in inside] if pa.types.is_struct(inside) else []
        there += [column.name, *names]
    for name, column in columns.items():
        if column not in there:
            raise _missing_column(task, name, column, there, where)
        if there.count(column) > 1:
            raise UsageError(f"{where} has {there.count(column)} columns named {column!r}: rename all but one of them.")
    heads = dict.fromkeys(_path(column, schema.names)[0] for column in columns.values())
    twice = [head for head in heads if schema.names.count(head) > 1]
    if twice:
        raise UsageError(f"{where} has several columns named {twice[0]!r}: rename all but one of them.")
    return list(heads)


def _item_type(kind: Any) -> Any:
    """The type of the items of an Arrow list type; None for other types."""
    import pyarrow as pa

    lists = (pa.ListType, pa.LargeListType, pa.FixedSizeListType)
    return kind.value_type if isinstance(kind, lists) else None


def _path(column: str, names: Iterable[str]) -> tuple[str, str]:
    """(top-level column, field inside it or ""); a column whose own name holds a dot is taken as it is."""
    head, _, inner = column.partition(".")
    return (column, "") if column in names else (head, inner)


def _arrow_chunk(chunk: Chunk, batch: Any) -> Chunk:
    """`chunk` with the cells of an Arrow batch or table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, column in chunk.columns.items():
        head, inner = _path(column, batch.schema.names)
        values = batch.column(head)
        if inner and pa.types.is_struct(values.type):
            # pyarrow makes its compute functions at import time, out of a type checker's sight.
            values, inner = pc.struct_field(values, inner), ""  # type: ignore[attr-defined]
        cells = _python_values(values)
        chunk.cells[name] = [_inside(cell, inner, column) for cell in cells] if inner else cells
    return chunk


def _python_values(values: Any) -> list[Any]:
    import pyarrow as pa

    def one(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            return CellError(f"a value of type {values.type} that cannot be read ({reason})", "a cell is readable")

    try:
        return values.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return [one(scalar) for scalar in values]


def _row_chunks(
    task: TaskConfig,
    rows: Iterable[Record],
    columns: Mapping[str, str],
    chunk_rows: int,
    where: str,
    table: bool = False,
) -> Iterator[Chunk]:
    """`table`: the rows are those of a csv or tsv file, whose cells are text alone."""
    stream, first = iter(rows), 0
    while block := list(islice(stream, chunk_rows)):
        records = [record for _, record in block]
        if not first:
            _check_columns(task, records, columns, where, table)
        cells = {name: [_cell(record, column, table) for record in records] for name, column in columns.items()}
        yield Chunk(task, columns, where, first, [line for line, _ in block], cells)
        first += len(block)


def _check_columns(
    task: TaskConfig, records: Sequence[dict[str, Any]], columns: Mapping[str, str], where: str, table: bool
) -> None:
    there = [name for record in records for key in record for name in (key, *_inner_names(key, record[key]))]
    for name, column in columns.items():
        head = _path(column, there)[0]
        empty = head in there and not any(record.get(head) for record in records)  # nothing tells what is inside
        if column not in there and not empty:
            raise _missing_column(task, name, column, list(dict.fromkeys(there)), where, table and not task.header)


def _inner_names(key: str, value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [f"{key}.{name}" for item in items if isinstance(item, dict) for name in item]


def _cell(record: dict[str, Any], column: str, table: bool) -> Any:
    head, inner = _path(column, record)
    cell = record.get(head)
    if table:
        cell = table_cell(cell)
    return _inside(cell, inner, column) if inner else cell


def _inside(cell: Any, inner: str, column: str) -> Any:
    """The field `inner` of a struct, or of each struct in a list; a `CellError` where a cell is neither."""
    if isinstance(cell, list):
        odd = [item for item in cell if not isinstance(item, dict | None)]
        if odd:
            return CellError(f"{of_type(odd[0])} inside a list", DOTTED)
        return [None if item is None else item.get(inner) for item in cell]
    if cell is None or isinstance(cell, dict):
        return None if cell is None else cell.get(inner)
    return CellError(of_type(cell), DOTTED)


def _missing_column(
    task: TaskConfig, name: str, column: str, there: Sequence[str], where: str, no_header: bool = False
) -> UsageError:
    """`no_header`: the columns may be the first row of a table without a header."""
    shown = [" ".join(column.split())[:40] for column in there]
    sentence = (
        f"Task {task.name!r} finds no column {column!r} in {where}, whose columns are {first_of(shown, 40)}: "
        f"name the right one with {key_of(task, 'columns', name)}=COLUMN"
    )
    return UsageError(sentence + (header_advice(there, where) if no_header else "") + ".")
