"""What a cell of the data says: a text, a whole number, a list of these, or a struct with a field `text`.

Knows plain Python values; knows nothing about files, tasks or scores. Each meaning below takes a cell of any type. It
gives what the cell says, None or () where that is nothing, and raises `CellError` for all else: a value that is no text
never becomes one in the way that Python writes it.
"""

from __future__ import annotations

import math
from typing import Any

from pregate.system.console import first_of


class CellError(ValueError):
    """A cell that cannot be used: it holds `holds`, where `needs` says what may stand there."""

    def __init__(self, holds: str, needs: str) -> None:
        super().__init__(f"it holds {holds}, but {needs}")
        self.holds, self.needs = holds, needs


def prompt_text(cell: Any) -> str | None:
    """What a prompt shows: a text as it is, a whole number as its digits, a list of texts joined with spaces."""
    return _joined(cell, "a prompt shows a text, a whole number or a list of texts", numbers=True)


def document(cell: Any) -> str | None:
    """A text to pre-train on: as it is, or a list of texts joined with spaces."""
    return _joined(cell, "a document is a text or a list of texts", numbers=False)


def summary(cell: Any) -> tuple[str, ...]:
    """The one summary of a cell: a text, or a list of sentences joined with spaces; () for an empty one."""
    text = (_joined(cell, "a summary is a text or a list of sentences", numbers=False) or "").strip()
    return (text,) if text else ()


def answers(cell: Any) -> tuple[str, ...]:
    """The distinct texts of a cell in order, without empty ones: of a text, a whole number, or a list of these."""
    needs = "an answer is a text or a whole number, and several are a list of these"
    cell = inside(cell)
    if isinstance(cell, list):
        return tuple(dict.fromkeys(_texts(cell, needs, numbers=True)))
    text = "" if cell is None else _text(cell, needs, numbers=True).strip()
    return (text,) if text else ()


def whole_text(cell: Any, needs: str) -> str:
    """A text as it is. Raises `CellError`, which says what the cell `needs`, for anything else."""
    return _text(cell, needs, numbers=False)


def identity(cell: Any) -> str | None:
    """An id as text; whole floats count as integers, because an integer column with gaps holds them."""
    whole = int(cell) if isinstance(cell, float) and cell.is_integer() else cell
    return None if cell is None else _text(whole, "an id is a text or a whole number", numbers=True)


def label_names(cell: Any) -> tuple[str, ...]:
    """The names that a label may be known by, the likeliest first: of a word, a whole number or a float; () for null.

    A float is itself, else the whole number that it is, because an integer column with gaps holds those.
    """
    if isinstance(cell, float) and math.isfinite(cell):
        return (str(cell), str(int(cell))) if cell.is_integer() else (str(cell),)
    return () if cell is None else (_text(cell, "a label is a word or a whole number", numbers=True).strip(),)


def inside(cell: Any) -> Any:
    """What a struct with a field `text` holds in it, such as SQuAD's answers; other cells as they are."""
    return cell["text"] if isinstance(cell, dict) and "text" in cell else cell


def of_type(value: Any) -> str:
    """The type of a value in words, such as "a list" or "a float (0.5)"."""
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"a float ({value})"
    if isinstance(value, dict) and "text" not in value:
        return (
            f"a struct without a field text ({len(value)} fields: {first_of([repr(name)[:40] for name in value], 4)})"
        )
    named = {bool: "a boolean", int: "a whole number", str: "a text", bytes: "bytes", list: "a list", dict: "a struct"}
    return named.get(type(value), f"a value of type {type(value).__name__}")


def _joined(cell: Any, needs: str, numbers: bool) -> str | None:
    cell = inside(cell)
    if not isinstance(cell, list):
        return None if cell is None else _text(cell, needs, numbers)
    # numbers in a list are token ids or labels rather than sentences
    return " ".join(_texts(cell, needs, numbers=False))


def _texts(items: list[Any], needs: str, numbers: bool) -> list[str]:
    """The texts of a list, stripped, without those that are null or empty."""
    found = [inside(item) for item in items]
    texts = [_text(item, needs, numbers, " inside a list").strip() for item in found if item is not None]
    return [text for text in texts if text]


def _text(value: Any, needs: str, numbers: bool, where: str = "") -> str:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise CellError(
                    f"a text with the lone surrogate {value[error.start]!a}", "a text consists of whole characters"
                ) from None
        return value
    if numbers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise CellError(of_type(value) + where, needs)
