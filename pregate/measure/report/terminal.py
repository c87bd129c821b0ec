"""The summary of an evaluation on the terminal: scores, routing agreement, a row a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from pregate.measure.report.summary import (
    engine_settings,
    engine_table,
    equality_statement,
    equals_resident,
    part,
    percent,
    score_table,
)
from pregate.measure.tables import ABSENT, Cell

FIGURES = ("ttft_ms", "tpot_ms", "tokens_per_s", "exposed_ms_per_token", "bytes_moved", "peak_device_bytes")
WIDEST = 100


def print_summary(evaluation: Mapping[str, Any], console: Console) -> None:
    """Print what is known of the evaluation, at most `WIDEST` characters wide."""
    width = min(console.width, WIDEST)
    if scores := score_table(evaluation):
        count = evaluation.get("num_examples")
        scores.title = " ".join(filter(None, (evaluation.get("task"), evaluation.get("split"))))
        scores.title += f", {count:,} examples" if count is not None else ""
        scores.print(console, width)
    for stack, shares in part(part(evaluation, "routing"), "agreement").items():
        blocks = " ".join(map(percent, shares))
        console.print(Text(f"Routing agreement with the reference, {stack} blocks, %: {blocks}"), width=width)
    if part(evaluation, "engine"):
        console.print()
        engine = engine_table(evaluation, FIGURES, {Cell("Hits", "%"): _hit_rate, Cell("Tokens", "equal"): _equality})
        engine.title = "Offloaded inference"
        engine.print(console, width)
        settings = ", ".join(f"{what} {value}" for what, value in engine_settings(evaluation))
        console.print(Text(settings, "dim"), width=width)
    if statement := equality_statement(evaluation):
        same, sentence = statement
        console.print(Text(sentence, "green" if same else "bold red"), width=width)


def _hit_rate(row: Mapping[str, Any]) -> str | None:
    hits, misses = row.get("hits"), row.get("misses")
    return None if hits is None or misses is None or hits + misses == 0 else percent(hits / (hits + misses))


def _equality(row: Mapping[str, Any]) -> str:
    return {True: Cell("true", tone="good"), False: Cell("FALSE", tone="bad"), None: ABSENT}[equals_resident(row)]
