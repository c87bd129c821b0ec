"""The figures of a benchmark: grouped bars of time, speed, block latency and memory, with the floor as a line.

Knows the rows of `bench.jsonl` as plain dicts; knows nothing about how they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pregate.measure.bench.table import in_order
from pregate.measure.plots import COMPUTE, INK, QUIET, TRANSFER, WAIT, write_figure
from pregate.measure.tables import policy_label, three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


@dataclass(frozen=True)
class BarPlot:
    """One figure: the field it shows, what it is called, and the field and name of the limit to mark."""

    name: str
    key: str
    title: str
    limit: str | None = None
    limit_name: str = ""
    scale: float = 1.0


PLOTS = (
    BarPlot("time_per_token", "tpot_ms", "Time per token, ms", "floor_ms", "Floor"),
    BarPlot("throughput", "tokens_per_s", "Tokens per second while decoding", "roofline_tokens_per_s", "Roofline"),
    BarPlot("block_latency", "block_ms", "One decoder layer with an MoE block, ms"),
    BarPlot("peak_memory", "peak_device_bytes", "Measured peak memory of the device, GB", scale=1e9),
)
COLORS = {
    "resident": "#5b6770",
    "gpu_only": QUIET,
    "pre_gated": COMPUTE,
    "on_demand": TRANSFER,
    "prefetch_all": WAIT,
    "accelerate": "#8a6fb0",
}
LABELS = {"resident": "Whole model", "accelerate": "Accelerate", "accelerate, page cache warm": "Accelerate, warm"}
SHADES = {"none": 1.0, "lru": 0.75, "lfu": 0.55, "lifo": 0.35}
"""How much of a policy's colour is left with each cache."""
LOG_ABOVE = 20
"""Where the largest bar is more than so many times the smallest, the axis is logarithmic."""
MOST_NUMBERS = 26
"""Bars that can carry their value without touching."""


def plot_bench(rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Write every figure that has something to show; returns their files by name."""
    drawn = {}
    for plot in PLOTS:
        shown = [row for row in in_order(rows) if row.get(plot.key)]
        if shown:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{plot.name}.png"
            write_figure(path, lambda figure, plot=plot, shown=shown: _draw(figure, plot, shown), 3.6)
            drawn[plot.name] = path
    return drawn


def group_labels(rows: Sequence[Row]) -> list[str]:
    """Where each row stands on the axis: the settings in which rows differ, apart from policy and cache."""

    def budget(row: Row) -> str | None:
        return f"{row['budget']} of experts" if str(row.get("budget", "")).endswith("%") else row.get("budget")

    parts = [
        [str(row.get("model", "")) for row in rows],
        [str(row.get("dtype", "")) for row in rows],
        [row.get("tier") for row in rows],
        [f"{row.get('slab_dtype') or 'source'} slabs" for row in rows],
        [f"batch {row.get('batch')}" for row in rows],
        [_count(row.get("forced_experts"), "expert") for row in rows],
        [row.get("drive") and f"{row['drive']}-driven" for row in rows],
        [budget(row) for row in rows],
    ]
    varying = [part for part in parts if len({value for value in part if value is not None}) > 1]
    labels = ["\n".join(value for part in varying if (value := part[number])) for number in range(len(rows))]
    return [
        label or ("in memory" if varying else str(row.get("model", "")))
        for label, row in zip(labels, rows, strict=True)
    ]


def _count(number: int | None, noun: str) -> str | None:
    return None if number is None else f"{number} {noun}{'s' if number != 1 else ''}"


def series_label(row: Row) -> str:
    cache = row.get("cache")
    policy = str(row.get("policy"))
    return LABELS.get(policy, policy_label(policy)) + (f", {cache}" if cache not in (None, "none") else "")


def _draw(figure: Figure, plot: BarPlot, rows: Sequence[Row]) -> None:
    axes: Axes = figure.subplots()
    labels = group_labels(rows)
    groups, series = list(dict.fromkeys(labels)), list(dict.fromkeys(series_label(row) for row in rows))
    members = {group: [s for s in series if (group, s) in _pairs(labels, rows)] for group in groups}
    width = 0.84 / max(len(names) for names in members.values())
    values = [row[plot.key] / plot.scale for row in rows]
    named: set[str] = set()
    for label, row, value in zip(labels, rows, values, strict=True):
        name = series_label(row)
        place = members[label].index(name) - (len(members[label]) - 1) / 2
        x = groups.index(label) + place * width
        axes.bar(x, value, 0.92 * width, color=_color(row), label=None if name in named else name)
        named.add(name)
        limit = row.get(plot.limit) if plot.limit else None
        if limit:
            line = axes.hlines(limit, x - 0.46 * width, x + 0.46 * width, color=INK, lw=1.6)
            if plot.limit_name not in named:
                line.set_label(plot.limit_name)
                named.add(plot.limit_name)
        if len(rows) <= MOST_NUMBERS:
            top = max(value, limit or 0.0)
            axes.annotate(three_digits(value), (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    if max(values) > LOG_ABOVE * min(values):
        axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_title(plot.title)
    axes.set_xticks(range(len(groups)), groups, fontsize=8.5)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(5, len(named)), frameon=False, fontsize=8.5)


def _pairs(labels: Sequence[str], rows: Sequence[Row]) -> set[tuple[str, str]]:
    return {(label, series_label(row)) for label, row in zip(labels, rows, strict=True)}


def _color(row: Row) -> tuple[float, ...]:
    """The policy's colour, mixed with white rather than see-through, or the grid would show."""
    from matplotlib.colors import to_rgb

    policy = str(row.get("policy"))
    color = next((color for name, color in COLORS.items() if policy.startswith(name)), INK)
    shade = SHADES.get(str(row.get("cache") or "none"), 1.0) * (0.55 if policy.endswith("warm") else 1.0)
    return tuple(1 - shade * (1 - part) for part in to_rgb(color))
