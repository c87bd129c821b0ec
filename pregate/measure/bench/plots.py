"""The figures of a benchmark: grouped bars of time, speed, block latency and memory, with the floor as a line.

Knows the rows of `bench.jsonl` as plain dicts; knows nothing about how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pregate.measure.bench.table import in_order
from pregate.measure.plots import COMPUTE, INK, QUIET, TRANSFER, WAIT, lines_across, write_figure
from pregate.measure.tables import Row, policy_label, three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BarPlot:
    """One figure: the field it shows, what it is called, and the field and name of the limit to mark."""

    name: str
    key: str
    title: str
    limit: str = ""
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
        if shown := [row for row in in_order(rows) if row.get(plot.key)]:
            folder.mkdir(parents=True, exist_ok=True)
            drawn[plot.name] = folder / f"{plot.name}.png"
            write_figure(drawn[plot.name], partial(_draw, plot=plot, rows=shown), 3.6)
    return drawn


# --- labels ---------------------------------------------------------------------------------------------------------


def group_labels(rows: Sequence[Row]) -> list[str]:
    """Where each row stands on the axis: the settings in which rows differ, apart from policy and cache."""
    settings = [_settings(row) for row in rows]
    varying = [n for n, values in enumerate(zip(*settings, strict=True)) if len({*values} - {None}) > 1]
    labels = ["\n".join(filter(None, (values[n] for n in varying))) for values in settings]
    alone = "in memory" if varying else str(rows[0].get("model", ""))
    return [label or alone for label in labels]


def _settings(row: Row) -> list[str | None]:
    experts, budget, drive = row.get("forced_experts"), row.get("budget"), row.get("drive")
    return [
        str(row.get("model", "")),
        str(row.get("dtype", "")),
        row.get("tier"),
        f"{row.get('slab_dtype') or 'source'} slabs",
        f"batch {row.get('batch')}",
        None if experts is None else f"{experts} expert{'s' if experts != 1 else ''}",
        f"{drive}-driven" if drive else None,
        f"{budget} of experts" if str(budget).endswith("%") else budget,
    ]


def series_label(row: Row) -> str:
    policy, cache = str(row.get("policy")), row.get("cache")
    return LABELS.get(policy, policy_label(policy)) + (f", {cache}" if cache not in (None, "none") else "")


# --- bars -----------------------------------------------------------------------------------------------------------


def _draw(figure: Figure, plot: BarPlot, rows: Sequence[Row]) -> None:
    axes = figure.subplots()
    groups, series = group_labels(rows), [*map(series_label, rows)]
    # a group holds only the series that it has, side by side around its tick
    pairs = set(zip(groups, series, strict=True))
    members = {group: [name for name in dict.fromkeys(series) if (group, name) in pairs] for group in groups}
    width = 0.84 / max(map(len, members.values()))
    for group, name, row in zip(groups, series, rows, strict=True):
        place = members[group].index(name) - (len(members[group]) - 1) / 2
        x = list(members).index(group) + place * width
        value, limit = row[plot.key] / plot.scale, row.get(plot.limit)
        axes.bar(x, value, 0.92 * width, color=_color(row), label=name)
        if limit:
            axes.hlines(limit, x - 0.46 * width, x + 0.46 * width, color=INK, lw=1.6, label=plot.limit_name)
        if len(rows) <= MOST_NUMBERS:
            top = (x, max(value, limit or 0.0))
            axes.annotate(three_digits(value), top, (0, 2), textcoords="offset points", ha="center", fontsize=7)
    _finish(figure, axes, plot, [*members])
    values = [row[plot.key] for row in rows]
    if max(values) > LOG_ABOVE * min(values):
        axes.set_yscale("log")


def _finish(figure: Figure, axes: Axes, plot: BarPlot, groups: Sequence[str]) -> None:
    axes.margins(y=0.12)
    axes.set_title(plot.title)
    axes.set_xticks(range(len(groups)), groups, fontsize=8.5)
    lines_across(axes)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles=[*handles.values()],
        labels=[*handles],
        loc="outside lower center",
        ncols=min(5, len(handles)),
        frameon=False,
        fontsize=8.5,
    )


def _color(row: Row) -> tuple[float, ...]:
    """The policy's colour, mixed with white rather than see-through, or the grid would show."""
    from matplotlib.colors import to_rgb

    policy = str(row.get("policy"))
    color = next((color for name, color in COLORS.items() if policy.startswith(name)), INK)
    shade = SHADES.get(str(row.get("cache") or "none"), 1.0) * (0.55 if policy.endswith("warm") else 1.0)
    return tuple(1 - shade * (1 - part) for part in to_rgb(color))
