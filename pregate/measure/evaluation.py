"""The evaluation of one checkpoint: accuracy and parity, routing agreement, and each policy's latency and memory.

Reads as a table of contents; the parts are `engine_predictions`, `policy_latency`, `routing_figures` and `report`.
Leaves `eval.json`, `predictions.jsonl` and `report.html` in one directory.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pregate.config import Drive, Policy, Run, SlabDtype, Tier, UsageError
from pregate.engine.budget import DeviceFullError, resolve_tier, slots_within
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.device.limits import slots_for
from pregate.engine.engine import OffloadEngine
from pregate.measure.engine_predictions import predict
from pregate.measure.intervals import bootstrap_interval
from pregate.measure.perfetto import write_perfetto
from pregate.measure.policy_latency import BenchRequest, Expected, measure_policy, resident_answers
from pregate.measure.report.evaluation_plots import plot_agreement, plot_engine, plot_timeline
from pregate.measure.report.evaluation_tables import print_summary
from pregate.measure.report.page import write_report
from pregate.measure.routing_figures import BlockRoutes, compare_routes, record_routes
from pregate.measure.servable import check_reference, check_servable, open_driven
from pregate.models.checkpoint import read_config
from pregate.models.experts import ExpertSpec
from pregate.models.family import config_of, family_of
from pregate.models.finite import WHAT_TO_CHECK
from pregate.models.loading import load_resident, open_model
from pregate.models.pregating import PreGating, settings_asked_for
from pregate.system.console import console, say
from pregate.system.durable import flush_folders, write_json, write_text
from pregate.system.machine import environment, pick_device, set_seed
from pregate.system.memory import free_memory
from pregate.tasks.base import Example, Scores, Task
from pregate.tasks.registry import build_task
from pregate.tasks.tokens import Collator, check_vocabulary, load_tokenizer
from pregate.tracking import Tracker

ENGINE_COLUMNS = (
    "ttft_ms",
    "tpot_ms",
    "tokens_per_s",
    "block_ms",
    "exposed_ms_per_token",
    "peak_device_bytes",
    "bytes_moved",
    "hits",
    "misses",
    "tokens_equal_resident",
    "logits_max_diff",
    "logits_equal_resident",
)


@dataclass
class Subject:
    """A model under evaluation: its directory, its predictions and what is known about its routes."""

    checkpoint: str
    predictions: list[str]
    scores: Scores
    routes: dict[str, list[BlockRoutes]]


@dataclass
class Bench:
    """What is evaluated and with what: the models, and the run, task, tokenizer, examples and device they share."""

    run: Run
    checkpoint: str
    reference: str | None
    task: Task
    tokenizer: Any
    collate: Collator
    examples: list[Example]
    device: torch.device
    family: ExpertSpec
    slab_bytes: int


def evaluate(bench: Bench, out_dir: Path, tracker: Tracker) -> dict[str, Any]:
    """Evaluate what `prepare` has checked; returns what `eval.json` holds."""
    run = bench.run
    set_seed(run.seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    subject = assess(bench, bench.checkpoint, run.engine.policy)
    # within the budget, where there is one: all experts may be more than the device holds
    policy = Policy.gpu_only if run.engine.device_budget is None else run.engine.policy
    compared = assess(bench, bench.reference, policy) if bench.reference else None
    engine, traces = measure_engine(bench, out_dir / "traces")
    evaluation = {
        "task": bench.task.name,
        "split": run.eval.split or run.task.eval_split,
        "num_examples": len(bench.examples),
        "primary_metric": bench.task.primary_metric,
        "checkpoint": bench.checkpoint,
        "checkpoint_label": _label(bench.checkpoint),
        "reference": bench.reference,
        "reference_label": "source" if _is_source(bench.reference) else "reference",
        **compare(run, subject, compared),
        "engine": engine,
        "engine_settings": settings(bench),
        "environment": environment(),
    }
    predictions = list_predictions(bench.examples, subject, compared)
    write_results(run, out_dir, evaluation, predictions, traces)
    publish(tracker, out_dir, evaluation, traces)
    print_summary(evaluation, console())
    return evaluation


def prepare(run: Run, checkpoint: str, reference: str | None = None) -> Bench:
    """Check everything that evaluation needs and read the examples; nothing is written.

    Raises `UsageError` for a checkpoint, reference, task, device or budget that cannot be evaluated.
    """
    device = pick_device(run.engine.device)
    family, slab_bytes = check_servable(run, checkpoint)
    check_gates(run, checkpoint)
    task = build_task(run)
    tokenizer = load_tokenizer(replace(run, checkpoint=checkpoint))
    config = read_config(checkpoint)
    check_vocabulary(tokenizer, checkpoint, config)
    check_reference(run, reference, config, tokenizer)
    examples = task.examples(run.eval.split or run.task.eval_split, run.eval.examples)
    objective = family_of(config).objective
    collate = Collator.for_task(run.task, tokenizer, objective)
    return Bench(run, checkpoint, reference, task, tokenizer, collate, examples, device, family, slab_bytes)


def check_gates(run: Run, checkpoint: str) -> None:
    """Refuse a checkpoint whose gates contradict what the user asked for on the command line."""
    config = read_config(checkpoint)
    config_of(config).pregating.refuse_other(
        PreGating.of_config(run.pregate).naming(family_of(config).stacks),
        settings_asked_for(run) - {"init"},  # how gates began says nothing of a checkpoint that has been trained
        checkpoint,
        "leave the setting out, or convert and train a checkpoint with it",
    )


def open_engine(
    bench: Bench, checkpoint: str, policy: Policy, batch: int | None = None
) -> OffloadEngine | DeviceEngine:
    """`batch`: the most rows of a request, for the device-driven engine; None for the evaluation's."""
    engine = bench.run.engine
    if engine.drive is Drive.device:
        return open_driven(bench.run, checkpoint, policy, bench.device, batch)
    pack_dir = None
    if engine.pack_dir is not None:
        # one place each, or the two models would replace each other's pack in turn
        pack_dir = Path(engine.pack_dir) / ("reference" if checkpoint == bench.reference else "checkpoint")
    return OffloadEngine.open(
        checkpoint,
        policy=policy,
        tier=engine.tier,
        device=bench.device,
        device_budget=None if policy is Policy.gpu_only else engine.device_budget,
        pack_dir=pack_dir,
        io_threads=engine.io_threads,
        io_uring=engine.io_uring,
        prefill_chunk=engine.prefill_chunk,
        cache=engine.cache,
        slab_dtype=engine.slab_dtype,
        host_budget=engine.host_budget,
    )


def assess(bench: Bench, checkpoint: str, policy: Policy) -> Subject:
    """Predictions, scores and routes of one model, served by the engine."""
    settings = bench.run.eval
    with open_engine(bench, checkpoint, policy) as engine:
        predictions = predict(
            engine,
            bench.tokenizer,
            bench.examples,
            bench.collate,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens or bench.run.task.max_target_tokens,
            num_beams=settings.num_beams,
            name=checkpoint,
        )
        routed = bench.examples[: settings.agreement_examples]
        routes = record_routes(engine, routed, bench.collate, settings.batch_size, checkpoint) if routed else {}
    scores = bench.task.score(predictions, [example.references for example in bench.examples])
    return Subject(checkpoint, predictions, scores, routes)


def compare(run: Run, subject: Subject, reference: Subject | None) -> dict[str, Any]:
    """Scores with intervals and the analysis of routes; against a reference the paired difference of each metric."""

    def intervals(scores: Scores) -> dict[str, list[float]]:
        return {m: bootstrap_interval(v, run.eval.bootstrap_samples, run.seed) for m, v in scores.per_example.items()}

    section: dict[str, Any] = {
        "scores": {"pre_gated": subject.scores.overall},
        "intervals": {"pre_gated": intervals(subject.scores)},
    }
    if subject.routes:
        section["routing"] = compare_routes(subject.routes, reference.routes if reference else None)
    if reference is None:
        return section
    section["scores"]["reference"] = reference.scores.overall
    section["intervals"]["reference"] = intervals(reference.scores)
    parity: dict[str, Any] = {}
    for metric, values in subject.scores.per_example.items():
        differences = [a - b for a, b in zip(values, reference.scores.per_example[metric], strict=True)]
        parity[f"{metric}_delta"] = subject.scores.overall[metric] - reference.scores.overall[metric]
        parity[f"{metric}_delta_interval"] = bootstrap_interval(differences, run.eval.bootstrap_samples, run.seed)
    section["parity"] = parity
    return section


def _label(checkpoint: str) -> str:
    """What kind of model it is."""
    gating = config_of(read_config(checkpoint)).pregating
    return "pre_gated" if gating.lookahead else "conventional"


def _is_source(reference: str | None) -> bool:
    """Whether the reference is the conventional model that a run trained for itself."""
    return reference is not None and Path(reference).parts[-2:] == ("source", "checkpoint")


def measure_engine(bench: Bench, trace_dir: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The record of each policy, in the order asked for, and their timelines; a whole trace of each to `trace_dir`."""
    engine = bench.run.engine
    shown = bench.examples[: engine.bench_prompts]
    prompts = [bench.collate.prompts([example])["input_ids"] for example in shown]
    request = BenchRequest(prompts, engine.bench_new_tokens, engine.bench_repeats)
    expected = _expected(bench, request)
    # what training or packing wrote must not reach the disk while policies are timed
    os.sync()
    records, traces = {}, {}
    for policy in engine.policies:

        def opened(policy: Policy = policy) -> Any:
            return open_engine(bench, bench.checkpoint, policy, batch=1)

        keep = partial(write_perfetto, trace_dir / f"{policy}.json", title=str(policy))
        try:
            record, timeline = measure_policy(opened, request, bench.device, expected, keep)
            if timeline:
                traces[str(policy)] = timeline
            check_logits(bench.checkpoint, f"served with policy {policy}", record["logits_finite"])
            records[str(policy)] = record
        except (DeviceFullError, torch.OutOfMemoryError):
            if policy is not Policy.gpu_only:
                raise
            say("All experts together do not fit on the device: gpu_only is left out.")
    return records, traces


def check_logits(checkpoint: str, how: str, finite: bool) -> None:
    """Raises `UsageError` for logits that are not finite."""
    if not finite:
        raise UsageError(f"The logits of {checkpoint}, {how}, are NaN or infinite: {WHAT_TO_CHECK}.")


def _expected(bench: Bench, request: BenchRequest) -> Expected | None:
    """What the resident model gives, or None where the whole model does not fit on the device."""
    source = open_model(bench.checkpoint)
    gc.collect()  # models that have been served refer to themselves, and would count as used memory
    try:
        # asked before, because a system without memory ends the process
        if sum(source.num_bytes(name) for name in source.names()) > free_memory(bench.device):
            raise torch.OutOfMemoryError
        resident = load_resident(bench.checkpoint, device_map=str(bench.device))
        expected = resident_answers(resident, request, bench.run.engine.slab_dtype is SlabDtype.source)
    except torch.OutOfMemoryError:
        say("The whole model does not fit on the device: tokens are not compared with it.")
        return None
    finite = all(bool(logits.isfinite().all()) for logits in expected.logits)
    check_logits(bench.checkpoint, "as a whole in memory", finite)
    return expected


def settings(bench: Bench) -> dict[str, Any]:
    """What the engine's figures were measured with."""
    engine = bench.run.engine
    budget = None if engine.policy is Policy.gpu_only else engine.device_budget
    if engine.drive is Drive.device:
        config = config_of(read_config(bench.checkpoint))
        slots, tier = slots_for(budget, engine.policy, config, bench.slab_bytes, 1), Tier.dram
    else:
        slots = slots_within(budget, engine.policy, bench.family, bench.slab_bytes)
        tier = resolve_tier(engine.tier, bench.device)
    return {
        "device": str(bench.device),
        "tier": str(tier),
        "drive": str(engine.drive),
        "cache": str(engine.cache),
        "device_budget_bytes": slots * bench.slab_bytes,
        "expert_bytes": bench.slab_bytes,
        "num_experts_total": len(bench.family.keys()),
        "batch": 1,
        "new_tokens": engine.bench_new_tokens,
        "prompts": min(engine.bench_prompts, len(bench.examples)),
        "repeats": engine.bench_repeats,
    }


def list_predictions(examples: list[Example], subject: Subject, reference: Subject | None) -> list[dict[str, Any]]:
    """One record an example: id, source, prediction, references, scores, and the reference model's prediction."""
    records = []
    for i, example in enumerate(examples):
        record = {
            "id": example.id,
            "source": example.source,
            "prediction": subject.predictions[i],
            "references": list(example.references),
            "scores": {metric: values[i] for metric, values in subject.scores.per_example.items()},
        }
        if reference is not None:
            record["reference_prediction"] = reference.predictions[i]
        records.append(record)
    return records


def write_results(
    run: Run,
    out_dir: Path,
    evaluation: dict[str, Any],
    predictions: list[dict[str, Any]],
    traces: dict[str, list[dict[str, Any]]],
) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in predictions)
    write_text(out_dir / "predictions.jsonl", "".join(lines))
    if run.eval.report:
        write_report(out_dir / "report.html", evaluation, predictions, traces)
    # last: whoever finds eval.json finds the rest
    write_json(out_dir / "eval.json", evaluation)


def routing_scalars(routing: dict[str, Any]) -> dict[str, float]:
    """The routing section as `routing/STACK/block_N/FIGURE`; of the figures of each model those of the checkpoint."""
    return {
        f"routing/{stack}/block_{block}/{name}": value
        for name, figure in routing.items()
        for stack, blocks in figure.get("pre_gated", figure).items()
        for block, value in enumerate(blocks)
        if value is not None
    }


def publish(
    tracker: Tracker, out_dir: Path, evaluation: dict[str, Any], traces: dict[str, list[dict[str, Any]]]
) -> None:
    """Numbers, tables and plots to the tracker."""
    summary = {f"eval/{metric}": value for metric, value in evaluation["scores"]["pre_gated"].items()}
    for metric, value in evaluation["scores"].get("reference", {}).items():
        summary[f"reference/{metric}"] = value
    summary |= routing_scalars(evaluation.get("routing", {}))
    for policy, record in evaluation["engine"].items():
        summary |= {f"engine/{policy}/{name}": float(value) for name, value in record.items()}
    tracker.rewind(-1, *(name.partition("/")[0] for name in summary))
    tracker.log(summary, 0)
    tracker.summary(summary)
    parity = evaluation.get("parity", {})
    metrics = list(evaluation["scores"]["pre_gated"])
    tracker.table(
        "parity",
        ["metric", evaluation["checkpoint_label"], "reference", "delta", "interval_low", "interval_high"],
        [
            [
                metric,
                evaluation["scores"]["pre_gated"][metric],
                evaluation["scores"].get("reference", {}).get(metric),
                parity.get(f"{metric}_delta"),
                *parity.get(f"{metric}_delta_interval", [None, None]),
            ]
            for metric in metrics
        ],
    )
    rows = [[policy, *(record.get(c) for c in ENGINE_COLUMNS)] for policy, record in evaluation["engine"].items()]
    tracker.table("engine", ["policy", *ENGINE_COLUMNS], rows)
    plots = out_dir / "plots"
    plots.mkdir(exist_ok=True)
    for name, drawn in (
        ("engine", plot_engine(evaluation, plots / "engine.png")),
        ("agreement", plot_agreement(evaluation, plots / "agreement.png")),
        ("timeline", plot_timeline(traces, plots / "timeline.png")),
    ):
        if drawn:
            tracker.image(f"plots/{name}", plots / f"{name}.png")
    flush_folders(out_dir, "plots", "traces")
    if (out_dir / "report.html").is_file():
        tracker.html("report", out_dir / "report.html")
