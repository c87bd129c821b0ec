"""The directory of one run: what lies where in it, and that one command at a time works in it.

Knows locks and `config.yaml`; knows nothing about what a run does.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pregate.config import Run, UsageError, save_run, to_dict
from pregate.models.family import family_named
from pregate.system.console import first_of, say
from pregate.system.durable import FULL, make_directory
from pregate.system.processes import main_only
from pregate.tracking import flatten

SOURCE, INITIAL, CONVERTED = "source", "initial", "converted"
"""The model trained as a source, a random one, and the converted one."""
CHECKPOINT, LAST, SUMMARY = "checkpoint", "last", "summary.json"
"""The model that training leaves, the state to resume from, and the outcome."""
KEPT = "kept"
"""With `train.experts=offloaded`: what the model to keep has learnt, until the checkpoint is made of it."""


def claim_run_dir(run: Run) -> Path:
    """The run directory, new or to be resumed, with `config.yaml` in it. Prints which settings of a resumed run have
    changed. Raises `UsageError` if the directory is in use."""
    run_dir = Path(run.run_dir)
    main_only(lambda: _claim(run, run_dir), "claiming the run directory")
    return run_dir


def _claim(run: Run, run_dir: Path) -> None:
    used = f"{run_dir} holds a run already: continue it with resume=true, or choose another run_dir=DIR."
    if not run.resume and run_dir.is_dir() and any(run_dir.iterdir()):
        raise UsageError(used)
    config = run_dir / "config.yaml"
    try:
        make_directory(run_dir)
        _lock(run_dir)
        if not run.resume and any(run_dir.iterdir()):  # another process was faster, and has ended
            raise UsageError(used)
        changes = _changes(config, run)
        if changes:
            say(f"{config} was written with other settings: {first_of(changes, 8, '; ')}")
        save_run(run, config)
    except OSError as error:
        way = "make room" if error.errno in FULL else "choose another run_dir=DIR"
        raise UsageError(f"{run_dir} cannot be written ({error.strerror}): {way}.") from error


_locked: dict[Path, int] = {}


def _lock(run_dir: Path) -> None:
    """Keep every other process out of `run_dir` until this one ends, however it ends. Raises `UsageError`."""
    place = run_dir.resolve()
    if place in _locked:
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UsageError(
            f"Another process works in {run_dir}: wait for its end, or choose another run_dir=DIR (several processes "
            "of one run are started by a launcher, see the README)."
        ) from error
    except OSError:  # a file system without locks
        os.close(handle)
        return
    _locked[place] = handle


def _changes(config: Path, run: Run) -> list[str]:
    """Each setting of `run` that differs from what `config` holds, as "key old, now new"."""

    try:
        before = flatten(OmegaConf.to_container(OmegaConf.load(config)), separator=".")  # type: ignore[arg-type]
    except (OSError, ValueError, AttributeError, YAMLError, OmegaConfBaseException):  # a new run, or a spoilt file
        return []
    now = flatten(to_dict(run), separator=".")
    stacks = "pregate.stacks"
    if now.get(stacks) is None and before.get(stacks) == list(family_named(run.model.family).stacks):
        before[stacks] = None  # all stacks by name are the same as all stacks
    shared = [key for key in now if key in before and key not in ("resume", "overrides", "run_dir")]
    return [f"{key} {before[key]}, now {now[key]}" for key in shared if before[key] != now[key]]
