"""The figures of an evaluation: latency of each policy, routing agreement of each block, the overlap timeline.

Knows `eval.json` and traces as plain dicts; knows nothing about models. Each `plot_*` writes one file, PNG or
SVG by the suffix, and says whether there was anything to draw. Matplotlib's object interface only: no pyplot, no
display, no state left behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POLICY_LABELS = {
    "gpu_only": "GPU only",
    "on_demand": "On demand",
    "prefetch_all": "Prefetch all",
    "pre_gated": "Pre-gated",
}
INK, FAINT, GRID = "#1f2933", "#64707d", "#e4e8ec"
COMPUTE, TRANSFER, WAIT = "#4a7ba6", "#e2a33c", "#c94f3d"
QUIET = "#a9b6c2"
LANES = {"compute": (COMPUTE, "white"), "transfer": (TRANSFER, INK), "wait": (WAIT, "white")}
"""Bar and number colour of each lane of the timeline, top to bottom."""
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": GRID,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "svg.hashsalt": "pregate",  # the same figures give the same bytes
}
WIDTH_INCHES = 9.2


def policy_label(policy: str) -> str:
    return POLICY_LABELS.get(policy, policy.replace("_", " "))


def three_digits(value: float) -> str:
    """Three significant digits, zeros kept: 12.0, 0.421, 190."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def plot_engine(evaluation: Mapping[str, Any], path: Path) -> bool:
    """Time per output token, with the part spent waiting for experts, and time to first token; one bar a policy."""
    engine = evaluation.get("engine") or {}
    panels = [
        (key, title)
        for key, title in (("tpot_ms", "Time per output token, ms"), ("ttft_ms", "Time to first token, ms"))
        if any(row.get(key) is not None for row in engine.values())
    ]
    if not panels:
        return False

    def draw(figure: Figure) -> None:
        for axes, (key, title) in zip(_row_of_axes(figure, len(panels)), panels, strict=True):
            _policy_bars(axes, engine, key, title)
            if axes is not figure.axes[0]:
                axes.set_yticklabels([])

    return write_figure(path, draw, 0.75 + 0.38 * len(engine))


def _policy_bars(axes: Axes, engine: Mapping[str, Mapping[str, Any]], key: str, title: str) -> None:
    longest = max(row.get(key) or 0.0 for row in engine.values()) or 1.0
    waits = False
    for y, (policy, row) in enumerate(engine.items()):
        total = row.get(key)
        if total is None:
            axes.text(0, y, " –", va="center", color=FAINT)
            continue
        axes.barh(y, total, height=0.62, color=COMPUTE if policy == "pre_gated" else QUIET)
        wait = row.get("exposed_ms_per_token") if key == "tpot_ms" else None
        if wait and wait <= total:
            waits = True
            axes.barh(y, wait, left=total - wait, height=0.62, color=WAIT, alpha=0.85)
        axes.text(total + 0.015 * longest, y, three_digits(total), va="center", fontsize=9)
    axes.set_title(title)
    axes.set_yticks(range(len(engine)), [policy_label(policy) for policy in engine])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.14 * longest)
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)
    if waits:
        axes.text(1.0, 1.03, "■ waiting for experts", color=WAIT, transform=axes.transAxes, ha="right", va="bottom")


def plot_agreement(evaluation: Mapping[str, Any], path: Path) -> bool:
    """Share of tokens sent to the same expert as in the reference; one bar a MoE block, one panel a stack."""
    agreement = (evaluation.get("routing") or {}).get("agreement") or {}
    stacks = {stack: values for stack, values in agreement.items() if any(v is not None for v in values)}
    if not stacks:
        return False

    def draw(figure: Figure) -> None:
        for axes, (stack, values) in zip(_row_of_axes(figure, len(stacks)), stacks.items(), strict=True):
            for block, value in enumerate(values):
                if value is None:
                    continue
                axes.bar(block, 100 * value, width=0.68, color=COMPUTE)
                if len(values) <= 12:
                    axes.text(block, 100 * value + 1.5, f"{100 * value:.0f}", ha="center", va="bottom", fontsize=9)
            axes.set_title(stack.capitalize())
            axes.set_ylim(0, 112)
            axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)], color=FAINT)
            every = 1 + (len(values) - 1) // 16
            axes.set_xticks(range(0, len(values), every))
            axes.set_xlim(-0.6, max(len(values), 4) - 0.4)
            axes.set_xlabel("MoE block")
            axes.grid(axis="y")
            axes.spines["left"].set_visible(False)

    return write_figure(path, draw, 2.3)


def plot_timeline(traces: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> bool:
    """Compute, transfer and waiting of each policy over the same stretch of time; numbers are MoE blocks."""
    shown = {policy: spans for policy, spans in traces.items() if spans}
    if not shown:
        return False
    origin = {policy: min(span["start_ms"] for span in spans) for policy, spans in shown.items()}
    end_ms = max(span["end_ms"] - origin[policy] for policy, spans in shown.items() for span in spans)

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (policy, spans) in zip(rows, shown.items(), strict=True):
            _lanes(axes, spans, origin[policy], end_ms or 1.0)
            axes.set_title(policy_label(policy), fontsize=9.5)
        rows[-1].set_xlabel("ms")

    return write_figure(path, draw, 0.5 + 0.98 * len(shown))


def _lanes(axes: Axes, spans: Sequence[Mapping[str, Any]], origin_ms: float, end_ms: float) -> None:
    lanes = list(LANES)
    for lane, (color, ink) in LANES.items():
        mine = [span for span in spans if span["lane"] == lane]
        bars = [(span["start_ms"] - origin_ms, span["end_ms"] - span["start_ms"]) for span in mine]
        y = lanes.index(lane)
        axes.broken_barh(bars, (y - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.4)
        for span, (start, length) in zip(mine, bars, strict=True):
            block = re.search(r"\bblock (\d+)", str(span.get("name", "")))
            if block and length > 0.014 * len(block.group(1)) * end_ms:
                axes.text(start + length / 2, y, block.group(1), ha="center", va="center", fontsize=7, color=ink)
    axes.set_yticks(range(len(lanes)), lanes, fontsize=8.5)
    axes.set_ylim(len(lanes) - 0.45, -0.55)
    axes.set_xlim(0, end_ms)
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _row_of_axes(figure: Figure, count: int) -> Sequence[Axes]:
    return figure.subplots(1, count, squeeze=False)[0]


def write_figure(path: Path, draw: Any, height_inches: float) -> bool:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=160, metadata=metadata)
    return True
