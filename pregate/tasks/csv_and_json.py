"""Rows of csv, tsv, json and jsonl files, each with the line it begins in.

Knows the formats and their faults; knows nothing about tasks or what a cell means. A file that breaks its format ends
in a `ValueError` that names the line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pregate.config import UsageError
from pregate.tasks.cell_values import CellError

Record = tuple[int | None, dict[str, Any]]
"""The line of its file that a row begins in, where there are lines, and its cells by column."""
HEADER = "task.header=[NAME,…]"
LONGEST_CELL = 2**31 - 1
"""Characters of a csv cell; the csv module's own limit of 131072 is less than a long document."""
WRITTEN_OUT = re.compile(r"""\[\s*(?:\]|['"].*\]|\{\s*['"].*\])|\{\s*'.*\}|b'[^']*'|b"[^"]*\"""", re.DOTALL)
"""A list, struct or bytes as Python writes them, which is what pandas does with such a cell in a csv file."""


def table_rows(path: Path, header: Sequence[str]) -> Iterator[Record]:
    """The rows of a csv or tsv file, each with the line it begins in; cells that a short row lacks are null."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, "excel" if path.suffix == ".csv" else "excel-tab", strict=True)
        lines = _table_lines(reader)
        names = list(header) or _header(path, next(lines, (1, []))[1])
        for number, (line, cells) in enumerate(lines):
            if not number and cells == header:
                raise UsageError(f"{path} has the columns of task.header in its first line: leave task.header out.")
            if len(cells) > len(names):
                raise ValueError(f"line {line} has more cells than {'task.header' if header else 'the header'}")
            row: dict[str, Any] = dict.fromkeys(names)
            yield line, row | dict(zip(names, map(_text_or_fault, cells), strict=False))


def _text_or_fault(cell: str) -> str | CellError:
    """A cell of a table is text; a list, a struct or bytes as Python writes them is a `CellError`."""
    if WRITTEN_OUT.fullmatch(cell.strip()):
        return CellError("a list, a struct or bytes written as text", "only jsonl and parquet files hold such cells")
    return cell


def _table_lines(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The line that each row of a csv reader begins in, and its cells; empty lines are passed over."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "a cell that begins with a double quote must end with one, and double those inside it"
            raise ValueError(f"line {line}: {error}; {hint}") from error
        if any("\0" in cell for cell in cells):
            raise ValueError(f"line {line} holds a NUL byte")
        if cells:
            yield line, cells


def _header(path: Path, names: list[str]) -> list[str]:
    twice = [name for place, name in enumerate(names) if name and name in names[:place]]
    if twice:
        raise UsageError(
            f"The header of {path} names column {twice[0][:40]!r} twice: rename one of them, or where its first line "
            f"is no header, name all {len(names)} columns with {HEADER}."
        )
    return names


def json_rows(path: Path) -> Iterator[Record]:
    """One object a line, or one list of objects."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        file.seek(0)
        values = _json_list(file.read()) if start == "[" else _json_lines(file)
        for number, (line, row) in enumerate(values, start=1):
            if not isinstance(row, dict):
                where = "" if line is None else f" (line {line})"
                raise ValueError(f"record {number} is not an object with named columns{where}")
            yield line, row


def _json_list(text: str) -> list[tuple[None, Any]]:
    try:
        return [(None, value) for value in json.loads(text, object_pairs_hook=_object)]
    except json.JSONDecodeError as error:
        raise ValueError(_json_fault(error, error.lineno, _is_cut(error, text))) from error


def _json_lines(file: Iterable[str]) -> Iterator[tuple[int, Any]]:
    numbered = ((number, text) for number, text in enumerate(map(str.rstrip, file), start=1) if text)
    for line, text in numbered:
        try:
            yield line, json.loads(text, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            cut = _is_cut(error, text) and next(numbered, None) is None
            raise ValueError(_json_fault(error, line, cut)) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {line}: {error}") from error


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the text may only lack its end."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def _json_fault(error: json.JSONDecodeError, line: int, cut: bool) -> str:
    return f"line {line}, column {error.colno}: {error.msg}" + ("; the file is cut short there" if cut else "")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def undecodable(path: Path) -> str:
    """What is wrong with a file that is not UTF-8, with the first such line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                cut = error.reason == "unexpected end of data" and not line.endswith(b"\n")
                return f"line {number} ends inside a character" if cut else f"line {number} is not UTF-8"
    return "it changes while it is read"


def header_advice(names: Sequence[str], where: str) -> str:
    """What to do if `names`, the first line of a table, are no header: the end of a sentence.

    Raises `UsageError` for an only column that holds several names: it was read with a wrong separator.
    """
    other = next((sign for sign in (";", "\t", "|", ",") if len(names) == 1 and sign in names[0]), None)
    if other is not None:
        raise UsageError(
            f"{where} has one column, {names[0][:40]!r}: its cells seem to be separated by {other!r}. Separate them "
            "with commas, or with tabs in a file ending in .tsv."
        )
    columns = "the column" if len(names) == 1 else f"all {len(names)} columns"
    return f", or where its first line is no header, name {columns} with {HEADER}"
