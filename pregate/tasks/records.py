"""The rows of a split, a chunk at a time, and what the cells of a row say.

Knows parquet files, the hub's `datasets` and the columns of a task; knows nothing about prompts, targets or scores.
Every source gives the same values for the same rows. A caller that stops early leaves the rest unread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pregate.config import TaskConfig, UsageError
from pregate.system.console import first_of, reason_of
from pregate.system.durable import digest_file
from pregate.tasks.cell_values import CellError, identity, of_type
from pregate.tasks.csv_and_json import Record, header_advice, json_rows, table_rows, undecodable
from pregate.tasks.generated import generate
from pregate.tasks.sources import TABLES, check_source, files_of, key_of

Meaning = TypeVar("Meaning")
Shard = TypeVar("Shard")
DOTTED = "a dotted column is a field of a struct, or of each struct in a list"


@dataclass(frozen=True)
class Columns:
    """The column of each field, and the place that the columns are looked for in.

    A column is a name, or a dotted path into a struct column (`answers.text`).
    """

    task: TaskConfig
    of_field: Mapping[str, str]
    where: str

    def missing(self, field: str, there: Sequence[str], advice: str = "") -> UsageError:
        """What to do about a field whose column is not `there`; `advice` ends the sentence."""
        shown = first_of([" ".join(name.split())[:40] for name in there], 40)
        return UsageError(
            f"Task {self.task.name!r} finds no column {self.of_field[field]!r} in {self.where}, whose columns are "
            f"{shown}: name the right one with {key_of(self.task, 'columns', field)}=COLUMN{advice}."
        )

    def refused(self, field: str, place: str, error: CellError) -> UsageError:
        """What to do about a cell that cannot be used, with its row, column and type."""
        return UsageError(
            f"{place[0].upper()}{place[1:]} holds {error.holds} in column {self.of_field[field]!r}, but "
            f"{error.needs}: repair or remove it, or name another column with "
            f"{key_of(self.task, 'columns', field)}=COLUMN."
        )


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one source; `first` counts the rows ahead of them."""

    columns: Columns
    first: int
    records: Sequence[Record]

    def __len__(self) -> int:
        return len(self.records)

    def has(self, field: str) -> bool:
        return field in self.columns.of_field

    def place(self, row: int) -> str:
        """Where a row is, with its line and its id where it has these."""
        line, record = self.records[row]
        known = [] if line is None else [f"line {line}"]
        with suppress(CellError):
            own = identity(_cell(record, self.columns.of_field["id"])) if self.has("id") else None
            known += [] if own is None else [f"id {' '.join(own.split())[:40]!r}"]
        shown = f" ({', '.join(known)})" if known else ""
        return f"row {self.first + row + 1}{shown} of {self.columns.where}"

    def read(self, row: int, field: str, meaning: Callable[[Any], Meaning]) -> Meaning:
        """What the cell says; `meaning` may raise `CellError`. Raises `UsageError`, naming row, column and type."""
        try:
            return meaning(_cell(self.records[row][1], self.columns.of_field[field]))
        except CellError as error:
            raise self.columns.refused(field, self.place(row), error) from error


def read_columns(
    task: TaskConfig,
    data_root: str | None,
    split: str,
    columns: Mapping[str, str],
    chunk_rows: int,
    shuffle: Sequence[int] | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of `split` in order, at most `chunk_rows` at a time, with the cells of `columns` by field.

    With `shuffle`, a seed, files come in a random order instead, and chunks do where there are no files (the hub).
    Nothing is read before the first chunk is asked for, and nothing beyond the last one.

    Raises `UsageError` for a missing directory, split or column, a file that cannot be parsed, and a hub that
    cannot be reached.
    """
    check_source(task, data_root)
    if task.generated is not None:
        rows = ((None, row) for row in generate(task.generated, split))
        return _row_chunks(Columns(task, columns, f"the generated split {split!r}"), rows, chunk_rows)
    files = files_of(task, data_root, split)
    if files is None:
        return _hub_chunks(Columns(task, columns, str(task.hub)), split, chunk_rows, shuffle)
    return (
        chunk
        for path in _ordered(files, shuffle)
        for chunk in _file_chunks(Columns(task, columns, str(path)), path, chunk_rows)
    )


def _ordered(shards: Sequence[Shard], shuffle: Sequence[int] | None) -> list[Shard]:
    order = range(len(shards)) if shuffle is None else np.random.default_rng(shuffle).permutation(len(shards))
    return [shards[i] for i in order]


def _file_chunks(columns: Columns, path: Path, chunk_rows: int) -> Iterator[Chunk]:
    advice = "repair the file or write it as parquet"
    header = columns.task.header
    try:
        if path.suffix == ".parquet":
            for chunk in _parquet_chunks(columns, path, chunk_rows):
                yield chunk
                advice = f"what is behind row {chunk.first + len(chunk)} is damaged: repair the file"
        elif path.suffix in TABLES:
            yield from _row_chunks(columns, table_rows(path, header), chunk_rows, may_lack_header=not header)
        else:
            advice = "write one whole object {…} on each line, or one list [{…}, …] of objects"
            yield from _row_chunks(columns, json_rows(path), chunk_rows)
        return
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        reason, advice, cause = undecodable(path), "save the whole of it as UTF-8", error
    except (OSError, pa.ArrowException, ValueError, RecursionError) as error:
        reason, cause = " ".join(str(error).split()) or type(error).__name__, error
    raise UsageError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): {advice}.") from cause


def _row_chunks(
    columns: Columns, rows: Iterable[Record], chunk_rows: int, may_lack_header: bool = False
) -> Iterator[Chunk]:
    """`may_lack_header`: the columns may be the first row of a table."""
    stream, first = iter(rows), 0
    while records := list(islice(stream, chunk_rows)):
        if not first:
            _check_cells(columns, [record for _, record in records], may_lack_header)
        yield Chunk(columns, first, records)
        first += len(records)


def _check_cells(columns: Columns, records: Sequence[dict[str, Any]], may_lack_header: bool) -> None:
    """The columns of rows that have no schema are those that the first of them hold."""
    there = list(dict.fromkeys(name for record in records for key in record for name in _names(key, record[key])))
    for field, column in columns.of_field.items():
        head = _path(column, there)[0]
        empty = head in there and not any(record.get(head) for record in records)  # what is inside is unknown
        if column not in there and not empty:
            raise columns.missing(field, there, header_advice(there, columns.where) if may_lack_header else "")


def _names(key: str, value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [key, *(f"{key}.{name}" for item in items if isinstance(item, dict) for name in item)]


def _parquet_chunks(columns: Columns, path: Path, chunk_rows: int) -> Iterator[Chunk]:
    first = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(chunk_rows, columns=_heads(columns, file.schema_arrow)):
            yield Chunk(columns, first, _arrow_records(batch))
            first += len(batch)


def _hub_chunks(columns: Columns, split: str, chunk_rows: int, shuffle: Sequence[int] | None) -> Iterator[Chunk]:
    task, data = columns.task, _hub_split(columns.task, split)
    table = data.select_columns(_heads(columns, data.features.arrow_schema)).with_format("arrow")
    of_split = Columns(task, columns.of_field, f"split {split!r} of {task.hub}")
    for start in _ordered(range(0, len(table), chunk_rows), shuffle):
        yield Chunk(of_split, start, _arrow_records(table[start : start + chunk_rows]))


def _hub_split(task: TaskConfig, split: str) -> Any:
    try:
        return datasets.load_dataset(str(task.hub), task.hub_config, split=split, revision=task.hub_revision)
    except Exception as error:
        reason = reason_of(error)
        if isinstance(error, ValueError) and "split" in reason.lower():
            raise UsageError(
                f"{task.hub} has no split {split!r} ({reason}): choose one with task.train_split or task.eval_split."
            ) from error
        raise UsageError(
            f"{task.hub} cannot be loaded from the hub ({reason}): check the network and the id, or read local "
            f"files with data.root=DIR (holding {task.name}/{split}.parquet) or "
            f"{key_of(task, 'files', split)}=FILE."
        ) from error


def fingerprint(task: TaskConfig, data_root: str | None, split: str) -> str:
    """What the content of a split is known by, wherever it lies: a hash of its files, or what it is made of.

    Raises `UsageError` as `read_columns` does.
    """
    check_source(task, data_root)
    if task.generated is not None:
        return f"generated {sorted(asdict(task.generated).items())}"
    files = files_of(task, data_root, split)
    if files is None:
        return f"hub {_hub_split(task, split)._fingerprint}"
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(f"{path.suffix} {path.stat().st_size} ".encode())
        digest_file(digest, path)
    return f"files {digest.hexdigest()}"


def _heads(columns: Columns, schema: pa.Schema) -> list[str]:
    """The top-level columns that the fields need from an Arrow schema. Raises `UsageError`."""
    there = []
    for column in schema:
        lists = isinstance(column.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
        inside = column.type.value_type if lists else column.type
        names = [f"{column.name}.{child.name}" for child in inside] if pa.types.is_struct(inside) else []
        there += [column.name, *names]
    for field, column in columns.of_field.items():
        if column not in there:
            raise columns.missing(field, there)
    heads = list(dict.fromkeys(_path(column, schema.names)[0] for column in columns.of_field.values()))
    for name in (*columns.of_field.values(), *heads):
        if there.count(name) > 1:
            raise UsageError(f"{columns.where} has several columns named {name!r}: rename all but one of them.")
    return heads


def _arrow_records(batch: Any) -> list[Record]:
    """The rows of an Arrow batch or table; a value that Arrow cannot give is there as a `CellError`."""
    cells = [_python_values(batch.column(number)) for number in range(batch.num_columns)]
    return [(None, dict(zip(batch.schema.names, row, strict=True))) for row in zip(*cells, strict=True)]


def _python_values(values: Any) -> list[Any]:
    def one(scalar: Any) -> Any:
        try:
            return scalar.as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            reason = reason_of(error)
            return CellError(f"a value of type {values.type} that cannot be read ({reason})", "a cell is readable")

    try:
        return values.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        return [one(scalar) for scalar in values]


def _path(column: str, names: Iterable[str]) -> tuple[str, str]:
    """(top-level column, field inside it or ""); a column whose own name holds a dot is taken as it is."""
    head, _, inner = column.partition(".")
    return (column, "") if column in names else (head, inner)


def _cell(record: dict[str, Any], column: str) -> Any:
    """The cell of a row. Of a dotted column: the field of the struct, or of each struct in a list.

    Raises `CellError`.
    """
    head, inner = _path(column, record)
    cell = record.get(head)
    if isinstance(cell, CellError):
        raise cell
    if not inner or cell is None:
        return cell
    if isinstance(cell, list):
        odd = [item for item in cell if not isinstance(item, dict | None)]
        if odd:
            raise CellError(f"{of_type(odd[0])} inside a list", DOTTED)
        return [None if item is None else item.get(inner) for item in cell]
    if not isinstance(cell, dict):
        raise CellError(of_type(cell), DOTTED)
    return cell.get(inner)
