"""The figures of an evaluation: latency of each policy, routing agreement of each block, the overlap timeline.

Knows `eval.json` and traces as plain dicts. Each `plot_*` writes one file, PNG or SVG by the suffix, and returns
whether there was anything to draw.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pregate.measure.figure_style import COMPUTE, INK, QUIET, TRANSFER, WAIT, lines_across, percent_axis, write_figure
from pregate.measure.table_format import ABSENT, OURS, policy_label, three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Spans = Sequence[Mapping[str, Any]]
TIMES = {"tpot_ms": "Time per output token, ms", "ttft_ms": "Time to first token, ms"}
LANES = {"compute": (COMPUTE, "white"), "transfer": (TRANSFER, INK), "wait": (WAIT, "white")}
"""Bar and number colour of each lane of the timeline, top to bottom."""
MOST_NUMBERS, MOST_TICKS = 12, 16
"""Bars that can carry their value, and numbers that fit below an axis, of one stack."""


def plot_engine(evaluation: Mapping[str, Any], path: Path) -> bool:
    """Time per output token, with the part spent waiting for experts, and time to first token; one bar a policy."""
    engine: dict[str, Record] = evaluation.get("engine") or {}
    shown = [key for key in TIMES if any(row.get(key) is not None for row in engine.values())]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, key in zip(panels, shown, strict=True):
            _policy_bars(axes, engine, key)

    return bool(shown) and write_figure(path, draw, 0.75 + 0.38 * len(engine))


def _policy_bars(axes: Axes, engine: Mapping[str, Record], key: str) -> None:
    longest = max(row.get(key) or 0.0 for row in engine.values()) or 1.0
    for y, (policy, row) in enumerate(engine.items()):
        total = row.get(key) or 0.0
        axes.barh(y, total, height=0.62, color=COMPUTE if policy in OURS else QUIET)
        wait = (row.get("exposed_ms_per_token") if key == "tpot_ms" else None) or 0.0
        if 0 < wait <= total:
            label = None if axes.get_legend_handles_labels()[1] else "waiting for experts"
            axes.barh(y, wait, left=total - wait, height=0.62, color=WAIT, alpha=0.85, label=label)
        number = ABSENT if row.get(key) is None else three_digits(total)
        axes.text(total + 0.015 * longest, y, number, va="center", fontsize=9)
    axes.set_title(TIMES[key])
    axes.set_yticks(range(len(engine)), [policy_label(policy) for policy in engine])
    axes.set_ylim(len(engine) - 0.5, -0.5)
    axes.set_xlim(0, 1.14 * longest)
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, labelcolor=WAIT, handlelength=0.7, borderpad=0
        )


def plot_agreement(evaluation: Mapping[str, Any], path: Path) -> bool:
    """Share of tokens sent to the same expert as in the reference; one bar a MoE block, one panel a stack."""
    agreement = (evaluation.get("routing") or {}).get("agreement") or {}
    stacks = {stack: values for stack, values in agreement.items() if any(v is not None for v in values)}

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(stacks), squeeze=False)[0]
        for axes, (stack, values) in zip(panels, stacks.items(), strict=True):
            known = {block: 100 * value for block, value in enumerate(values) if value is not None}
            bars = axes.bar([*known], [*known.values()], width=0.68, color=COMPUTE)
            if len(values) <= MOST_NUMBERS:
                axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
            axes.set_title(stack.capitalize())
            axes.set_ylim(0, 112)
            percent_axis(axes)
            axes.set_xticks(range(0, len(values), 1 + (len(values) - 1) // MOST_TICKS))
            axes.set_xlim(-0.6, max(len(values), 4) - 0.4)
            axes.set_xlabel("MoE block")
            lines_across(axes)

    return bool(stacks) and write_figure(path, draw, 2.3)


def plot_timeline(traces: Mapping[str, Spans], path: Path) -> bool:
    """Compute, transfer and waiting of each policy over the same stretch of time; numbers are MoE blocks."""
    shown = {policy: _from_zero(spans) for policy, spans in traces.items() if spans}
    end_ms = max((span["end_ms"] for spans in shown.values() for span in spans), default=0.0) or 1.0

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (policy, spans) in zip(rows, shown.items(), strict=True):
            axes.set_title(policy_label(policy), fontsize=9.5)
            axes.set_xlim(0, end_ms)
            _lanes(axes, spans, end_ms)
        rows[-1].set_xlabel("ms")

    return bool(shown) and write_figure(path, draw, 0.5 + 0.98 * len(shown))


def _from_zero(spans: Spans) -> Spans:
    origin = min(span["start_ms"] for span in spans)
    return [{**span, "start_ms": span["start_ms"] - origin, "end_ms": span["end_ms"] - origin} for span in spans]


def _lanes(axes: Axes, spans: Spans, end_ms: float) -> None:
    for y, (lane, (color, ink)) in enumerate(LANES.items()):
        mine = [span for span in spans if span["lane"] == lane]
        bars = [(span["start_ms"], span["end_ms"] - span["start_ms"]) for span in mine]
        axes.broken_barh(bars, (y - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.4)
        for span, (start, length) in zip(mine, bars, strict=True):
            block = re.search(r"\bblock (\d+)", str(span.get("name", "")))
            # a number stands only where the bar is wide enough for it
            if block and length > 0.014 * len(block.group(1)) * end_ms:
                axes.text(start + length / 2, y, block.group(1), ha="center", va="center", fontsize=7, color=ink)
    axes.set_yticks(range(len(LANES)), [*LANES], fontsize=8.5)
    axes.set_ylim(len(LANES) - 0.45, -0.55)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
