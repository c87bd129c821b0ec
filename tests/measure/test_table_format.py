"""How numbers are written, and one table in its three forms."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from pregate.measure.table_format import (
    Table,
    facts_line,
    in_one_unit,
    number,
    short_number,
    signed,
    text,
    three_digits,
)


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        ([1.234, 120.0], "ms", ("ms", ["1.23", "120.00"])),
        ([0.0, 0.0123], "ms", ("ms", ["0.000", "0.012"])),
        ([110.0, 1234.5], "ms", ("ms", ["110", "1,234"])),
        ([None, None], "bytes", ("MB", ["–", "–"])),
        ([512, None], "bytes", ("B", ["512", "–"])),
        ([2_000_000, 45_000_000], "bytes", ("MB", ["2.00", "45.00"])),
    ],
)
def test_a_column_has_one_unit(values: list[float | None], unit: str, expected: tuple[str, list[str]]) -> None:
    assert in_one_unit(values, unit) == expected


@pytest.mark.parametrize(("value", "text"), [(0.44, "+0.4"), (-0.44, "−0.4"), (0.04, "0.0"), (-0.04, "0.0")])
def test_signed(value: float, text: str) -> None:
    assert signed(value) == text


@pytest.mark.parametrize(
    ("value", "three", "short"),
    [(12.0, "12.0", "12"), (0.4213, "0.421", "0.421"), (190.0, "190", "190"), (1234.5, "1,234", "1,234")],
)
def test_three_digits(value: float, three: str, short: str) -> None:
    assert (three_digits(value), short_number(value)) == (three, short)


def made() -> Table:
    rows = [{"policy": "pre_gated", "ms": 12.0}, {"policy": "on_demand", "ms": None, "GB": 0}]
    columns = {"policy": text("policy"), "ms": number("ms"), "MB": number("GB", 1e-3), "unknown": number("other")}
    return Table.of(columns, rows, title="Title", caption="Caption")


def test_a_column_that_no_row_has_is_left_out_and_a_value_that_is_missing_is_a_dash() -> None:
    table = made()
    assert table.headers == ["policy", "ms", "MB"]
    assert table.rows == [["pre_gated", "12.0", "–"], ["on_demand", "–", "0"]]


def test_markdown_is_aligned() -> None:
    assert made().markdown().splitlines() == [
        "| policy    |   ms |  MB |",
        "| --------- | ---: | --: |",
        "| pre_gated | 12.0 |   – |",
        "| on_demand |    – |   0 |",
    ]
    assert Table(["a", "b"], [["x", "1\n[0, 2]"]], left=2).markdown().splitlines() == [
        "| a   | b        |",
        "| --- | -------- |",
        "| x   | 1 [0, 2] |",
    ]


def printed(table: Table, width: int) -> str:
    out = StringIO()
    table.print(Console(file=out, width=width))
    return out.getvalue()


def test_the_terminal_shows_what_markdown_would_not() -> None:
    table = Table(["policy", "time\nms"], [["x", "**NO**\n[bold]1[/nonsense]"]], title="[t]")
    lines = [line.split() for line in printed(table, 60).splitlines() if line.strip()]
    assert lines[0] == ["[t]"]
    assert lines[1:3] == [["time"], ["policy", "ms"]]
    assert lines[-1] == ["x", "NO", "[bold]1[/nonsense]"]


def test_a_narrow_terminal_loses_no_digit() -> None:
    table = Table(["policy", *"abcd"], [["pre_gated", *["1234567"] * 4]])
    text = printed(table, 30)
    assert "…" not in text and sum(text.count(digit) for digit in "1234567") == 28


def test_facts_stand_on_one_line() -> None:
    facts = {"torch": "2.0", "gpu": ["A", "B"], "git": {"commit": "c0ffee", "dirty": True}}
    assert facts_line(facts) == "torch 2.0, gpu A, B; commit c0ffee with changes"
    assert facts_line({"batch": 1}) == "batch 1"
