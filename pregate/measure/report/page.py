"""`report.html`: an evaluation as one file that needs nothing beside it.

Gathers plain values from `eval.json`, predictions and traces; words and layout are in `templates/report.html.j2`.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pregate.measure.report.evaluation_plots import Spans, plot_agreement, plot_engine, plot_timeline
from pregate.measure.report.evaluation_tables import (
    ON_PAGE,
    Evaluation,
    engine_settings,
    engine_statement,
    engine_table,
    key_figures,
    metric_label,
    model_labels,
    primary_metric,
    routing_table,
    score_table,
)
from pregate.measure.templates import fill
from pregate.system.durable import write_text

TEMPLATE = Path(__file__).with_name("templates") / "report.html.j2"
FIELDS = ("task", "split", "checkpoint", "reference", "num_examples", "parity", "environment", "config")
SAMPLES, MISTAKES = 8, 4
Prediction = Mapping[str, Any]


def write_report(
    path: Path, evaluation: Evaluation, predictions: Sequence[Prediction], traces: Mapping[str, Spans]
) -> None:
    """Write the report as one HTML file with everything embedded.

    Each prediction has `source`, `prediction`, `references`, `scores` by metric (or `correct`), and possibly
    `reference_prediction`, the reference model's. Each trace is a list of spans: `lane` (compute, transfer or
    wait), `name`, `start_ms`, `end_ms`.
    """
    metric = primary_metric(evaluation)
    page = fill(
        TEMPLATE,
        **{field: evaluation.get(field) for field in FIELDS},
        labels=model_labels(evaluation),
        key_figures=list(key_figures(evaluation)),
        statement=engine_statement(evaluation),
        scores=score_table(evaluation),
        routing=routing_table(evaluation),
        agreement_plot=_embedded(plot_agreement, evaluation),
        engine=engine_table(evaluation, ON_PAGE),
        settings=engine_settings(evaluation),
        floor="gpu_only" in (evaluation.get("engine") or {}),
        engine_plot=_embedded(plot_engine, evaluation),
        timeline=_embedded(plot_timeline, traces),
        metric=metric and metric_label(metric),
        samples=[{**p, "score": _score(p, metric)} for p in pick_samples(predictions, metric)],
        num_first=min(len(predictions), SAMPLES),
    )
    write_text(path, page)


def _embedded(plot: Callable[[Any, Path], bool], data: Mapping[str, Any]) -> str | None:
    """The figure as the source of an image; None if there is nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        drawn = plot(data, path)
        return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}" if drawn else None


def pick_samples(predictions: Sequence[Prediction], metric: str | None) -> list[Prediction]:
    """The first few as they come, and after them the first few mistakes that are not among those."""
    wrong = [p for p in predictions[SAMPLES:] if _score(p, metric) == 0]
    return [*predictions[:SAMPLES], *wrong[:MISTAKES]]


def _score(prediction: Prediction, metric: str | None) -> float | None:
    """0 to 100, or None if the prediction was not scored."""
    value = (prediction.get("scores") or {}).get(metric)
    if value is None and prediction.get("correct") is not None:
        return 100.0 if prediction["correct"] else 0.0
    return value
