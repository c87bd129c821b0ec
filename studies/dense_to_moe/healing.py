"""Healing a split model with `pregate.train`: its settings, how many steps the time allows, and what it leaves.

Knows the settings of the project's training and nothing about how a model was split.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.cli import compose_run
from pregate.config import UsageError
from pregate.models.loading import load_resident
from pregate.models.objectives import predicting
from pregate.models.vocabulary_losses import Lesson
from pregate.system.durable import read_object, write_json
from pregate.train import main as train
from pregate.training.run_dir_lock import SUMMARY
from studies.dense_to_moe.healing_text import TOKENIZER

BATCH_ROWS, MICRO_ROWS = 8, 4
"""Rows of an optimizer step, and of what is in memory at a time."""
PROBES = 2
"""Micro batches that are timed, after one that is not."""
VALIDATIONS = 8
"""Validations of a whole healing, each of `VALIDATION_ROWS` rows."""
VALIDATION_ROWS = 32
UPDATE = 1.1
"""A step takes so many times as long as its passes: the update, validations and saved states come on top."""


def plan(
    file: Path, source: Path, teacher: Path | None, rows_BT: Tensor, hours: float, steps: int | None
) -> dict[str, Any]:
    """How many steps to take, from `steps` or the measured speed; written once, so that a resumed healing keeps it."""
    if (found := read_object(file)) is not None:
        return found
    batch_tokens = BATCH_ROWS * rows_BT.shape[1]
    found = {"batch_tokens": batch_tokens}
    if steps is None and hours > 0:
        speed = tokens_per_second(source, teacher, rows_BT)
        steps = round(hours * 3600 * speed / batch_tokens)
        if steps < 1:
            raise UsageError(
                f"--hours {hours:g} is less than one step takes at {speed:.0f} tokens/s: set at least "
                f"{batch_tokens / speed / 3600:.2g}, or 0 for no healing."
            )
        found |= {"tokens_per_s": speed, "hours": hours}
    found["steps"] = steps or 0
    write_json(file, found)
    return found


def tokens_per_second(source: Path, teacher: Path | None, rows_BT: Tensor) -> float:
    """The speed of training on this machine, measured on a few passes, through the teacher too if there is one."""
    model = load_resident(source, dtype=torch.float32).train()
    model.set_expert_path("grouped")
    teaches = load_resident(teacher, dtype=torch.float32).eval() if teacher else None
    part_BT, seconds = rows_BT[:MICRO_ROWS], 0.0
    for probe in range(PROBES + 1):
        begun = time.perf_counter()
        lesson = None
        if teaches is not None:
            with torch.no_grad():
                answer = teaches(input_ids=part_BT, logits_at=predicting(part_BT), use_cache=False)
            lesson = Lesson(answer.logits, 1.0, 1.0)
        model(input_ids=part_BT, labels=part_BT, loss_only=True, lesson=lesson, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        seconds += (time.perf_counter() - begun) if probe else 0.0
    return PROBES * part_BT.numel() / (seconds * UPDATE)


def settings(
    source: Path,
    text: Path,
    run_dir: Path,
    steps: int,
    row_tokens: int,
    seed: int,
    teacher: Path | None,
    more: list[str],
) -> list[str]:
    """What a user would write behind `python -m pregate.train`. `more` comes last, and wins."""
    taught = [f"train.teacher={teacher}", "train.distill_logits=1"] if teacher else []
    every = max(1, steps // VALIDATIONS)
    return [
        "task=language_modelling",
        "name=healing",
        "task.name=healing",
        f"task.files.train={text / 'train.parquet'}",
        f"task.files.validation={text / 'validation.parquet'}",
        f"task.max_source_tokens={row_tokens}",
        f"model.source={source}",
        f"model.tokenizer={text / TOKENIZER}",
        "pregate=conventional",
        f"run_dir={run_dir}",
        f"seed={seed}",
        "resume=true",
        "then_eval=false",
        "tracking=jsonl",
        f"train.steps={steps}",
        f"train.batch_sequences={BATCH_ROWS}",
        f"train.micro_batch_tokens={MICRO_ROWS * row_tokens}",
        "train.precision=fp32",
        "train.learning_rate=3e-4",
        "train.schedule=linear",
        f"train.warmup_steps={min(20, steps // 10)}",
        f"train.eval_every={every}",
        f"train.eval_examples={VALIDATION_ROWS}",
        f"train.save_every={min(50, every)}",
        "train.keep_last=1",
        "train.log_every=1",
        "eval.batch_size=4",
        *taught,
        *more,
    ]


def heal(run_dir: Path, arguments: list[str]) -> dict[str, Any]:
    """Train, or go on training, unless that is done; the summary of the run."""
    if (done := read_object(run_dir / SUMMARY)) is None:
        train(compose_run(arguments))
        done = read_object(run_dir / SUMMARY)
    assert done is not None
    return done
