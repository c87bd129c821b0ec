"""What a benchmark says: `bench.md` and the tables on the terminal, from the rows of `bench.jsonl` as plain dicts.

A value that all rows of a table share stands once in its caption instead of in a column. The explanations are in
`templates/bench.md.j2`. Knows nothing about how anything was measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pregate.config import Run
from pregate.measure.equality_words import EQUAL, equality, equality_statement
from pregate.measure.table_format import CellWriter, Row, Table, facts_line, number, short, text, tone
from pregate.measure.templates import fill
from pregate.system.byte_sizes import human_bytes
from pregate.system.durable import write_text

TEMPLATE = Path(__file__).with_name("templates") / "bench.md.j2"

# --- cells ----------------------------------------------------------------------------------------------------------


def _slabs(row: Row) -> str | None:
    if row.get("slab_dtype") is None:
        return None
    return f"{row['slab_dtype']}, {human_bytes(row['slab_bytes'])}" if row.get("slab_bytes") else str(row["slab_dtype"])


def _slots(row: Row) -> str | None:
    if row.get("slots") is None or row.get("policy") == "gpu_only":
        return None
    asked = row.get("budget")
    return f"{row['slots']} ({asked})" if asked else str(row["slots"])


def _time_and_range(row: Row) -> str | None:
    value, low, high = (number(key)(row) for key in ("tpot_ms", "tpot_ms_min", "tpot_ms_max"))
    return value if value is None or low is None or low == high else f"{value} ({low}–{high})"


def _relative(key: str) -> CellWriter:
    return lambda row: None if row.get(key) is None else f"{100 * row[key]:.2g}"


def _predicted(key: str) -> CellWriter:
    return lambda row: number(key)(row["predicted"]) if row.get("predicted") else None


@dataclass(frozen=True)
class Column:
    """`write` gives the cell of a row, and `terse` a shorter one for the terminal, where only some columns fit.

    `caption` is how the value reads in the caption when all rows share it; without one the column always stands.
    """

    header: str
    write: CellWriter
    caption: str | None = None
    on_terminal: bool = False
    terse: CellWriter | None = None


COLUMNS = (
    Column("policy", text("policy"), on_terminal=True),
    Column("tier", text("tier"), "tier {}", on_terminal=True),
    Column("drive", text("drive"), "{}-driven", on_terminal=True),
    Column("slabs", _slabs, "slabs {}", on_terminal=True, terse=text("slab_dtype")),
    Column("batch", text("batch"), "batch {}", on_terminal=True),
    Column("cache", text("cache"), "cache {}", on_terminal=True),
    Column("slots", _slots, "slots {}", on_terminal=True),
    Column("host cache", text("host_budget"), "host cache {}"),
    Column("prompt", text("prompt_len"), "prompts of {} tokens"),
    Column("chunk", text("prefill_chunk"), "read in chunks of {}"),
    Column("new tokens", text("new_tokens"), "{} new tokens"),
    Column("experts/block", short("active_experts"), "experts a block and step: {}", on_terminal=True),
    Column("block ms", number("block_ms")),
    Column("ms/token", _time_and_range, on_terminal=True, terse=number("tpot_ms")),
    Column("tokens/s", number("tokens_per_s"), on_terminal=True),
    Column("× on_demand", number("times_on_demand")),
    Column("waiting ms", number("exposed_ms_per_token")),
    Column("MB/step", number("link_bytes_per_step", 1e6), on_terminal=True),
    Column("GB/s", number("link_gb_per_s")),
    Column("T_link ms", number("link_ms")),
    Column("T_compute ms", number("compute_ms"), "T_compute {} ms"),
    Column("floor ms", number("floor_ms")),
    Column("÷ floor", number("over_floor"), on_terminal=True),
    Column("gain allowed", number("possible_gain")),
    Column("predicted tokens/s", _predicted("tokens_per_s")),
    Column("peak GB", number("peak_device_bytes", 1e9), on_terminal=True),
    Column("expected GB", number("expected_bytes", 1e9)),
    Column("÷ expected", number("peak_over_expected")),
    Column("tokens equal", equality, on_terminal=True),
    Column("logits differ by", number("logits_max_diff"), "logits differ by at most {}"),
    Column("logits off %", _relative("logits_rel_diff")),
    Column("step off %", _relative("step_logits_rel_diff")),
)

# --- tables ---------------------------------------------------------------------------------------------------------


MODEL = ("model", "dtype", "lookahead", "entry", "gates", "blocks")
"""What rows of one table have in common."""


def bench_tables(rows: Sequence[Row], terminal: bool = False) -> list[Table]:
    """A table for each model, in the order of measuring; for the terminal, with the columns that fit there."""
    by_model: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        by_model.setdefault(tuple(row.get(name) for name in MODEL), []).append(row)
    return [_table(in_order(with_speedups(mine)), terminal) for mine in by_model.values()]


def _table(rows: Sequence[Row], terminal: bool) -> Table:
    model, dtype, lookahead, entry, gates, blocks = (rows[0].get(name) for name in MODEL)
    caption = ["conventional" if lookahead == 0 else f"lookahead {lookahead}, entry {entry}"]
    caption += [gates] if gates else []
    caption += [f"{blocks} MoE blocks"] if blocks else []
    columns: dict[str, CellWriter] = {}
    for column in COLUMNS:
        known = {cell for row in rows if (cell := column.write(row)) is not None}
        if column.caption is not None and len(known) == 1:
            caption.append(column.caption.format(*known))
        elif column.write is equality and known == {EQUAL}:
            continue  # a sentence below the tables says so of all rows
        elif not terminal or column.on_terminal:
            columns[column.header] = (terminal and column.terse) or column.write
    packing = {row.get("slab_dtype"): row["peak_bytes_packing"] for row in rows if row.get("peak_bytes_packing")}
    caption += [f"peak while packing {slabs} slabs {human_bytes(size)}" for slabs, size in packing.items()]
    return Table.of(columns, rows, title=f"{model}, {dtype}", caption=" · ".join(caption))


ORDER = ("resident", "gpu_only", "pre_gated", "on_demand", "prefetch_all", "accelerate")
CACHES = ("none", "lru", "lfu", "lifo")


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Loads together; within one, the whole model first, then by tier and slabs from the fastest policy in
    principle, caches and budgets from none up."""
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    policy, cache = str(row.get("policy")), row.get("cache")
    rank = next((place for place, name in enumerate(ORDER) if policy.startswith(name)), len(ORDER))
    return (
        row.get("batch") or 0,
        row.get("forced_experts") or 0,
        rank if rank == 0 else 1,  # the whole model belongs to every tier and slab
        row.get("tier") or "",
        row.get("slab_dtype") != "source" and row.get("slab_dtype") is not None,
        rank,
        CACHES.index(cache) if cache in CACHES else -1,
        row.get("slots") or 0,
    )


LOAD = ("model", "dtype", "batch", "forced_experts", "prompt_len")
OWN = ("tier", "budget", "host_budget", "drive")
"""Settings that a row without an engine does not have. It is compared with every rival then."""


def with_speedups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with `times_on_demand`: tokens/s over those of on_demand without a cache under the same load, tier,
    slabs and budget; without it where there is none such, or more than one."""

    def comparable(row: Row, rival: Row) -> bool:
        same_load = all(row.get(key) == rival.get(key) for key in LOAD)
        same_settings = all(row.get(key) in (None, rival.get(key)) for key in OWN)
        return same_load and same_settings and (row.get("slab_dtype") or "source") == rival.get("slab_dtype")

    rivals = [row for row in rows if row.get("policy") == "on_demand" and row.get("cache") == "none"]
    found = []
    for row in rows:
        speeds = [rival["tokens_per_s"] for rival in rivals if rival.get("tokens_per_s") and comparable(row, rival)]
        known = len(speeds) == 1 and row.get("tokens_per_s") is not None
        found.append({**row, **({"times_on_demand": row["tokens_per_s"] / speeds[0]} if known else {})})
    return found


# --- the file and the terminal --------------------------------------------------------------------------------------


def write_bench(path: Path, rows: Sequence[Row], run: Run, environment: Mapping[str, Any]) -> None:
    """`bench.md`: the tables, how to read them, where they come from."""
    page = fill(
        TEMPLATE,
        name=run.name,
        commands=list(dict.fromkeys(row["command"] for row in rows if "command" in row)) or [command(run.overrides)],
        tables=bench_tables(rows),
        statement=equality_statement(rows),
        policies={row.get("policy") for row in rows},
        drives={row.get("drive") for row in rows},
        measured={key for row in rows for key, value in row.items() if value is not None},
        most_repeats=max((row.get("repeats") or 1 for row in rows), default=1),
        environment=facts_line(environment),
    )
    write_text(path, page)


SHORT_FIGURES = {
    "{} ms/token": _time_and_range,
    "{} tokens/s": number("tokens_per_s"),
    "{} × floor": number("over_floor"),
    "peak {} GB": number("peak_device_bytes", 1e9),
    "tokens equal: {}": equality,
}


def short_figures(row: Row) -> str:
    """A row in one line, for the user who watches."""
    cells = ((form, write(row)) for form, write in SHORT_FIGURES.items())
    return ", ".join(form.format(cell.replace("**", "")) for form, cell in cells if cell is not None)


def print_bench(rows: Sequence[Row], console: Console) -> None:
    for table in bench_tables(rows, terminal=True):
        table.print(console)
    if statement := equality_statement(rows):
        console.print(Text(statement.replace("**", ""), tone(statement) or "green"))


def command(overrides: Sequence[str]) -> str:
    """The command as it may be typed anywhere: places outside the current directory read DIR."""
    words = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and value.startswith(("/", "~")):
            place = Path(value).expanduser()
            value = str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else "DIR"
        words.append(shlex.quote(f"{key}{equals}{value}"))
    return " ".join(["python -m pregate.bench", *words])
