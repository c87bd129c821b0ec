"""What an evaluation says, as labels and text cells, and its summary for the terminal.

Knows the fields of `eval.json` as plain dicts; knows nothing about HTML or about how anything was measured. A
figure that was not measured is absent there and a dash here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pregate.measure.plots import policy_label, three_digits
from pregate.system.sizes import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

ABSENT = "–"
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


@dataclass(frozen=True)
class Column:
    """A figure of the engine table: its field, header, unit (bytes pick theirs by size) and how to write it."""

    key: str
    header: str
    unit: str
    digits: int | None = None


ENGINE_COLUMNS = (
    Column("ttft_ms", "TTFT", "ms"),
    Column("tpot_ms", "TPOT", "ms"),
    Column("tokens_per_s", "Speed", "tokens/s"),
    Column("block_ms", "MoE block", "ms"),
    Column("exposed_ms_per_token", "Waiting", "ms/token"),
    Column("bytes_moved", "Moved", "bytes"),
    Column("peak_device_bytes", "Peak device", "bytes"),
    Column("hits", "Hits", "experts", digits=0),
    Column("misses", "Misses", "experts", digits=0),
)


def metric_label(metric: str) -> str:
    return METRIC_LABELS.get(metric, metric)


def primary_metric(evaluation: Mapping[str, Any]) -> str | None:
    """The metric that headlines: the one named, else the first one scored."""
    scores = next(iter((evaluation.get("scores") or {}).values()), {})
    return evaluation.get("primary_metric") or next(iter(scores), None)


def column_cells(values: Sequence[float | None], column: Column) -> tuple[str, list[str]]:
    """The unit of a column and its cells, all with the same unit and decimals so that they compare at a glance."""
    known = [float(value) for value in values if value is not None]
    unit, scale = column.unit, 1.0
    if column.unit == "bytes":
        unit, scale = next(
            ((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if max(known, default=1e6) >= size),
            ("B", 1.0),
        )
    scaled = [abs(value / scale) for value in known]
    small = min((value for value in scaled if value > 0), default=1.0)
    decimals = 0 if small >= 100 else 1 if small >= 10 else 2 if small >= 0.1 else 3
    if column.digits is not None:
        decimals = column.digits
    elif unit in ("B", "kB"):
        decimals = 0
    return unit, [ABSENT if value is None else f"{value / scale:,.{decimals}f}" for value in values]


def signed(value: float, decimals: int = 1) -> str:
    """A difference with its sign and a true minus; what rounds to nothing has no sign."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def interval(bounds: Sequence[float] | None, write: Callable[[float], str] = "{:.1f}".format) -> str:
    return f"[{write(bounds[0])}, {write(bounds[1])}]" if bounds else ""


def score_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """One row a metric: label, then (value, 95 % interval) of pre-gated, reference and their difference."""
    scores, intervals = evaluation.get("scores") or {}, evaluation.get("intervals") or {}
    parity = evaluation.get("parity") or {}
    metrics = dict.fromkeys(metric for model in scores.values() for metric in model)
    rows = []
    for metric in metrics:
        cells = []
        for model in scores:
            value = scores[model].get(metric)
            bounds = (intervals.get(model) or {}).get(metric)
            cells.append((ABSENT, "") if value is None else (f"{value:.1f}", interval(bounds)))
        if len(scores) > 1:
            delta = parity.get(f"{metric}_delta")
            bounds = parity.get(f"{metric}_delta_interval")
            cells.append((ABSENT, "") if delta is None else (signed(delta), interval(bounds, signed)))
        rows.append((metric_label(metric), cells))
    return rows


def model_labels(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """What to call the evaluated checkpoint, `pre_gated` in all records, and the reference: what they are."""
    labels = {
        "pre_gated": policy_label(evaluation.get("checkpoint_label", "pre_gated")),
        "reference": policy_label(evaluation.get("reference_label", "reference")),
    }
    return {model: label.capitalize() for model, label in labels.items()}


def score_headers(evaluation: Mapping[str, Any]) -> list[str]:
    models = list(evaluation.get("scores") or {})
    names = model_labels(evaluation)
    return [names.get(model, policy_label(model).capitalize()) for model in models] + (
        ["Difference"] if len(models) > 1 else []
    )


def token_verdict(evaluation: Mapping[str, Any]) -> tuple[bool, str] | None:
    """Whether every policy gave the resident model's tokens, as a sentence; None if nobody looked."""
    told = {policy: equal(row) for policy, row in (evaluation.get("engine") or {}).items()}
    told = {policy: same for policy, same in told.items() if same is not None}
    rows = evaluation.get("engine") or {}
    wrong = [policy for policy, same in told.items() if not same]
    if wrong:
        tokens = [policy_label(policy) for policy in wrong if not rows[policy].get("tokens_equal_resident")]
        if tokens:
            said = f"tokens_equal_resident: FALSE for {', '.join(tokens)}; their tokens differ from the whole model's."
            return False, said
        labels = [policy_label(policy) for policy in wrong]
        return (
            False,
            f"logits_equal_resident: FALSE for {', '.join(labels)}; their tokens equal the whole model's, their logits "
            f"differ by up to {_largest(rows)}.",
        )
    if not told:
        return None
    where = "the whole model in memory"
    if _largest(rows) is not None:
        where += f"; logits differ by at most {_largest(rows)}"
    return True, f"tokens_equal_resident: true for {len(told)} of {len(told)} policies ({where})."


def engine_settings(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of the conditions under which the engine was measured; only what is known."""
    pairs = []
    for key, value in (evaluation.get("engine_settings") or {}).items():
        if value is not None:
            label = SETTING_LABELS.get(key, key.removesuffix("_bytes").replace("_", " "))
            pairs.append((label, human_bytes(value) if key.endswith("_bytes") else str(value)))
    return pairs


def key_figures(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(label, value, unit, note) of at most four figures that sum the evaluation up; the unmeasured are left out."""
    figures = []
    metric, scores = primary_metric(evaluation), evaluation.get("scores") or {}
    score = (scores.get("pre_gated") or {}).get(metric)
    if metric and score is not None:
        reference = (scores.get("reference") or {}).get(metric)
        delta = (evaluation.get("parity") or {}).get(f"{metric}_delta")
        note = "" if reference is None else f"reference {reference:.1f}"
        note += "" if delta is None else f", difference {signed(delta)}"
        figures.append((metric_label(metric), f"{score:.1f}", "%", note))
    agreement = (evaluation.get("routing") or {}).get("agreement") or {}
    blocks = [value for values in agreement.values() for value in values if value is not None]
    if blocks:
        note = f"mean of {len(blocks)} MoE blocks"
        figures.append(("Routing agreement", f"{100 * sum(blocks) / len(blocks):.0f}", "%", note))
    engine = evaluation.get("engine") or {}
    ours, demand, resident = (engine.get(name) or {} for name in ("pre_gated", "on_demand", "gpu_only"))
    # a conventional model may be served by that policy, and is not pre-gated for it
    served = "Pre-gated" if model_labels(evaluation)["pre_gated"] == "Pre-gated" else "Policy pre-gated"
    tpot, tpot_demand = ours.get("tpot_ms"), demand.get("tpot_ms")
    if tpot:
        note = f"on demand: {three_digits(tpot_demand)} ms ({tpot_demand / tpot:.2f}×)" if tpot_demand else ""
        figures.append((f"{served}, per token", three_digits(tpot), "ms", note))
    peak, peak_resident = ours.get("peak_device_bytes"), resident.get("peak_device_bytes")
    if peak:
        note = f"{peak / peak_resident:.0%} of GPU only, {human_bytes(peak_resident)}" if peak_resident else ""
        value, unit = human_bytes(peak).split(" ")
        figures.append((f"{served}, peak memory", value, unit, note))
    return figures


ROUTING_FIGURES = {
    "agreement": "Agreement, %",
    "gate_mass": "Mass, %",
    "load_balance": "Load",
    "switch_rate": "Switches, %",
}


def routing_table(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of the routing section: one row a MoE block, in hundredths, with a column for each model where
    a figure is of one model; nothing of an evaluation that only knows the agreement, which the plot shows."""
    routing = evaluation.get("routing") or {}
    names = {model: label.lower() for model, label in model_labels(evaluation).items()}
    columns: dict[str, Mapping[str, Sequence[float | None]]] = {}
    for figure, header in ROUTING_FIGURES.items():
        found = routing.get(figure) or {}
        if set(found) & set(names):
            columns |= {f"{header}, {names[model]}": found[model] for model in names if found.get(model)}
        elif found:
            columns[header] = found
    if set(columns) <= {ROUTING_FIGURES["agreement"]}:
        return [], []
    rows = []
    for stack, first in next(iter(columns.values())).items():
        for block in range(len(first)):
            values = [
                column[stack][block] if len(column.get(stack, ())) > block else None for column in columns.values()
            ]
            rows.append([f"{stack} {block}", *(ABSENT if value is None else f"{100 * value:.0f}" for value in values)])
    return ["Block", *columns], rows


TERMINAL_COLUMNS = ("ttft_ms", "tpot_ms", "tokens_per_s", "exposed_ms_per_token", "bytes_moved", "peak_device_bytes")


def print_summary(evaluation: Mapping[str, Any], console: Console) -> None:
    """The evaluation on the terminal: scores, routing agreement, a row a policy; at most 100 columns wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    width = min(console.width, 100)

    def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
        built = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, header in enumerate(headers):
            built.add_column(Text(header), justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            ours = str(row[0]) == policy_label("pre_gated")
            built.add_row(
                *(Text(cell) if isinstance(cell, str) else cell for cell in row), style="bold" if ours else ""
            )
        console.print(Text(title, "bold"), width=width)
        console.print(built, width=width)

    count = evaluation.get("num_examples")
    where = " ".join(str(part) for part in (evaluation.get("task"), evaluation.get("split")) if part)
    scores = score_rows(evaluation)
    if scores:
        rows = [[label, *(f"{value} {bounds}".rstrip() for value, bounds in cells)] for label, cells in scores]
        title = f"{where}, {count:,} examples, % with 95 % intervals" if count is not None else where
        table(title, ["Metric", *score_headers(evaluation)], rows)
    agreement = (evaluation.get("routing") or {}).get("agreement") or {}
    for stack, values in agreement.items():
        blocks = " ".join(ABSENT if value is None else f"{100 * value:.0f}" for value in values)
        console.print(Text(f"Routing agreement with the reference, {stack} blocks, %: {blocks}"), width=width)
    engine = evaluation.get("engine") or {}
    if engine:
        shown = [column for column in ENGINE_COLUMNS if column.key in TERMINAL_COLUMNS]
        columns = [(c, *column_cells([row.get(c.key) for row in engine.values()], c)) for c in shown]
        headers = ["Policy", *(f"{c.header}\n{unit}" for c, unit, _ in columns), "Hits\n%", "Tokens\nequal"]
        words = {True: Text("true", "green"), False: Text("FALSE", "bold red"), None: Text(ABSENT)}
        rows = [
            [policy_label(policy), *(cells[i] for _, _, cells in columns), _hit_rate(row), words[equal(row)]]
            for i, (policy, row) in enumerate(engine.items())
        ]
        console.print()
        table("Offloaded inference", headers, rows)
        settings = ", ".join(f"{what} {value}" for what, value in engine_settings(evaluation))
        console.print(Text(settings, "dim"), width=width)
    verdict = token_verdict(evaluation)
    if verdict:
        console.print(Text(verdict[1], "green" if verdict[0] else "bold red"), width=width)


def equal(row: Mapping[str, Any]) -> bool | None:
    """Whether a policy gave the resident model's tokens, and its logits where those were compared; None if nobody
    looked."""
    tokens = row.get("tokens_equal_resident")
    return tokens and row.get("logits_equal_resident", True)


def _largest(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The largest difference of a policy's logits from the resident model's."""
    known = [row["logits_max_diff"] for row in rows.values() if row.get("logits_max_diff") is not None]
    return f"{max(known):.2g}" if known else None


def _hit_rate(row: Mapping[str, Any]) -> str:
    hits, misses = row.get("hits"), row.get("misses")
    if hits is None or misses is None or hits + misses == 0:
        return ABSENT
    return f"{100 * hits / (hits + misses):.0f}"
