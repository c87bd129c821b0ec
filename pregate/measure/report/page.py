"""`report.html`: an evaluation as one file that needs nothing beside it.

Gathers plain values from `eval.json`, predictions and traces; words and layout are in `templates/report.html.j2`.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pregate.measure.report.plots import Spans, plot_agreement, plot_engine, plot_timeline
from pregate.measure.report.summary import (
    ENGINE_FIGURES,
    Evaluation,
    engine_settings,
    engine_table,
    equality_statement,
    equals_resident,
    key_figures,
    metric_label,
    model_labels,
    primary_metric,
    routing_table,
    score_table,
)
from pregate.measure.tables import ABSENT, Cell, Table
from pregate.measure.templates import fill
from pregate.system.durable import write_text

TEMPLATE = Path(__file__).with_name("templates") / "report.html.j2"
ENVIRONMENT_LABELS = {
    "torch_threads": "torch threads",
    "memory_gib": "memory, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "git.commit": "git commit",
    "git.dirty": "uncommitted changes",
}
SAMPLES, MISTAKES, SOURCE_CHARACTERS = 8, 4, 220
RIGHT, WRONG = 100.0, 0.0
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
    engine = engine_table(evaluation, [*ENGINE_FIGURES], {"Tokens": _equality}) if evaluation.get("engine") else None
    page = fill(
        TEMPLATE,
        evaluation={"task": None, "split": None, "checkpoint": None, "reference": None, "parity": None, **evaluation},
        count=evaluation.get("num_examples"),
        policies=list(evaluation.get("engine") or {}),
        labels=model_labels(evaluation),
        metric=metric and metric_label(metric),
        key_figures=key_figures(evaluation),
        equality=equality_statement(evaluation),
        settings=engine_settings(evaluation),
        tables={"scores": score_table(evaluation), "routing": routing_table(evaluation), "engine": engine},
        figures={
            "agreement": _embedded(plot_agreement, evaluation),
            "engine": _embedded(plot_engine, evaluation),
            "timeline": _embedded(plot_timeline, traces),
        },
        samples=sample_table(predictions, metric, model_labels(evaluation)["pre_gated"]),
        num_first=min(len(predictions), SAMPLES),
        environment=flat_pairs(evaluation.get("environment") or {}),
        config=flat_pairs(evaluation.get("config") or {}),
    )
    write_text(path, page)


def _embedded(plot: Callable[[Any, Path], bool], data: Mapping[str, Any]) -> str | None:
    """The figure as the source of an image; None if there is nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        if not plot(data, path):
            return None
        return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _equality(row: Mapping[str, Any]) -> str:
    return {True: Cell("✓ equal", tone="good"), False: Cell("✗ differ", tone="bad"), None: ABSENT}[equals_resident(row)]


# --- predictions ----------------------------------------------------------------------------------------------------


def sample_table(predictions: Sequence[Prediction], metric: str | None, model: str) -> Table | None:
    """A row an example: its mark, source, prediction (the reference model's too where there are any) and answers."""
    chosen = pick_samples(predictions, metric)
    paired = any(p.get("reference_prediction") is not None for p in chosen)
    rows = []
    for p in chosen:
        texts = [p.get("source", ""), p.get("prediction", ABSENT)]
        texts += [p.get("reference_prediction", ABSENT)] if paired else []
        texts.append(" / ".join(dict.fromkeys(map(str, p.get("references") or []))))
        rows.append([_mark(p, metric), *(shorten(str(each)) for each in texts)])
    headers = ["", "Source", model, *(["Reference model"] if paired else []), "Right answers"]
    return Table(headers, rows, left=len(headers)) if rows else None


def pick_samples(predictions: Sequence[Prediction], metric: str | None) -> list[Prediction]:
    """The first few as they come, and after them the first few mistakes that are not among those."""
    wrong = [p for p in predictions[SAMPLES:] if _score(p, metric) == WRONG]
    return [*predictions[:SAMPLES], *wrong[:MISTAKES]]


def shorten(text: str, limit: int = SOURCE_CHARACTERS) -> str:
    """At most `limit` characters, cut between words where there are any."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head, _, _ = text[:limit].rpartition(" ")
    return f"{head or text[: limit - 1]} …"


def _score(prediction: Prediction, metric: str | None) -> float | None:
    """0 to 100, or None if the prediction was not scored."""
    value = (prediction.get("scores") or {}).get(metric)
    if value is None and prediction.get("correct") is not None:
        return RIGHT if prediction["correct"] else WRONG
    return value


def _mark(prediction: Prediction, metric: str | None) -> str:
    score = _score(prediction, metric)
    if score is None:
        return ABSENT
    return {RIGHT: Cell("✓", tone="good"), WRONG: Cell("✗", tone="bad")}.get(score, f"{score:.0f}")


# --- settings -------------------------------------------------------------------------------------------------------


def flat_pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) with dotted names; what is null or empty is left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += flat_pairs(value, f"{name}.")
        elif isinstance(value, bool):
            pairs.append((name, "yes" if value else "no"))
        elif value is not None and value != []:
            pairs.append((name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return [(ENVIRONMENT_LABELS.get(name, name), text) for name, text in pairs]
