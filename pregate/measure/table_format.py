"""How measured figures are written: numbers and names as text, and one table for files, the terminal and pages.

Knows nothing about what was measured or how. A figure that was not measured is a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

Row = Mapping[str, Any]
CellWriter = Callable[[Row], str | None]
"""Writes one value of a row as text; None where the row does not have it."""

ABSENT = "–"
POLICY_LABELS = {
    "gpu_only": "GPU only",
    "on_demand": "On demand",
    "prefetch_all": "Prefetch all",
    "pre_gated": "Pre-gated",
}
OURS = ("pre_gated", POLICY_LABELS["pre_gated"])
"""Rows that begin with one of these are emphasised."""
BYTE_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1.0}
COUNTS = ("B", "kB", "experts", "%")
"""Units that are written without decimals."""


def policy_label(policy: str) -> str:
    return POLICY_LABELS.get(policy, policy.replace("_", " "))


# --- numbers --------------------------------------------------------------------------------------------------------


def three_digits(value: float) -> str:
    """Three significant digits, zeros kept: 12.0, 0.421, 190."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def short_number(value: float | None) -> str:
    """At most three significant digits, zeros dropped, without an exponent; a dash for None."""
    return ABSENT if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def signed(value: float, decimals: int = 1) -> str:
    """A difference with its sign and a true minus; what rounds to nothing has no sign."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def in_one_unit(values: Sequence[float | None], unit: str) -> tuple[str, list[str]]:
    """The unit of a column and its cells, all with the same unit and decimals so that they compare at a glance.

    The unit `bytes` becomes the one that fits the largest value.
    """
    known = [abs(value) for value in values if value is not None]
    scale = 1.0
    if unit == "bytes":
        largest = max(known, default=1e6)
        unit, scale = next((pair for pair in BYTE_UNITS.items() if largest >= pair[1]), ("B", 1.0))
    smallest = min((value / scale for value in known if value > 0), default=1.0)
    decimals = 0 if smallest >= 100 or unit in COUNTS else 1 if smallest >= 10 else 2 if smallest >= 0.1 else 3
    return unit, [ABSENT if value is None else f"{value / scale:,.{decimals}f}" for value in values]


def number(key: str, scale: float = 1.0) -> CellWriter:
    """Writes `row[key] / scale` with three significant digits."""

    def write(row: Row) -> str | None:
        value = row.get(key)
        return None if value is None else "0" if value == 0 else three_digits(value / scale)

    return write


def short(key: str, scale: float = 1.0) -> CellWriter:
    """Writes `row[key] / scale` with at most three significant digits."""
    return lambda row: None if row.get(key) is None else short_number(row[key] / scale)


def text(key: str) -> CellWriter:
    return lambda row: None if row.get(key) is None else str(row[key])


def facts_line(facts: Mapping[str, Any]) -> str:
    """The environment or the settings of a run on one line, and the commit of its code where that is known."""
    plain = {key: value for key, value in facts.items() if not isinstance(value, Mapping)}
    lists = {key: ", ".join(map(str, value)) for key, value in plain.items() if isinstance(value, list)}
    line = ", ".join(f"{key} {value}" for key, value in {**plain, **lists}.items())
    git = facts.get("git") or {}
    return line + (f"; commit {git['commit']}{' with changes' if git.get('dirty') else ''}" if git else "")


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Headers and rows of text. The first `left` columns are flush left; the others hold numbers and are flush right.

    The second line of a header or cell is a note, such as a unit. `**` marks what is wrong, as in Markdown.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    left: int = 1

    @classmethod
    def of(cls, columns: Mapping[str, CellWriter], rows: Sequence[Row], **more: Any) -> Table:
        """A column for each writer by its header. A column that no row has a value for is left out."""
        written = {header: [write(row) for row in rows] for header, write in columns.items()}
        known = {header: cells for header, cells in written.items() if any(cell is not None for cell in cells)}
        lines = zip(*known.values(), strict=True)
        return cls(list(known), [[ABSENT if cell is None else cell for cell in line] for line in lines], **more)

    def markdown(self) -> str:
        """A pipe table whose columns are aligned in a plain editor too."""
        lines = [[cell.replace("\n", " ") for cell in line] for line in (self.headers, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * w if n < self.left else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
        lines.insert(1, rule)
        return "\n".join(f"| {' | '.join(self._padded(line, widths))} |" for line in lines)

    def _padded(self, line: Sequence[str], widths: Sequence[int]) -> Iterable[str]:
        for n, (cell, width) in enumerate(zip(line, widths, strict=True)):
            yield cell.ljust(width) if n < self.left else cell.rjust(width)

    def print(self, console: Console, width: int | None = None) -> None:
        """Title, caption and table on the terminal, at most `width` characters wide."""
        built = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for n, header in enumerate(self.headers):
            # on a narrow terminal a number is folded rather than cut: all of its digits stay
            built.add_column(
                Text(header), justify="left" if n < self.left else "right", overflow="fold", no_wrap=n == 0
            )
        for row in self.rows:
            cells = [Text(cell.replace("\n", " ").replace("**", ""), tone(cell)) for cell in row]
            built.add_row(*cells, style="bold" if row[0] in OURS else "")
        for line, style in ((self.title, "bold"), (self.caption, "dim")):
            if line:
                console.print(Text(line, style), width=width)
        console.print(built, width=width)


def tone(said: str) -> str:
    """The colour of a cell or sentence on the terminal: `**` marks what is wrong."""
    return "bold red" if "**" in said else "green" if said == "yes" else ""
