"""What an evaluation says, as tables, labels and sentences, and its summary on the terminal.

Knows the fields of `eval.json` as plain dicts, each of which may be missing. Knows nothing about pages or about how
anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from pregate.measure.equality_words import equality, equality_statement
from pregate.measure.table_format import ABSENT, Table, in_one_unit, policy_label, signed, three_digits, tone
from pregate.system.byte_sizes import human_bytes

Evaluation = Mapping[str, Any]
METRIC_LABELS = {
    "em": "Exact match",
    "f1": "F1",
    "accuracy": "Accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
SETTING_LABELS = {"device_budget_bytes": "budget", "expert_bytes": "expert size", "num_experts_total": "experts"}
ENGINE_FIGURES = {
    "ttft_ms": ("TTFT", "ms"),
    "tpot_ms": ("TPOT", "ms"),
    "tokens_per_s": ("Speed with prompt", "tokens/s"),
    "block_ms": ("MoE block", "ms"),
    "exposed_ms_per_token": ("Waiting", "ms/token"),
    "bytes_moved": ("Moved", "bytes"),
    "peak_device_bytes": ("Peak device", "bytes"),
    "hits": ("Hits", "experts"),
    "misses": ("Misses", "experts"),
    "hit_rate": ("Hits", "%"),
}
"""Header and unit of each figure of a policy."""
ON_PAGE = tuple(figure for figure in ENGINE_FIGURES if figure != "hit_rate")
ON_TERMINAL = tuple(figure for figure in ENGINE_FIGURES if figure not in ("block_ms", "hits", "misses"))
ROUTING_FIGURES = {
    "agreement": "Agreement, %",
    "gate_mass": "Mass, %",
    "load_balance": "Load",
    "switch_rate": "Switches, %",
}
WIDEST = 100
"""Characters of a line on the terminal."""


def part(evaluation: Evaluation, *names: str) -> Mapping[str, Any]:
    """A section of the evaluation; empty if it is missing or null."""
    for name in names:
        evaluation = evaluation.get(name) or {}
    return evaluation


# --- names ----------------------------------------------------------------------------------------------------------


def metric_label(metric: str) -> str:
    return METRIC_LABELS.get(metric, metric)


def model_labels(evaluation: Evaluation) -> dict[str, str]:
    """What to call the evaluated checkpoint, `pre_gated` in all records, and the reference: what they are."""
    ours, reference = evaluation.get("checkpoint_label", "pre_gated"), evaluation.get("reference_label", "reference")
    return {"pre_gated": policy_label(ours).capitalize(), "reference": policy_label(reference).capitalize()}


def primary_metric(evaluation: Evaluation) -> str | None:
    """The metric that headlines: the one named, else the first one scored."""
    scores = next(iter(part(evaluation, "scores").values()), {})
    return evaluation.get("primary_metric") or next(iter(scores), None)


def engine_settings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(what, value) of the conditions under which the engine was measured; only what is known."""
    return [
        (
            SETTING_LABELS.get(key, key.removesuffix("_bytes").replace("_", " ")),
            human_bytes(value) if key.endswith("_bytes") else str(value),
        )
        for key, value in part(evaluation, "engine_settings").items()
        if value is not None
    ]


# --- tables ---------------------------------------------------------------------------------------------------------


def score_table(evaluation: Evaluation) -> Table | None:
    """A row a metric: each model's score, and their difference, with 95 % intervals; None without scores."""
    scores, parity, labels = part(evaluation, "scores"), part(evaluation, "parity"), model_labels(evaluation)
    headers = ["Metric", *(f"{labels.get(model, policy_label(model))}\n% [95 % interval]" for model in scores)]
    headers += ["Difference\npoints [95 % interval]"] if len(scores) > 1 else []
    rows = []
    for metric in dict.fromkeys(metric for values in scores.values() for metric in values):
        row = [metric_label(metric)]
        for model, values in scores.items():
            bounds = part(evaluation, "intervals", model).get(metric)
            row.append(_score(values.get(metric), bounds, "{:.1f}".format))
        if len(scores) > 1:
            row.append(_score(parity.get(f"{metric}_delta"), parity.get(f"{metric}_delta_interval"), signed))
        rows.append(row)
    return Table(headers, rows) if rows else None


def _score(value: float | None, bounds: Sequence[float] | None, write: Callable[[float], str]) -> str:
    if value is None:
        return ABSENT
    return f"{write(value)}\n[{write(bounds[0])}, {write(bounds[1])}]" if bounds else write(value)


def routing_table(evaluation: Evaluation) -> Table | None:
    """A row a MoE block, in hundredths, with a column for each model where a figure is of one model.

    None where only the agreement is known, which the plot shows.
    """
    columns: dict[str, Mapping[str, Sequence[float | None]]] = {}
    labels = model_labels(evaluation)
    for figure, header in ROUTING_FIGURES.items():
        found = part(evaluation, "routing", figure)
        if found.keys() & labels.keys():
            columns |= {f"{header}, {labels[model].lower()}": found[model] for model in labels if found.get(model)}
        elif found:
            columns[header] = found
    if columns.keys() <= {ROUTING_FIGURES["agreement"]}:
        return None
    rows = []
    for stack, first in next(iter(columns.values())).items():
        for block in range(len(first)):
            shares = [dict(enumerate(column.get(stack, ()))).get(block) for column in columns.values()]
            rows.append([f"{stack} {block}", *map(percent, shares)])
    return Table(["Block", *columns], rows)


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f}"


def engine_table(evaluation: Evaluation, figures: Sequence[str]) -> Table | None:
    """A row a policy: those of `ENGINE_FIGURES` that are asked for, and whether its tokens are right."""
    engine = {policy: {**row, "hit_rate": _hit_rate(row)} for policy, row in part(evaluation, "engine").items()}
    columns = {"Policy": list(map(policy_label, engine))}
    for figure in figures:
        header, unit = ENGINE_FIGURES[figure]
        unit, cells = in_one_unit([row.get(figure) for row in engine.values()], unit)
        columns[f"{header}\n{unit}"] = cells
    columns["Tokens\nequal"] = [equality(row) or ABSENT for row in engine.values()]
    return Table(list(columns), list(zip(*columns.values(), strict=True))) if engine else None


def _hit_rate(row: Mapping[str, Any]) -> float | None:
    hits, misses = row.get("hits"), row.get("misses")
    return None if hits is None or misses is None or hits + misses == 0 else 100 * hits / (hits + misses)


# --- sentences ------------------------------------------------------------------------------------------------------


def engine_statement(evaluation: Evaluation) -> str:
    """Whether every policy gave the whole model's tokens and logits; empty if nothing was compared."""
    records = [{"policy": policy_label(policy), **row} for policy, row in part(evaluation, "engine").items()]
    statement = equality_statement(records, "policies")
    differences = [row["logits_max_diff"] for row in records if row.get("logits_max_diff") is not None]
    return f"{statement} Logits differ by at most {max(differences):.2g}." if statement and differences else statement


class KeyFigure(NamedTuple):
    """A figure that helps to sum the evaluation up."""

    label: str
    value: str
    unit: str
    note: str


def key_figures(evaluation: Evaluation) -> Iterator[KeyFigure]:
    """At most four figures; what was not measured is left out."""
    metric = primary_metric(evaluation) or ""
    score, reference = (part(evaluation, "scores", model).get(metric) for model in ("pre_gated", "reference"))
    if score is not None:
        delta = part(evaluation, "parity").get(f"{metric}_delta")
        note = "" if reference is None else f"reference {reference:.1f}"
        note += "" if delta is None else f", difference {signed(delta)}"
        yield KeyFigure(metric_label(metric), f"{score:.1f}", "%", note)
    agreement = part(evaluation, "routing", "agreement").values()
    if blocks := [share for shares in agreement for share in shares if share is not None]:
        mean = percent(sum(blocks) / len(blocks))
        yield KeyFigure("Routing agreement", mean, "%", f"mean of {len(blocks)} MoE blocks")
    yield from _engine_figures(evaluation)


def _engine_figures(evaluation: Evaluation) -> Iterator[KeyFigure]:
    ours, on_demand, whole = (part(evaluation, "engine", policy) for policy in ("pre_gated", "on_demand", "gpu_only"))
    # a conventional model may be served by that policy, and is not pre-gated for it
    served = "Pre-gated" if model_labels(evaluation)["pre_gated"] == "Pre-gated" else "Policy pre-gated"
    if tpot := ours.get("tpot_ms"):
        other = on_demand.get("tpot_ms")
        note = f"on demand: {three_digits(other)} ms ({other / tpot:.2f}×)" if other else ""
        yield KeyFigure(f"{served}, per token", three_digits(tpot), "ms", note)
    if peak := ours.get("peak_device_bytes"):
        other = whole.get("peak_device_bytes")
        value, unit = human_bytes(peak).split(" ")
        note = f"{peak / other:.0%} of GPU only, {human_bytes(other)}" if other else ""
        yield KeyFigure(f"{served}, peak memory", value, unit, note)


# --- the terminal ---------------------------------------------------------------------------------------------------


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """Print what is known of the evaluation, at most `WIDEST` characters wide."""
    width = min(console.width, WIDEST)

    def say(line: str, style: str = "") -> None:
        console.print(Text(line, style), width=width)

    if scores := score_table(evaluation):
        count = evaluation.get("num_examples")
        scores.title = " ".join(filter(None, (evaluation.get("task"), evaluation.get("split"))))
        scores.title += f", {count:,} examples" if count is not None else ""
        scores.print(console, width)
    for stack, shares in part(evaluation, "routing", "agreement").items():
        blocks = " ".join(map(percent, shares))
        say(f"Routing agreement with the reference, {stack} blocks, %: {blocks}")
    if engine := engine_table(evaluation, ON_TERMINAL):
        engine.title = "Offloaded inference"
        console.print()
        engine.print(console, width)
        say(", ".join(f"{what} {value}" for what, value in engine_settings(evaluation)), "dim")
    if statement := engine_statement(evaluation):
        say(statement.replace("**", ""), tone(statement) or "green")
