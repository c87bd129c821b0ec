"""An evaluation for people: `report.html`, one file that needs nothing beside it.

Knows the shape of `eval.json`, of predictions and of traces, all plain dicts, and HTML; what the figures say is in
`summary.py`, how they are drawn in `plots.py`. Knows nothing about how they were measured.
"""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pregate.measure.plots import plot_agreement, plot_engine, plot_timeline, policy_label
from pregate.measure.summary import (
    ABSENT,
    ENGINE_COLUMNS,
    column_cells,
    engine_settings,
    equal,
    key_figures,
    metric_label,
    model_labels,
    primary_metric,
    print_summary,
    routing_table,
    score_headers,
    score_rows,
    token_verdict,
)
from pregate.system.durable import write_text

__all__ = ["pick_samples", "print_summary", "shorten", "write_report"]

ENVIRONMENT_LABELS = {
    "torch_threads": "torch threads",
    "memory_gib": "memory, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "git.commit": "git commit",
    "git.dirty": "uncommitted changes",
}
SAMPLES, MISTAKES, SOURCE_CHARACTERS = 8, 4, 220


def write_report(
    path: Path,
    evaluation: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    traces: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write the report as one HTML file with everything embedded.

    Each prediction has `source`, `prediction`, `references`, `scores` by metric (or `correct`), and possibly
    `reference_prediction`, the reference model's. Each trace is a list of spans: `lane` (compute, transfer or
    wait), `name`, `start_ms`, `end_ms`.
    """
    sections = (
        _headline(evaluation),
        _scores(evaluation),
        _routing(evaluation),
        _engine(evaluation, traces),
        _samples(evaluation, predictions),
        _environment(evaluation),
    )
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = _escape(f"pregate: {evaluation.get('task', 'evaluation')}")
    body = "\n".join(section for section in sections if section)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "<footer>Made by pregate from eval.json and predictions.jsonl; – means not measured.</footer>\n"
        "</main>\n</body>\n</html>\n",
    )


def _escape(value: Any) -> str:
    return html.escape(str(value))


def _figure(plot: Callable[..., bool], data: Mapping[str, Any], alt: str, caption: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.svg"
        if not plot(data, path):
            return ""
        encoded = base64.b64encode(path.read_bytes()).decode()
    source = f"data:image/svg+xml;base64,{encoded}"
    return f'<figure><img alt="{_escape(alt)}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _headline(evaluation: Mapping[str, Any]) -> str:
    count = evaluation.get("num_examples")
    facts = [
        ("Checkpoint", evaluation.get("checkpoint")),
        ("Reference", evaluation.get("reference") or "none: scores and latency only, no parity"),
    ]
    split = " · ".join(
        part
        for part in (
            f"{evaluation['split']} split" if evaluation.get("split") else "",
            f"{count:,} examples" if count is not None else "",
        )
        if part
    )
    rows = "".join(f"<dt>{name}</dt><dd><code>{_escape(fact)}</code></dd>" for name, fact in facts if fact)
    cards = "".join(
        f'<div class="card"><div class="label">{_escape(label)}</div><div class="value">{_escape(value)}'
        f' <small>{_escape(unit)}</small></div><div class="note">{_escape(note)}</div></div>'
        for label, value, unit, note in key_figures(evaluation)
    )
    verdict = token_verdict(evaluation)
    told = f'<p class="verdict{"" if verdict[0] else " bad"}">{_escape(verdict[1])}</p>' if verdict else ""
    return (
        f'<header><p class="eyebrow">pregate evaluation · {_escape(split)}</p>'
        f"<h1>{_escape(evaluation.get('task', 'Evaluation'))}</h1><dl>{rows}</dl></header>"
        + (f'<div class="cards">{cards}</div>' if cards else "")
        + told
    )


def _scores(evaluation: Mapping[str, Any]) -> str:
    rows = score_rows(evaluation)
    if not rows:
        return ""
    head = "".join(f"<th>{_escape(name)}<small>% [95 % interval]</small></th>" for name in score_headers(evaluation))
    if len(evaluation["scores"]) > 1:
        head = head.removesuffix("<small>% [95 % interval]</small></th>") + "<small>points [95 % interval]</small></th>"
    body = "".join(
        f"<tr><th>{_escape(label)}</th>"
        + "".join(f"<td>{_escape(value)}{f'<small>{_escape(ci)}</small>' if ci else ''}</td>" for value, ci in cells)
        + "</tr>"
        for label, cells in rows
    )
    ours, theirs = (_escape(label.lower()) for label in model_labels(evaluation).values())
    paired = (
        f" The difference is {ours} minus {theirs}, resampled over the same examples; an interval that "
        "contains 0 means that these examples cannot tell the two models apart."
        if evaluation.get("parity")
        else ""
    )
    caption = f"<caption>In brackets: 95 % bootstrap intervals over examples.{paired}</caption>"
    return (
        f'<section><h2>Accuracy</h2><div class="scroll"><table>{caption}<thead><tr><th>Metric</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _routing(evaluation: Mapping[str, Any]) -> str:
    caption = (
        f"Share of tokens that the {model_labels(evaluation)['pre_gated'].lower()} model sends to the same expert as "
        "the reference does, block by block. "
        "It says how much the routing changed, not how good it is."
    )
    figure = _figure(plot_agreement, evaluation, "Bar chart of routing agreement for each MoE block", caption)
    headers, rows = routing_table(evaluation)
    if not (figure or rows):
        return ""
    head = "".join(f"<th>{_escape(header)}</th>" for header in headers)
    body = "".join(
        f"<tr><th>{_escape(row[0])}</th>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    about = (
        "<caption>Mass: what the reference router gives to the experts taken, of what it gives to its own choice. "
        "Load: entropy of the experts&#x27; loads, 100 is even. Switches: tokens routed elsewhere than the token "
        "before them, which is what a cache cannot keep.</caption>"
    )
    table = f'<div class="scroll"><table>{about}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<section><h2>Routing</h2>{figure}{table if rows else ''}</section>"


def _engine(evaluation: Mapping[str, Any], traces: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    engine = evaluation.get("engine") or {}
    settings = " · ".join(f"{_escape(what)} <b>{_escape(value)}</b>" for what, value in engine_settings(evaluation))
    bars = _figure(
        plot_engine,
        evaluation,
        "Bar chart of latency for each policy",
        "Shorter is better."
        + (" GPU only keeps every expert on the device, so it is the floor." if "gpu_only" in engine else ""),
    )
    spans = _figure(
        plot_timeline,
        traces,
        "Timeline of compute, transfer and waiting for each policy",
        "A short window of decoding. Where a transfer runs beside compute it costs nothing; waiting is what remains "
        "exposed. Numbers in the bars are MoE blocks.",
    )
    if not (engine or spans):
        return ""
    return (
        "<section><h2>Offloaded inference</h2>"
        + (f'<p class="settings">{settings}</p>' if settings else "")
        + (_engine_table(engine) if engine else "")
        + bars
        + (f"<h3>Overlap of compute and transfer</h3>{spans}" if spans else "")
        + "</section>"
    )


def _engine_table(engine: Mapping[str, Mapping[str, Any]]) -> str:
    columns = [column_cells([row.get(c.key) for row in engine.values()], c) for c in ENGINE_COLUMNS]
    head = "".join(
        f"<th>{column.header}<small>{unit}</small></th>"
        for column, (unit, _) in zip(ENGINE_COLUMNS, columns, strict=True)
    )
    marks = {True: '<td class="yes">✓ equal</td>', False: '<td class="no">✗ differ</td>', None: f"<td>{ABSENT}</td>"}
    body = ""
    for i, (policy, row) in enumerate(engine.items()):
        ours = ' class="ours"' if policy == "pre_gated" else ""
        cells = "".join(f"<td>{texts[i]}</td>" for _, texts in columns)
        body += f"<tr{ours}><th>{_escape(policy_label(policy))}</th>{cells}{marks[equal(row)]}</tr>"
    caption = (
        "<caption>TTFT: time to first token. TPOT: time per output token after it. Waiting: time in which compute "
        "stands still for an expert. Tokens: compared with the resident model's, and logits with its logits.</caption>"
    )
    return (
        f'<div class="scroll"><table class="engine">{caption}<thead><tr><th>Policy</th>{head}<th>Tokens</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def _correctness(prediction: Mapping[str, Any], metric: str | None) -> float | None:
    """0 to 100, or None if the prediction was not scored."""
    value = (prediction.get("scores") or {}).get(metric)
    if value is None and prediction.get("correct") is not None:
        return 100.0 if prediction["correct"] else 0.0
    return value


def pick_samples(predictions: Sequence[Mapping[str, Any]], metric: str | None) -> list[Mapping[str, Any]]:
    """The first few as they come, and after them the first few mistakes that are not among those."""
    wrong = [p for p in predictions[SAMPLES:] if _correctness(p, metric) == 0]
    return [*predictions[:SAMPLES], *wrong[:MISTAKES]]


def shorten(text: str, limit: int = SOURCE_CHARACTERS) -> str:
    """At most `limit` characters, cut between words where there are any."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head, _, _ = text[:limit].rpartition(" ")
    return f"{head or text[: limit - 1]} …"


def _samples(evaluation: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> str:
    if not predictions:
        return ""
    metric = primary_metric(evaluation)
    chosen = pick_samples(predictions, metric)
    paired = any(p.get("reference_prediction") is not None for p in chosen)
    body = ""
    for p in chosen:
        value = _correctness(p, metric)
        mark = '<span class="yes">✓</span>' if value == 100 else '<span class="no">✗</span>' if value == 0 else ""
        mark = mark or (ABSENT if value is None else f"{value:.0f}")
        cells = [shorten(str(p.get("source", ""))), shorten(str(p.get("prediction", ABSENT)))]
        cells += [shorten(str(p.get("reference_prediction", ABSENT)))] if paired else []
        cells.append(shorten(" / ".join(dict.fromkeys(map(str, p.get("references") or [])))))
        body += f"<tr><td>{mark}</td>" + "".join(f"<td>{_escape(cell)}</td>" for cell in cells) + "</tr>"
    extra = len(chosen) - min(len(predictions), SAMPLES)
    caption = f"The first {min(len(predictions), SAMPLES)} examples" + (
        f", then {extra} mistakes from the rest." if extra else "."
    )
    caption += f" The mark is {metric_label(metric)} of each example." if metric else ""
    model = "<th>Reference model</th>" if paired else ""
    return (
        f'<section><h2>Predictions</h2><div class="scroll"><table class="samples"><caption>{_escape(caption)}</caption>'
        f"<thead><tr><th></th><th>Source</th><th>{_escape(model_labels(evaluation)['pre_gated'])}</th>{model}"
        "<th>Right answers</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _environment(evaluation: Mapping[str, Any]) -> str:
    blocks = []
    for title, values in (("Environment", evaluation.get("environment")), ("Configuration", evaluation.get("config"))):
        pairs = _plain_pairs(values or {})
        if not pairs:
            continue
        rows = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in pairs)
        listing = f'<dl class="columns">{rows}</dl>'
        blocks.append(
            f"<details><summary>{title} of the run</summary>{listing}</details>"
            if title == "Configuration"
            else f"<h2>{title}</h2>{listing}"
        )
    return f"<section>{''.join(blocks)}</section>" if blocks else ""


def _plain_pairs(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, text) with dotted names; what is null or empty is left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += _plain_pairs(value, f"{name}.")
        elif isinstance(value, bool):
            pairs.append((name, "yes" if value else "no"))
        elif value is not None and value != []:
            pairs.append((name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return [(ENVIRONMENT_LABELS.get(name, name), text) for name, text in pairs]
