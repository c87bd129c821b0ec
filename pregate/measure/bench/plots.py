"""The figures of a benchmark: grouped bars of time, speed, block latency and memory, with the floor as a line.

Knows the rows of `bench.jsonl` as plain dicts; knows nothing about how they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pregate.measure.bench.table import in_order
from pregate.measure.figure_style import COMPUTE, INK, QUIET, TRANSFER, WAIT, lines_across, write_figure
from pregate.measure.table_format import Row, policy_label, three_digits

if TYPE_CHECKING:
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
    lookahead, blocks = row.get("lookahead"), row.get("blocks")
    return [
        str(row.get("model", "")),
        str(row.get("dtype", "")),
        None if lookahead is None else f"lookahead {lookahead}",
        row.get("gates"),
        None if blocks is None else f"{blocks} blocks",
        None if row.get("prompt_len") is None else f"{row['prompt_len']} tokens in",
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
    groups, series = group_labels(rows), [series_label(row) for row in rows]
    places, width = _places(groups, series)
    values = np.array([row[plot.key] / plot.scale for row in rows])
    limits = np.array([row.get(plot.limit) or np.nan for row in rows])
    once = [name if name not in series[:n] else "_" for n, name in enumerate(series)]
    axes.bar(places, values, 0.92 * width, color=[_color(row) for row in rows], label=once)
    if np.isfinite(limits).any():
        start, end = places - 0.46 * width, places + 0.46 * width
        axes.hlines(limits, start, end, color=INK, lw=1.6, label=plot.limit_name)
    if len(rows) <= MOST_NUMBERS:
        for x, value, top in zip(places, values, np.fmax(values, limits), strict=True):
            axes.annotate(three_digits(value), (x, top), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    if values.max() > LOG_ABOVE * values.min():
        axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_title(plot.title)
    axes.set_xticks(range(len(set(groups))), [*dict.fromkeys(groups)], fontsize=8.5)
    lines_across(axes)
    figure.legend(loc="outside lower center", ncols=min(5, len(set(series)) + 1), frameon=False, fontsize=8.5)


def _places(groups: Sequence[str], series: Sequence[str]) -> tuple[np.ndarray, float]:
    """Where the bar of each row stands, and the width it may have.

    A group holds only the series that it has, side by side around its tick, in the order of all series.
    """
    bars = set(zip(groups, series, strict=True))
    members = {group: [name for name in dict.fromkeys(series) if (group, name) in bars] for group in groups}
    width = 0.84 / max(map(len, members.values()))
    ticks = {group: tick for tick, group in enumerate(members)}
    offsets = [
        members[group].index(name) - (len(members[group]) - 1) / 2 for group, name in zip(groups, series, strict=True)
    ]
    return np.array([ticks[group] for group in groups]) + width * np.array(offsets), width


def _color(row: Row) -> tuple[float, ...]:
    """The policy's colour, mixed with white rather than see-through, or the grid would show."""
    from matplotlib.colors import to_rgb

    policy = str(row.get("policy"))
    color = next((color for name, color in COLORS.items() if policy.startswith(name)), INK)
    shade = SHADES.get(str(row.get("cache") or "none"), 1.0) * (0.55 if policy.endswith("warm") else 1.0)
    return tuple(1 - shade * (1 - part) for part in to_rgb(color))
