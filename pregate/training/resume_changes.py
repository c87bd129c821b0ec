"""What a resumed run may have otherwise than before, and what it may not, as its result would be that of neither.

Knows the names of settings; knows nothing about what they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pregate.config import Run, Schedule, TrainConfig, UsageError, to_dict
from pregate.models.family import family_named
from pregate.system.console import first_of, say
from pregate.tracking import flatten

UNNOTICED = ("resume", "allow_changes", "overrides", "run_dir")
SAME_RESULT = (
    *("name", "model.name", "then_eval", "plan", "output", "checkpoint", "reference"),
    *("tracking", "bench", "eval", "engine", "data.num_workers", "data.cache"),
    *("data.root", "task.files", "task.hub", "task.hub_revision"),  # where the data lie; their content is compared
    *(f"{train}.{name}" for train in ("train", "source_train") for name in ("log_every", "save_every", "keep_last")),
)
"""Settings, and sections of them, that do not change what is trained; every other one does."""
OTHER_RESULT = ("eval.batch_size", "engine.slab_dtype")
"""Those in a section of `SAME_RESULT` that do: validation pads its batches, and calibration may run through slabs."""
OPEN = ("model.geometry.", "task.columns.", "task.files.")
"""Sections with keys of the user's own: one that is missing was left out."""
PROCESSES, DATA, CONTENT = "processes", "data", "source"
"""Names of changes beside settings: the number of processes, the content of the examples and that of the source."""
MOST_TOLD = 8
SOURCES = {
    "files": ("from files", "come from files"),
    "hub": ("from the hub", "come from the hub"),
    "generated": ("that were generated", "are generated"),
}
"""In words what a fingerprint of data begins with, see `tasks.records.fingerprint`."""


def check_changes(run: Run, config: Path, processes: tuple[int | None, int], begun: bool) -> None:
    """Compare `run` with what `config` holds, and the number of processes before (None: unknown) with that now.

    Prints the changes that may be. Raises `UsageError` for those that give another result and are not in
    `run.allow_changes`, if the run has `begun`: without a model there is nothing that could be mixed.
    """
    changes = changed_settings(config, run)
    before, now = processes
    if before not in (None, now):
        changes[PROCESSES] = f"{PROCESSES} {before}, now {now}"
    refused = [name for name in changes if not _within(name, run.allow_changes) and _changes_result(name, run)]
    if refused and begun:
        told = first_of([changes[name] for name in refused], MOST_TOLD, "; ")
        raise UsageError(
            f"{config.parent} was begun with other settings, and these change its result ({told}): resume with those, "
            "choose another run_dir=DIR, or go on all the same with "
            f"'allow_changes=[{','.join([*run.allow_changes, *refused])}]'."
        )
    if changes:
        say(f"{config} was written with other settings: {first_of([*changes.values()], MOST_TOLD, '; ')}")


def check_data(run: Run, where: Path, before: str, now: str) -> None:
    """Compare the fingerprints of the training examples of the state in `where` (empty: unknown) and of those at hand.

    Raises `UsageError` if they differ and `run.allow_changes` does not name `data`.
    """
    if before in ("", now):
        return
    split = f"split {run.task.train_split!r}"
    told = f"{where} was trained on examples with other content than {split} has now"
    was, is_now = (SOURCES.get(said.partition(" ")[0]) for said in (before, now))
    if was and is_now and was != is_now:
        told = (
            f"{where} was trained on examples {was[0]}, while those of {split} now {is_now[1]}, and the two cannot be "
            "compared"
        )
    permit(run, DATA, told, "put the data back")


def permit(run: Run, name: str, told: str, back: str) -> None:
    """Print `told`, if `run.allow_changes` has the `name` of this change; else raise `UsageError`. `back`: the way to
    undo it."""
    if not _within(name, run.allow_changes):
        raise UsageError(
            f"{told}: {back}, choose another run_dir=DIR, or go on all the same with "
            f"'allow_changes=[{','.join([*run.allow_changes, name])}]'."
        )
    say(f"{told}.")


def changed_settings(config: Path, run: Run) -> dict[str, str]:
    """Each setting of `run` that differs from what `config` holds, by name, as "name old, now new"."""
    try:
        before = flatten(OmegaConf.to_container(OmegaConf.load(config)), separator=".")  # type: ignore[arg-type]
    except (OSError, ValueError, AttributeError, YAMLError, OmegaConfBaseException):  # a new run, or a spoilt file
        return {}
    if not before:
        return {}
    now = flatten(to_dict(run), separator=".")
    before = _newer_settings(before) | before
    stacks = "pregate.stacks"
    if now.get(stacks) is None and before.get(stacks) == list(family_named(run.model.family).stacks):
        before[stacks] = None  # all stacks by name are the same as all stacks
    found = {}
    for name in [*now, *(name for name in before if name not in now)]:
        if name in UNNOTICED or not _comparable(name, before, now):
            continue
        old, new = (values.get(name, _section(name, values)) for values in (before, now))
        if old != new:
            found[name] = f"{name} {old}, now {new}"
    return found


def _newer_settings(before: dict[str, Any]) -> dict[str, Any]:
    """The settings that a release brought after `before` was written: it did what their defaults say."""
    source_train = TrainConfig() if _section("source_train", before) else None
    defaults = flatten(to_dict(Run(source_train=source_train)), separator=".")
    null = [name for name, value in before.items() if value is None]
    return {name: value for name, value in defaults.items() if not (_within(name, null) or _section(name, before))}


def _comparable(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether both know the setting: a release may have dropped it. A section may be null in one."""
    return name.startswith(OPEN) or all(name in values or _section(name, values) for values in (before, now))


def _section(name: str, values: dict[str, Any]) -> str | None:
    return "set" if any(other.startswith(f"{name}.") for other in values) else None


def _within(name: str, names: Any) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)


def _changes_result(name: str, run: Run) -> bool:
    if name == "train.steps" and run.train.schedule is Schedule.constant:
        return False  # the steps that are there already would have been the same
    if name == "model.family" and run.model.source is not None:
        return False  # a source says its own family
    return name in OTHER_RESULT or not _within(name, SAME_RESULT)
