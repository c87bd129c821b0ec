"""Which combinations of settings cannot work, told before any work starts.

Knows the schema (`config`) alone; what depends on a model, a checkpoint or a machine is refused where that is opened.
"""

from __future__ import annotations

import re
from math import isfinite

from pregate.config import Init, Policy, Run, TaskKind, TrainConfig, UsageError

SIZES = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "num_experts", "expert_capacity")
"""Those parts of a geometry of which there must be at least one."""


def check_run(run: Run) -> None:
    """Refuse combinations that cannot work, before any work starts. Raises `UsageError`."""

    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise UsageError(sentence)

    for key in ("name", "run_dir"):
        need(bool(getattr(run, key).strip()), f"{key} is empty: give it a value, or leave it out.")
    for key, value in run.model.geometry.items():
        whole = isinstance(value, int) and key in SIZES
        need(not whole or value > 0, f"model.geometry.{key}={value} must be at least 1.")
        rate = isinstance(value, int | float) and key == "dropout_rate"
        need(not rate or 0 <= value <= 1, f"model.geometry.{key}={value} must lie between 0 and 1.")
    gate = run.pregate
    need(
        0 <= gate.lookahead <= 3,
        f"pregate.lookahead={gate.lookahead} is outside 0 to 3: 0 is conventional, 1 the paper's choice.",
    )
    need(
        gate.stacks is None or 0 < len(gate.stacks) == len(set(gate.stacks)),
        f"pregate.stacks={gate.stacks} must name at least one stack, each once, or be null for all.",
    )
    fit = run.calibration
    need(
        not (gate.init is Init.calibrated and gate.lookahead and run.task.kind is TaskKind.denoising),
        "pregate.init=calibrated fits the gates of a trained model, which pre-training has none of: leave it out.",
    )
    need(fit.examples >= 2, f"calibration.examples={fit.examples} must be at least 2, one to fit on, one to judge by.")
    need(fit.tokens > 0, f"calibration.tokens={fit.tokens} must be at least 1.")
    need(fit.batch_size > 0, f"calibration.batch_size={fit.batch_size} must be at least 1.")
    need(fit.steps >= 0, f"calibration.steps={fit.steps} must be at least 0, which is the closed form alone.")
    need(0 < fit.held_out < 1, f"calibration.held_out={fit.held_out} must lie between 0 and 1, such as 0.2.")
    for label, train in (("train", run.train), ("source_train", run.source_train)):
        if train is None:
            continue
        fewest = 0 if label == "train" else 1  # a run may leave its converted model as it is, a source must be trained
        need(train.steps >= fewest, f"{label}.steps={train.steps} must be at least {fewest}.")
        for key in (
            "batch_sequences",
            "micro_batch_tokens",
            "eval_examples",
            "eval_every",
            "save_every",
            "log_every",
        ):
            need(getattr(train, key) > 0, f"{label}.{key}={getattr(train, key)} must be at least 1.")
        need(train.learning_rate > 0, f"{label}.learning_rate={train.learning_rate} must be above 0.")
        need(
            train.warmup_steps >= 0 and (train.warmup_steps <= train.steps or train.steps == 0),
            f"{label}.warmup_steps={train.warmup_steps} must lie between 0 and {label}.steps={train.steps}.",
        )
        need(
            train.clip_norm is None or train.clip_norm > 0,
            f"{label}.clip_norm={train.clip_norm} must be above 0, or null for no clipping.",
        )
        need(
            train.dropout is None or 0 <= train.dropout < 1,
            f"{label}.dropout={train.dropout} must lie in [0, 1), or be null to keep the model's own.",
        )
        check_distillation(label, train)
    task = run.task
    need(task.max_source_tokens > 1, f"task.max_source_tokens={task.max_source_tokens} must be at least 2.")
    need(task.max_target_tokens > 1, f"task.max_target_tokens={task.max_target_tokens} must be at least 2.")
    need(
        task.kind is not TaskKind.classification or len(task.labels) >= 2,
        f"task {task.name!r} is a classification and needs task.labels=[first,second,…], one word a class.",
    )
    for key, what in (("header", "column of the file"), ("labels", "class")):
        names = getattr(task, key)
        twice = [name for place, name in enumerate(names) if name in names[:place]]
        need(not twice, f"task.{key} names {', '.join(twice[:1])} twice: give each {what} a name of its own.")
        need(all(name.strip() for name in names), f"task.{key} has an empty name: give each {what} one.")
    need(0 < task.noise_density < 1, f"task.noise_density={task.noise_density} must lie between 0 and 1.")
    need(task.mean_span_tokens >= 1, f"task.mean_span_tokens={task.mean_span_tokens} must be at least 1.")
    need(bool(run.engine.policies), "engine.policies is empty: name at least one of " + ", ".join(Policy) + ".")
    need(
        run.eval.examples is None or run.eval.examples > 0,
        f"eval.examples={run.eval.examples} must be at least 1, or null for the whole split.",
    )
    need(
        run.eval.max_new_tokens is None or run.eval.max_new_tokens > 0,
        f"eval.max_new_tokens={run.eval.max_new_tokens} must be at least 1, or null for task.max_target_tokens.",
    )
    need(run.eval.agreement_examples >= 0, f"eval.agreement_examples={run.eval.agreement_examples} must be at least 0.")
    for setting in ("device_budget", "host_budget"):
        share_of(f"engine.{setting}", getattr(run.engine, setting) or "")
    bench = run.bench
    for budget in bench.budgets:
        share_of("bench.budgets", budget or "")
    for key in ("caches", "tiers", "drives", "slab_dtypes", "budgets", "batches"):
        need(bool(getattr(bench, key)), f"bench.{key} is empty: name at least one, or leave the setting out.")
    for key in ("batches", "active_experts"):
        need(
            min(getattr(bench, key), default=1) > 0, f"bench.{key}={list(getattr(bench, key))} must all be at least 1."
        )
    for key in ("new_tokens", "slow_new_tokens"):
        need(getattr(bench, key) > 1, f"bench.{key}={getattr(bench, key)} must be at least 2, to time tokens apart.")
    most, fewest = max(bench.active_experts, default=1), min(bench.batches)
    need(
        most <= fewest,
        f"bench.active_experts={most} needs as many tokens a step, but bench.batches has {fewest}: raise the batches.",
    )
    for label, section, keys in (
        ("bench", bench, ("prompt_len", "repeats", "warmup", "max_seconds_per_row")),
        ("eval", run.eval, ("batch_size", "num_beams", "bootstrap_samples")),
        ("engine", run.engine, ("io_threads", "bench_prompts", "bench_new_tokens", "bench_repeats")),
    ):
        for key in keys:
            need(getattr(section, key) > 0, f"{label}.{key}={getattr(section, key)} must be at least 1.")


def share_of(setting: str, budget: str) -> float | None:
    """The share that a budget such as "25%" is, or None where it is a size. Raises `UsageError` for a share of nothing
    or of more than all."""
    text = str(budget).strip()
    if not text.endswith("%"):
        return None
    number = text[:-1].strip()
    share = float(number) / 100 if re.fullmatch(r"\d+(\.\d*)?|\.\d+", number, re.ASCII) else 0.0
    if not 0 < share <= 1:
        raise UsageError(
            f"{setting}={budget} is not a share of the experts: write a number above 0% and up to 100%, or a size such "
            "as 4GB."
        )
    return share


def check_distillation(label: str, train: TrainConfig) -> None:
    """Refuse a teacher that teaches nothing, lessons without a teacher, and weights that are none."""
    for key in ("distill_logits", "distill_routing"):
        value = getattr(train, key)
        if not (isfinite(value) and value >= 0):
            raise UsageError(f"{label}.{key}={value} must be 0 or above.")
    if not (isfinite(train.distill_temperature) and train.distill_temperature > 0):
        raise UsageError(f"{label}.distill_temperature={train.distill_temperature} must be above 0.")
    weighted = train.distill_logits > 0 or train.distill_routing > 0
    if weighted and train.teacher is None:
        raise UsageError(
            f"{label}.distill_logits and {label}.distill_routing need a teacher: set {label}.teacher=DIR_OR_ID, or "
            "both to 0."
        )
    if train.teacher is not None and not weighted:
        raise UsageError(
            f"{label}.teacher={train.teacher} teaches nothing: set {label}.distill_logits or {label}.distill_routing "
            f"above 0, or {label}.teacher=null."
        )
