"""What a benchmark says: `bench.md` and the table on the terminal, from the rows of `bench.jsonl` as plain dicts.

What is the same in all rows of a table stands once in its caption instead of in a column. A figure that was not
measured is absent in a row and a dash here. Knows nothing about how anything was measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pregate.config import Run
from pregate.measure.plots import three_digits
from pregate.measure.summary import ABSENT
from pregate.system.durable import write_text
from pregate.system.sizes import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """`cell` writes a row's value, None where it has none. `caption`: how the value reads in the caption when all
    rows share it; without one the column always stands. `terminal`: the cell on the terminal, where room is short;
    without one the column is not there."""

    header: str
    cell: Callable[[Row], str | None]
    caption: str | None = None
    terminal: Callable[[Row], str | None] | None = None


def _number(key: str, scale: float = 1.0) -> Callable[[Row], str | None]:
    def cell(row: Row) -> str | None:
        value = row.get(key)
        return None if value is None else "0" if value == 0 else three_digits(value / scale)

    return cell


def _text(key: str) -> Callable[[Row], str | None]:
    return lambda row: None if row.get(key) is None else str(row[key])


def _slabs(row: Row) -> str | None:
    if row.get("slab_dtype") is None:
        return None
    return f"{row['slab_dtype']}, {human_bytes(row['slab_bytes'])}" if row.get("slab_bytes") else str(row["slab_dtype"])


def _experts(row: Row) -> str | None:
    value = row.get("active_experts")
    return None if value is None else f"{value:.3g}"


def _budget(row: Row) -> str | None:
    if row.get("slots") is None or row.get("policy") == "gpu_only":
        return None
    asked = row.get("budget")
    return f"{row['slots']} ({asked})" if asked else str(row["slots"])


def _spread(row: Row) -> str | None:
    value = _number("tpot_ms")(row)
    low, high = _number("tpot_ms_min")(row), _number("tpot_ms_max")(row)
    return value if value is None or low is None or low == high else f"{value} ({low}–{high})"


def _equal(row: Row) -> str | None:
    if row.get("logits_finite") is False:
        return "**NaN**"
    same = row.get("tokens_equal_resident")
    if same and row.get("logits_equal_resident") is False:
        return "**logits NO**"
    until = row.get("tokens_equal_until")
    return None if same is None else "yes" if same else "**NO**" if until is None else f"**NO**, first {until:,}"


def _relative(key: str) -> Callable[[Row], str | None]:
    return lambda row: None if row.get(key) is None else f"{100 * row[key]:.2g}"


def _predicted(key: str) -> Callable[[Row], str | None]:
    return lambda row: _number(key)(row["predicted"]) if row.get("predicted") else None


POLICY, BATCH, CACHE, SLOTS, SPEED = _text("policy"), _text("batch"), _text("cache"), _budget, _number("tokens_per_s")
MOVED, OVER, PEAK = _number("link_bytes_per_step", 1e6), _number("over_floor"), _number("peak_device_bytes", 1e9)
COLUMNS = (
    Column("policy", POLICY, terminal=POLICY),
    Column("tier", _text("tier"), "tier {}", _text("tier")),
    Column("drive", _text("drive"), "{}-driven", _text("drive")),
    Column("slabs", _slabs, "slabs {}", _text("slab_dtype")),
    Column("batch", BATCH, "batch {}", BATCH),
    Column("cache", CACHE, "cache {}", CACHE),
    Column("slots", SLOTS, "slots {}", SLOTS),
    Column("host cache", _text("host_budget"), "host cache {}"),
    Column("prompt", _text("prompt_len"), "prompts of {} tokens"),
    Column("new tokens", _text("new_tokens"), "{} new tokens"),
    Column("experts/block", _experts, "experts a block and step: {}", _experts),
    Column("block ms", _number("block_ms")),
    Column("ms/token", _spread, terminal=_number("tpot_ms")),
    Column("tokens/s", SPEED, terminal=SPEED),
    Column("× on_demand", _number("times_on_demand")),
    Column("waiting ms", _number("exposed_ms_per_token")),
    Column("MB/step", MOVED, terminal=MOVED),
    Column("GB/s", _number("link_gb_per_s")),
    Column("T_link ms", _number("link_ms")),
    Column("T_compute ms", _number("compute_ms"), "T_compute {} ms"),
    Column("floor ms", _number("floor_ms")),
    Column("÷ floor", OVER, terminal=OVER),
    Column("gain allowed", _number("possible_gain")),
    Column("predicted tokens/s", _predicted("tokens_per_s")),
    Column("peak GB", PEAK, terminal=PEAK),
    Column("expected GB", _number("expected_bytes", 1e9)),
    Column("tokens equal", _equal, terminal=_equal),
    Column("logits differ by", _number("logits_max_diff"), "logits differ by at most {}"),
    Column("logits off %", _relative("logits_rel_diff")),
    Column("step off %", _relative("step_logits_rel_diff")),
)
ORDER = ("resident", "gpu_only", "pre_gated", "on_demand", "prefetch_all", "accelerate")
CACHES = ("none", "lru", "lfu", "lifo")


@dataclass(frozen=True)
class BenchTable:
    """One model's rows: title, caption, headers and cells."""

    title: str
    caption: str
    headers: list[str]
    cells: list[list[str]]


def bench_tables(rows: Sequence[Row], terminal: bool = False) -> list[BenchTable]:
    """A table for each model, in the order of measuring; for the terminal, with the columns that fit there."""
    by_model: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("model", "dtype", "lookahead", "entry"))
        by_model.setdefault(key, []).append(row)
    return [_table(key, mine, terminal) for key, mine in by_model.items()]


def _table(key: tuple[Any, ...], rows: Sequence[Row], terminal: bool) -> BenchTable:
    model, dtype, lookahead, entry = key
    rows = in_order(with_speedups(rows))
    caption = ["conventional" if lookahead == 0 else f"lookahead {lookahead}, entry {entry}"]
    headers, columns = [], []
    for column in COLUMNS:
        known = [cell for row in rows if (cell := column.cell(row)) is not None]
        write = column.terminal if terminal else column.cell
        if known and column.caption is not None and len(set(known)) == 1:
            caption.append(column.caption.format(known[0]))
        elif known and write is not None and not (column.cell is _equal and set(known) == {"yes"}):
            headers.append(column.header)
            columns.append([ABSENT if (cell := write(row)) is None else cell for row in rows])
    packing = {row.get("slab_dtype"): row["peak_bytes_packing"] for row in rows if row.get("peak_bytes_packing")}
    caption += [f"peak while packing {slabs} slabs {human_bytes(size)}" for slabs, size in packing.items()]
    cells = [list(row) for row in zip(*columns, strict=True)]
    return BenchTable(f"{model}, {dtype}", " · ".join(caption), headers, cells)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Loads together; within one, the whole model first, then by tier and slabs from the fastest policy in
    principle, caches and budgets from none up."""
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    policy, cache = str(row.get("policy")), row.get("cache")
    rank = next((number for number, name in enumerate(ORDER) if policy.startswith(name)), len(ORDER))
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


def with_speedups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with `times_on_demand`: tokens/s over those of on_demand without a cache under the same load, tier,
    slabs and budget."""

    def same(row: Row, other: Row) -> bool:
        load = all(
            row.get(key) == other.get(key) for key in ("model", "dtype", "batch", "forced_experts", "prompt_len")
        )
        own = all(row.get(key) in (None, other.get(key)) for key in ("tier", "budget", "host_budget", "drive"))
        return load and own and (row.get("slab_dtype") or "source") == other.get("slab_dtype")

    base = [row for row in rows if row.get("policy") == "on_demand" and row.get("cache") == "none"]
    found = []
    for row in rows:
        rivals = [rival for rival in base if same(row, rival)]
        speeds = [rival["tokens_per_s"] for rival in rivals if rival.get("tokens_per_s")]
        fits = len(speeds) == 1 and row.get("tokens_per_s") is not None
        found.append({**row, **({"times_on_demand": row["tokens_per_s"] / speeds[0]} if fits else {})})
    return found


def short_figures(row: Row) -> str:
    """A row in one line, for the user who watches."""
    parts = [
        (_spread(row), "{} ms/token"),
        (_number("tokens_per_s")(row), "{} tokens/s"),
        (_number("over_floor")(row), "{} × floor"),
        (_number("peak_device_bytes", 1e9)(row), "peak {} GB"),
        (_said_of_tokens(row), "{}"),
    ]
    return ", ".join(text.format(value) for value, text in parts if value is not None)


def _said_of_tokens(row: Row) -> str | None:
    if row.get("logits_finite") is False:
        return "logits NOT FINITE"
    same = row.get("tokens_equal_resident")
    if same and row.get("logits_equal_resident") is False:
        return f"tokens equal, logits DIFFER by {_number('logits_max_diff')(row)}"
    return None if same is None else "tokens equal" if same else "tokens DIFFER"


# --- markdown -------------------------------------------------------------------------------------------------------


def write_bench(path: Path, rows: Sequence[Row], run: Run, environment: Mapping[str, Any]) -> None:
    """`bench.md`: the tables, how to read them, where they come from."""
    commands = dict.fromkeys(row["command"] for row in rows if "command" in row) or [command(run.overrides)]
    parts = [f"# {run.name}", "\n".join(["```", *commands, "```"])]
    for table in bench_tables(rows):
        parts += [f"## {table.title}", f"{table.caption}.", _markdown(table)]
    parts += [verdict(rows), "\n".join(f"- {note}" for note in notes(rows)), _environment(environment)]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")


def _markdown(table: BenchTable) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(table.headers, *table.cells, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if n == 0 else "-" * (w - 1) + ":" for n, w in enumerate(widths)]
    return "\n".join([line(table.headers), line(rule), *(line(cells) for cells in table.cells)])


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


def verdict(rows: Sequence[Row]) -> str:
    """Whether all rows decoded the whole model's tokens with its logits, as a sentence; empty if nobody looked."""
    broken = [row for row in rows if row.get("logits_finite") is False]
    if broken:
        return f"**Logits are NaN or infinite in {len(broken)} of {len(rows)} rows: {_policies(broken)}.**"
    looked = [row for row in rows if row.get("tokens_equal_resident") is not None]
    said = []
    for what, key in (("Tokens", "tokens_equal_resident"), ("Logits", "logits_equal_resident")):
        compared = [row for row in rows if row.get(key) is not None]
        wrong = [row for row in compared if not row[key]]
        if wrong:
            said.append(
                f"**{what} differ from the whole model's in {len(wrong)} of {len(compared)} rows: {_policies(wrong)}.**"
            )
    if said:
        return " ".join(said)
    return f"Tokens equal the whole model's in {len(looked)} of {len(looked)} rows compared." if looked else ""


def _policies(rows: Sequence[Row]) -> str:
    return ", ".join(str(row.get("policy")) for row in rows)


def notes(rows: Sequence[Row]) -> list[str]:
    """How to read the tables: only what these rows need."""
    policies = {str(row.get("policy")) for row in rows}
    most = max((row.get("repeats") or 1 for row in rows), default=1)
    found = ["resident: the whole model in memory through Hugging Face `generate`."] if "resident" in policies else []
    found += [
        f"Medians over up to {most} requests after a warm-up, for ms/token with their range. Every request is a new "
        "random prompt, the same for every row, decoded greedily without repeating a token: random weights would "
        "otherwise decode into a loop, and flatter caches. tokens/s is of the whole batch while decoding; a step "
        "decodes one token of every sequence."
    ]
    if any(row.get("link_ms") is not None for row in rows):
        found.append(
            "T_link: bytes a step moves ÷ the bandwidth measured right before and after the row with whole slabs. "
            "T_compute: a token's time with everything in memory; at batch 1 on the same geometry with few experts, "
            "right before and after the row, because a shared machine changes from row to row, else that of the "
            "resident row. Floor: the larger of the two, "
            "which perfect overlap would reach; gain allowed: their sum ÷ the floor, the most that overlap can bring. "
            "× on_demand: tokens/s over those of on_demand without a cache."
        )
    if any(row.get("drive") == "device" for row in rows):
        found.append(
            "device: a decoding step routes, fetches and computes without the host; its time is that of all steps of a "
            "request together, since nothing can be timed inside one. T_compute of these rows: their own gpu_only row."
        )
    if any(row.get("predicted") for row in rows):
        found.append(
            "Predicted: what `plan=true` says of the row, from the link beside it and a step timed on the same "
            "geometry with few experts."
        )
    if any(row.get("expected_bytes") is not None for row in rows):
        found.append(
            "Peak: measured over opening and serving. Expected: computed, non-expert weights + slots + staging, no "
            "activations."
        )
    if any(policy.startswith("accelerate") and policy.endswith("warm") for policy in policies):
        found.append(
            "Accelerate reads its files through the page cache, which was dropped before every step (untimed), since "
            "the engine reads past it; the row with a warm page cache is the same without that."
        )
    if any(row.get("tokens_equal_until") is not None for row in rows):
        found.append(
            "Tokens equal, first N: so many new tokens before a row has another one than the whole model, in the "
            "request that departs first. In bfloat16 two best logits are often equal, and steps that sum in another "
            "order then decode another text; so do wrong ones, and the logits tell which it is."
        )
    if any(row.get("logits_max_diff") is not None for row in rows):
        found.append(
            "Logits differ by: the largest difference from the whole model's with the same weights, given its first "
            "tokens. `logits NO`: the norm of the difference is more of their norm than rounding explains."
        )
    if any(row.get("step_logits_rel_diff") is not None for row in rows):
        found.append(
            "Step off: the logits of captured steps, given the whole model's tokens, from those of the whole model "
            "with the same weights; norm of the difference ÷ norm."
        )
    if any(row.get("logits_rel_diff") is not None for row in rows):
        found.append(
            "Quantised slabs: tokens are compared with the whole model holding the same dequantised weights; logits "
            "off by: norm of the difference from the unquantised model's ÷ their norm, targets given as input."
        )
    return found


def _environment(facts: Mapping[str, Any]) -> str:
    plain = [
        f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in facts.items()
        if key != "git"
    ]
    git = facts.get("git") or {}
    commit = f"; commit {git['commit']}{' with changes' if git.get('dirty') else ''}" if git else ""
    return f"Environment: {', '.join(plain)}{commit}."


# --- the terminal ---------------------------------------------------------------------------------------------------


def print_bench(rows: Sequence[Row], console: Console) -> None:
    """The tables on the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for table in bench_tables(rows, terminal=True):
        built = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, header in enumerate(table.headers):
            built.add_column(Text(header), justify="left" if number == 0 else "right")
        for cells in table.cells:
            plain = [Text(cell.replace("**", "")) for cell in cells]
            built.add_row(*plain, style="bold" if cells[0] == "pre_gated" else "")
        console.print(Text(table.title, "bold"))
        console.print(Text(table.caption, "dim"))
        console.print(built)
    said = verdict(rows).replace("**", "")
    if said:
        console.print(Text(said, "green" if said.startswith("Tokens equal") else "bold red"))
