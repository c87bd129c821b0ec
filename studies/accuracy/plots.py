"""The figures of a study: score against lookahead, routing agreement by block, and validation during training.

Knows records and what `statistics` says of them, and the house style of `measure.figure_style`; knows nothing about how
cells were run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pregate.measure.figure_style import COMPUTE, FAINT, INK, QUIET, TRANSFER, WAIT, write_figure
from pregate.measure.report.evaluation_tables import metric_label
from studies.accuracy.arms_and_seeds import CHANGES, CONVENTIONAL, OTHER_SEED, TASK_LABELS, TAUGHT
from studies.accuracy.statistics import ArmSummary, by_block, mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Arms = Mapping[str, Sequence[ArmSummary]]
"""The arms of each task."""
COLORS = {
    "conventional": INK,
    "shifted": QUIET,
    "calibrated": TRANSFER,
    "pre_gated": COMPUTE,
    "distilled": "#8a6fb0",
    "gates_only": WAIT,
    OTHER_SEED: FAINT,
    TAUGHT[1]: "#c9a3d4",
}
NAMES = {
    "conventional": "Conventional (a)",
    "shifted": "Shifted, untrained (b)",
    "calibrated": "Calibrated (c)",
    "pre_gated": "Pre-gated (d)",
    "distilled": "Distilled (e)",
    "gates_only": "Gates only (f)",
    OTHER_SEED: "Another seed's (a)",
    TAUGHT[1]: "Conventional, distilled",
}


def plot_study(arms: Arms, folder: Path) -> list[str]:
    """Write every figure that has something to show as `folder`/NAME.png; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, plot in (("lookahead", plot_lookahead), ("agreement", plot_agreement), ("curves", plot_curves)):
        path = folder / f"{name}.png"
        if plot(arms, path):
            drawn.append(name)
        else:
            path.unlink(missing_ok=True)
    return drawn


def plot_lookahead(arms: Arms, path: Path) -> bool:
    """Difference from the conventional model against lookahead, with 95 % intervals; one panel a task."""
    shown = {
        task: [a for a in found if a.difference and (a.arm, a.variant) not in CHANGES] for task, found in arms.items()
    }
    shown = {task: found for task, found in shown.items() if found}
    if not shown:
        return False

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (task, found) in zip(panels, shown.items(), strict=True):
            axes.axhline(0, color=INK, lw=1.2)
            axes.plot([0], [0], "o", color=INK, ms=5)
            line = sorted((a for a in found if a.arm == "pre_gated"), key=lambda a: a.lookahead)
            axes.plot([0, *(a.lookahead for a in line)], [0, *(_mean(a) for a in line)], color=COMPUTE, lw=1.3)
            others = [a for a in found if a.arm != "pre_gated"]
            for arm in line:
                _interval(axes, arm, arm.lookahead)
            places: Counter[int] = Counter()
            for arm in others:
                places[arm.lookahead] += 1
                _interval(axes, arm, arm.lookahead + 0.11 * places[arm.lookahead])
            axes.set_title(f"{TASK_LABELS.get(task, task)}: {metric_label(found[0].metric)}, points from (a)")
            axes.set_xticks(range(4))
            axes.set_xlim(-0.25, 3.4)
            axes.set_xlabel("Lookahead, MoE blocks")
            _tidy(axes)
        _legend(figure, [CONVENTIONAL, *dict.fromkeys(_key(a) for found in shown.values() for a in found)])

    return write_figure(path, draw, 3.5)


def _mean(arm: ArmSummary) -> float:
    assert arm.difference is not None
    return arm.difference.mean


def _interval(axes: Axes, arm: ArmSummary, x: float) -> None:
    change = arm.difference
    assert change is not None
    color = COLORS.get(_key(arm), FAINT)
    axes.vlines(x, change.low, change.high, color=color, lw=1.6)
    axes.plot([x], [change.mean], "o", color=color, ms=5)


def plot_agreement(arms: Arms, path: Path) -> bool:
    """Share of choices that the conventional model of the same seed makes too; a row a task, a column a stack."""
    shown: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for task, found in arms.items():
        blocks = {_key(arm): by_block(arm.records, "agreement") for arm in found if arm.variant in ("", OTHER_SEED)}
        shown[task] = {name: values for name, values in blocks.items() if values}
    shown = {task: found for task, found in shown.items() if found}
    if not shown:
        return False
    stacks = list(next(iter(next(iter(shown.values())).values())))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(shown), len(stacks), squeeze=False, sharey=True)
        for row, (task, found) in zip(grid, shown.items(), strict=True):
            for axes, stack in zip(row, stacks, strict=True):
                for arm, values in found.items():
                    points = [(n, 100 * v) for n, v in enumerate(values[stack]) if v is not None]
                    axes.plot(*zip(*points, strict=True), _line(arm), color=COLORS.get(arm, FAINT), lw=1.3, ms=4)
                    axes.set_xticks(range(0, len(values[stack]), 1 + (len(values[stack]) - 1) // 16))
                axes.set_title(f"{TASK_LABELS.get(task, task)}, {stack}: choices as in (a)")
                axes.set_ylim(0, 104)
                axes.set_yticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)], color=FAINT)
                _tidy(axes)
        for axes in grid[-1]:
            axes.set_xlabel("MoE block")
        _legend(figure, list(dict.fromkeys(arm for found in shown.values() for arm in found)))

    return write_figure(path, draw, 0.7 + 2.1 * len(shown))


def plot_curves(arms: Arms, path: Path) -> bool:
    """Primary metric in validation against steps, mean and range over seeds; one panel a task."""
    shown: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for task, found in arms.items():
        curves = {arm.arm: mean_curve(arm) for arm in found if not arm.variant}
        shown[task] = {name: points for name, points in curves.items() if points}
    shown = {task: curves for task, curves in shown.items() if curves}
    if not shown:
        return False

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (task, curves) in zip(panels, shown.items(), strict=True):
            metric = arms[task][0].metric
            for arm, points in curves.items():
                steps, means, lows, highs = zip(*points, strict=True)
                color = COLORS.get(arm, FAINT)
                axes.fill_between(steps, lows, highs, color=color, alpha=0.13, lw=0)
                axes.plot(steps, means, "o-", color=color, lw=1.4, ms=3)
            axes.set_title(f"{TASK_LABELS.get(task, task)}: {metric_label(metric)} in validation, %")
            axes.set_xlabel("Step")
            _tidy(axes)
        _legend(figure, list(dict.fromkeys(arm for curves in shown.values() for arm in curves)))

    return write_figure(path, draw, 3.5)


def _key(arm: ArmSummary) -> str:
    """What it is drawn and named as: a variant that has a color of its own, else its arm."""
    return arm.variant if arm.variant in COLORS else arm.arm


def _line(arm: str) -> str:
    """Dashed for what is no arm."""
    return "o:" if arm == OTHER_SEED else "o-"


def _tidy(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)


def _legend(figure: Figure, arms: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=COLORS.get(arm, FAINT), marker="o", ls=_line(arm)[1:], ms=5, lw=1.3, label=NAMES.get(arm, arm)
        )
        for arm in arms
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(arms) if len(arms) <= 6 else 4,
        frameon=False,
        fontsize=8.5,
    )
