"""What is kept of a finished cell: one JSON line with everything that the tables, plots and intervals are made from.

Knows the files that a training command leaves; knows nothing about how cells are run or compared.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pregate.config import UsageError
from pregate.conversion.manifest import MANIFEST
from pregate.system.durable import append_line, read_lines, to_jsonable, write_json
from pregate.system.machine import environment
from studies.accuracy.arms_and_seeds import PRETRAINING, Cell

CELLS, BASELINES, STUDY = "cells.jsonl", "baselines.json", "study.json"
DIGITS = 4
Record = dict[str, Any]


def claim(folder: Path, identity: Record) -> None:
    """Note in `folder` which study it is of. Raises `UsageError` where it is another's or cannot be written."""
    check_claim(folder, identity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STUDY, identity)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror}): choose another.") from error


def check_claim(folder: Path, identity: Record) -> None:
    """Raises `UsageError` where `folder` holds cells that no study, or another one, has claimed."""
    path = folder / STUDY
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != identity:
            raise UsageError(f"{folder} holds {_name(found)}, not {_name(identity)}: choose another with OUT and WORK.")
    elif (folder / CELLS).is_file():
        raise UsageError(f"{folder} holds cells but no {STUDY} that says of which study: choose another with OUT.")


def _name(identity: Record) -> str:
    source = f" of {identity['source']}" if identity.get("source") else ""
    return f"{'a dry run of ' if identity.get('dry') else ''}the {identity.get('size')} study{source}"


@contextmanager
def alone(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` against other processes and yield True. If another holds it, wait for it, or without
    `wait` yield False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_free(path: Path) -> bool:
    """Whether no process holds the lock file `path`."""
    with alone(path, wait=False) as mine:
        return mine


def finished(run_dir: Path) -> bool:
    """Whether the command that was to fill `run_dir` has ended well and its checkpoint is still there."""
    return (run_dir / "summary.json").is_file() and (run_dir / "checkpoint" / "config.json").is_file()


def build_record(cell: Cell, run_dir: Path, command: str) -> Record:
    """The record of a finished cell: its settings, scores in percent, routes, seconds, validation points, command.

    `example_scores` are the primary metric of each example, in the order of the split, so that paired intervals can
    be computed from records alone. What the run did not measure is absent.
    """
    summary = json.loads((run_dir / "summary.json").read_text())
    record: Record = {
        "cell": cell.name,
        "arm": cell.arm,
        "variant": cell.variant,
        "task": cell.task,
        "seed": cell.seed,
        "lookahead": cell.lookahead,
        "init": cell.init,
        "entry": cell.entry,
        "weights": cell.weights,
        "start": cell.start,
        "gate": cell.gate,
        "stacks": list(cell.stacks),
        "steps": summary["train"]["steps"],
        "train_seconds": round(summary["train"]["seconds"], 1),
        "target_tokens": summary["train"]["target_tokens"],
        "curve": validation_points(run_dir / "metrics.jsonl"),
        "command": command,
    }
    record["parameters"] = num_parameters(run_dir / "checkpoint")
    calibration = calibration_seconds(run_dir, summary)
    if calibration is not None:
        record["calibration_seconds"] = round(calibration, 2)
    made_in = summary.get("environment")
    if cell.arm != PRETRAINING or (run_dir / "eval.json").is_file():
        evaluation = json.loads((run_dir / "eval.json").read_text())
        metric = evaluation["primary_metric"]
        made_in = evaluation.get("environment", made_in)
        record |= {
            "split": evaluation["split"],
            "num_examples": evaluation["num_examples"],
            "metric": metric,
            "scores": evaluation["scores"]["pre_gated"],
            "routing": evaluation.get("routing"),
            "example_scores": example_scores(run_dir / "predictions.jsonl", metric),
        }
    made_in = made_in or environment()  # a run without an evaluation does not say
    record["commit"] = made_in.get("git")
    record["environment"] = {key: value for key, value in made_in.items() if key != "git"}
    return {key: _rounded(value) for key, value in to_jsonable(record).items() if value not in (None, {})}


def num_parameters(checkpoint: Path) -> int | None:
    """The weights in the files of `checkpoint`, from their headers; None if there are none."""
    count = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118, no dict
    return count or None


def calibration_seconds(run_dir: Path, summary: Mapping[str, Any]) -> float | None:
    """How long fitting the gates took, from the run's summary or the manifest of its checkpoint; None if it was not."""
    manifest = run_dir / "checkpoint" / MANIFEST
    told = json.loads(manifest.read_text()) if manifest.is_file() else {}
    for place in (summary.get("calibration"), told.get("calibration")):
        if isinstance(place, Mapping) and place.get("seconds") is not None:
            return float(place["seconds"])
    return None


def validation_points(metrics: Path, stage: str = "train") -> list[dict[str, float]]:
    """Each validation during training as {step, metric: value, …}; of a step that was repeated the later one."""
    points: dict[int, dict[str, float]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        values = json.loads(line)
        found = {key.rpartition("/")[2]: value for key, value in values.items() if key.startswith(f"{stage}/eval/")}
        if found:
            points[values["step"]] = {"step": values["step"], **found}
    return [points[step] for step in sorted(points)]


def example_scores(predictions: Path, metric: str) -> list[float]:
    return [json.loads(line)["scores"][metric] for line in predictions.read_text(encoding="utf-8").splitlines()]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        short = round(value, DIGITS)
        return int(short) if short.is_integer() else short
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def load_records(folder: Path) -> list[Record]:
    """The records of a study, one a cell, the latest of each."""
    return list({record["cell"]: record for record in _lines(folder)}.values())


def recorded_cells(folder: Path) -> set[str]:
    """The names of the cells that have a record, by whichever process."""
    return {record["cell"] for record in load_records(folder)}


def _lines(folder: Path) -> list[Record]:
    """Every line, the environment filled in where it is that of the line before."""
    records: list[Record] = []
    for record in read_lines(folder / CELLS):
        record.setdefault("environment", records[-1]["environment"] if records else {})
        records.append(record)
    return records


def append_record(folder: Path, record: Record) -> None:
    """Add one line; the environment only where it differs from that of the line before."""
    path = folder / CELLS
    with alone(path):
        known = _lines(folder)
        if known and known[-1]["environment"] == record.get("environment", {}):
            record = {key: value for key, value in record.items() if key != "environment"}
        append_line(path, record)


def load_baselines(folder: Path) -> dict[str, Any]:
    path = folder / BASELINES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def add_baselines(folder: Path, task: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Keep the metrics of trivial predictions of a task: by name, in percent."""
    with alone(folder / CELLS):
        write_json(folder / BASELINES, {**load_baselines(folder), task: _rounded(to_jsonable(dict(scores)))})


def trivial_scores(overrides: list[str]) -> dict[str, dict[str, float]]:
    """What predictions without a model score on the examples that the command with `overrides` evaluates."""
    from pregate.cli import compose_run
    from pregate.tasks.registry import build_task
    from studies.accuracy import trivial

    run = compose_run(overrides)
    return trivial.trivial_scores(build_task(run), run.eval.split or run.task.eval_split, run.eval.examples)
