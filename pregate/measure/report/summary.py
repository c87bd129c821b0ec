"""What an evaluation says, as tables, labels and sentences.

Knows the fields of `eval.json` as plain dicts, each of which may be missing. Knows nothing about pages or about how
anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pregate.measure.tables import ABSENT, Cell, CellWriter, Table, in_one_unit, policy_label, signed, three_digits
from pregate.system.runtime import human_bytes

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
    "tokens_per_s": ("Speed", "tokens/s"),
    "block_ms": ("MoE block", "ms"),
    "exposed_ms_per_token": ("Waiting", "ms/token"),
    "bytes_moved": ("Moved", "bytes"),
    "peak_device_bytes": ("Peak device", "bytes"),
    "hits": ("Hits", "experts"),
    "misses": ("Misses", "experts"),
}
"""Header and unit of each figure of a policy."""
ROUTING_FIGURES = {
    "agreement": "Agreement, %",
    "gate_mass": "Mass, %",
    "load_balance": "Load",
    "switch_rate": "Switches, %",
}


def part(evaluation: Evaluation, name: str) -> Mapping[str, Any]:
    """A section of the evaluation; empty if it is missing or null."""
    return evaluation.get(name) or {}


# --- names ----------------------------------------------------------------------------------------------------------


def metric_label(metric: str) -> str:
    return METRIC_LABELS.get(metric, metric)


def model_labels(evaluation: Evaluation) -> dict[str, str]:
    """What to call the evaluated checkpoint, `pre_gated` in all records, and the reference: what they are."""
    labels = {
        "pre_gated": policy_label(evaluation.get("checkpoint_label", "pre_gated")),
        "reference": policy_label(evaluation.get("reference_label", "reference")),
    }
    return {model: label.capitalize() for model, label in labels.items()}


def primary_metric(evaluation: Evaluation) -> str | None:
    """The metric that headlines: the one named, else the first one scored."""
    scores = next(iter(part(evaluation, "scores").values()), {})
    return evaluation.get("primary_metric") or next(iter(scores), None)


def engine_settings(evaluation: Evaluation) -> list[tuple[str, str]]:
    """(what, value) of the conditions under which the engine was measured; only what is known."""
    pairs = []
    for key, value in part(evaluation, "engine_settings").items():
        if value is not None:
            label = SETTING_LABELS.get(key, key.removesuffix("_bytes").replace("_", " "))
            pairs.append((label, human_bytes(value) if key.endswith("_bytes") else str(value)))
    return pairs


# --- tables ---------------------------------------------------------------------------------------------------------


def score_table(evaluation: Evaluation) -> Table | None:
    """A row a metric: each model's score, and their difference, with 95 % intervals; None without scores."""
    scores, intervals, parity = (part(evaluation, name) for name in ("scores", "intervals", "parity"))
    labels = model_labels(evaluation)
    headers = ["Metric"]
    headers += [Cell(labels.get(model, policy_label(model).capitalize()), "% [95 % interval]") for model in scores]
    if len(scores) > 1:
        headers.append(Cell("Difference", "points [95 % interval]"))
    rows = []
    for metric in dict.fromkeys(metric for values in scores.values() for metric in values):
        row = [metric_label(metric)]
        for model, values in scores.items():
            row.append(_score(values.get(metric), part(intervals, model).get(metric), "{:.1f}".format))
        if len(scores) > 1:
            row.append(_score(parity.get(f"{metric}_delta"), parity.get(f"{metric}_delta_interval"), signed))
        rows.append(row)
    return Table(headers, rows) if rows else None


def _score(value: float | None, bounds: Sequence[float] | None, write: Callable[[float], str]) -> Cell:
    if value is None:
        return Cell(ABSENT)
    return Cell(write(value), f"[{write(bounds[0])}, {write(bounds[1])}]" if bounds else "")


def routing_table(evaluation: Evaluation) -> Table | None:
    """A row a MoE block, in hundredths, with a column for each model where a figure is of one model.

    None where only the agreement is known, which the plot shows.
    """
    columns: dict[str, Mapping[str, Sequence[float | None]]] = {}
    labels = model_labels(evaluation)
    for figure, header in ROUTING_FIGURES.items():
        found = part(part(evaluation, "routing"), figure)
        if found.keys() & labels.keys():
            columns |= {f"{header}, {labels[model].lower()}": found[model] for model in labels if found.get(model)}
        elif found:
            columns[header] = found
    if columns.keys() <= {ROUTING_FIGURES["agreement"]}:
        return None
    rows = []
    for stack, first in next(iter(columns.values())).items():
        for block in range(len(first)):
            values = [dict(enumerate(column.get(stack, ()))).get(block) for column in columns.values()]
            rows.append([f"{stack} {block}", *map(percent, values)])
    return Table(["Block", *columns], rows)


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f}"


def engine_table(evaluation: Evaluation, figures: Sequence[str], more: Mapping[str, CellWriter]) -> Table:
    """A row a policy: those of `ENGINE_FIGURES` that are asked for, and `more` columns by their header."""
    engine = part(evaluation, "engine")
    columns = {"Policy": [policy_label(policy) for policy in engine]}
    for figure in figures:
        header, unit = ENGINE_FIGURES[figure]
        unit, cells = in_one_unit([row.get(figure) for row in engine.values()], unit)
        columns[Cell(header, unit)] = cells
    for header, write in more.items():
        columns[header] = [write(row) or ABSENT for row in engine.values()]
    return Table([*columns], [*zip(*columns.values(), strict=True)])


# --- sentences ------------------------------------------------------------------------------------------------------


def equals_resident(row: Mapping[str, Any]) -> bool | None:
    """Whether a policy gave the resident model's tokens, and its logits where those were compared; None if nothing was
    compared."""
    return row.get("tokens_equal_resident") and row.get("logits_equal_resident", True)


def equality_statement(evaluation: Evaluation) -> tuple[bool, str] | None:
    """Whether every policy gave the resident model's tokens and logits, and that as a sentence; None if nothing was
    compared."""
    engine = part(evaluation, "engine")
    compared = {policy: same for policy, row in engine.items() if (same := equals_resident(row)) is not None}
    wrong = [policy for policy, same in compared.items() if not same]
    other_tokens = [policy for policy in wrong if not engine[policy].get("tokens_equal_resident")]
    differences = [row["logits_max_diff"] for row in engine.values() if row.get("logits_max_diff") is not None]
    most = f"{max(differences):.2g}" if differences else None
    if other_tokens:
        names = ", ".join(map(policy_label, other_tokens))
        return False, f"tokens_equal_resident: FALSE for {names}; their tokens differ from the whole model's."
    if wrong:
        names = ", ".join(map(policy_label, wrong))
        tokens = "their tokens equal the whole model's, their logits"
        return False, f"logits_equal_resident: FALSE for {names}; {tokens} differ by up to {most}."
    if not compared:
        return None
    where = "the whole model in memory" + (f"; logits differ by at most {most}" if most else "")
    return True, f"tokens_equal_resident: true for {len(compared)} of {len(compared)} policies ({where})."


class KeyFigure(NamedTuple):
    """A figure that helps to sum the evaluation up."""

    label: str
    value: str
    unit: str
    note: str


def key_figures(evaluation: Evaluation) -> list[KeyFigure]:
    """At most four figures; what was not measured is left out."""
    engine = part(evaluation, "engine")
    ours, on_demand, resident = (part(engine, policy) for policy in ("pre_gated", "on_demand", "gpu_only"))
    # a conventional model may be served by that policy, and is not pre-gated for it
    served = "Pre-gated" if model_labels(evaluation)["pre_gated"] == "Pre-gated" else "Policy pre-gated"
    found = [_score_figure(evaluation), _agreement_figure(evaluation)]
    if tpot := ours.get("tpot_ms"):
        other = on_demand.get("tpot_ms")
        note = f"on demand: {three_digits(other)} ms ({other / tpot:.2f}×)" if other else ""
        found.append(KeyFigure(f"{served}, per token", three_digits(tpot), "ms", note))
    if peak := ours.get("peak_device_bytes"):
        whole = resident.get("peak_device_bytes")
        note = f"{peak / whole:.0%} of GPU only, {human_bytes(whole)}" if whole else ""
        found.append(KeyFigure(f"{served}, peak memory", *human_bytes(peak).split(" "), note))
    return [figure for figure in found if figure is not None]


def _score_figure(evaluation: Evaluation) -> KeyFigure | None:
    metric, scores = primary_metric(evaluation), part(evaluation, "scores")
    score, reference = (part(scores, model).get(metric) for model in ("pre_gated", "reference"))
    if metric is None or score is None:
        return None
    delta = part(evaluation, "parity").get(f"{metric}_delta")
    note = "" if reference is None else f"reference {reference:.1f}"
    note += "" if delta is None else f", difference {signed(delta)}"
    return KeyFigure(metric_label(metric), f"{score:.1f}", "%", note)


def _agreement_figure(evaluation: Evaluation) -> KeyFigure | None:
    agreement = part(part(evaluation, "routing"), "agreement")
    blocks = [share for shares in agreement.values() for share in shares if share is not None]
    if not blocks:
        return None
    return KeyFigure("Routing agreement", percent(sum(blocks) / len(blocks)), "%", f"mean of {len(blocks)} MoE blocks")
