"""Rows as a table and a plot. A ratio is ours over transformers', of the same batches in neighbouring blocks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pregate.measure.figure_style import COMPUTE, FAINT, TRANSFER, lines_across, write_figure
from pregate.measure.intervals import bootstrap_interval
from pregate.measure.table_format import Table, facts_line, number, text

Record = Mapping[str, Any]


def summary(pairs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures of a row. The first pair warms up and is left out of the speeds.

    ratio: geometric mean over pairs, with a 95 % bootstrap interval. cpu_ratio: the same of the time of this process's
    cores, which other programs disturb less. loss_difference: mean of our loss minus theirs over all steps, and its
    standard error.
    """
    timed = pairs[1:]
    logs = [np.log(stock["seconds"] / ours["seconds"]) for ours, stock in timed]
    cpu_logs = [np.log(stock["cpu_seconds"] / ours["cpu_seconds"]) for ours, stock in timed]
    low, high = np.exp(bootstrap_interval(logs, 2000, 0))
    mine = [loss for ours, _ in pairs for loss in ours["losses"]]
    theirs = [loss for _, stock in pairs for loss in stock["losses"]]
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    third = max(1, len(mine) // 3)
    tokens = sum(ours["tokens"] for ours, _ in timed)
    return {
        "pairs": len(timed),
        "steps": len(mine),
        "tokens_per_s": tokens / sum(ours["seconds"] for ours, _ in timed),
        "stock_tokens_per_s": tokens / sum(stock["seconds"] for _, stock in timed),
        "ratio": float(np.exp(np.mean(logs))),
        "ratio_low": float(low),
        "ratio_high": float(high),
        "cpu_ratio": float(np.exp(np.mean(cpu_logs))),
        "first_loss": mine[0],
        "last_loss": statistics.mean(mine[-third:]),
        "stock_last_loss": statistics.mean(theirs[-third:]),
        "loss_difference": statistics.mean(differences),
        "loss_difference_error": statistics.stdev(differences) / len(differences) ** 0.5,
    }


def markdown(records: Sequence[Record], environment: Record) -> str:
    """The table of all rows."""
    columns = {
        "model": text("family"),
        "experts": text("num_experts"),
        "dtype": text("precision"),
        "transformers' experts": text("stock"),
        "tokens/s": number("tokens_per_s"),
        "transformers, tokens/s": number("stock_tokens_per_s"),
        "ratio": lambda row: f"{row['ratio']:.2f}",
        "95 % interval": lambda row: f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
        "ratio of CPU time": lambda row: f"{row['cpu_ratio']:.2f}" if row["device"] == "cpu" else None,
        "steps": text("steps"),
        "loss": lambda row: f"{row['last_loss']:.3f}",
        "transformers, loss": lambda row: f"{row['stock_last_loss']:.3f}",
        "loss difference": lambda row: f"{row['loss_difference']:+.4f} ± {row['loss_difference_error']:.4f}",
    }
    table = Table.of(columns, records, left=1).markdown()
    return f"# Training speed\n\n{table}\n\nEnvironment: {facts_line(environment)}.\n"


def plot(records: Sequence[Record], path: Path) -> None:
    """The loss of each step, of both sides, one panel a row."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(records), 1, squeeze=False)[:, 0]
        for axes, record in zip(panels, records, strict=True):
            for side, color, label, width in ((1, TRANSFER, "transformers", 2.4), (0, COMPUTE, "pregate", 1.0)):
                losses = [loss for pair in record["blocks"] for loss in pair[side]["losses"]]
                axes.plot(range(1, len(losses) + 1), losses, color=color, label=label, linewidth=width)
            axes.set_title(f"{record['family']}, {record['num_experts']} experts, beside {record['stock']}")
            axes.set_ylabel("loss", color=FAINT)
            lines_across(axes)
        panels[0].legend(frameon=False)
        panels[-1].set_xlabel("step")

    write_figure(path, draw, height_inches=0.6 + 1.9 * len(records))
