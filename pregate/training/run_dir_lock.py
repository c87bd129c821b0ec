"""The directory of one run: what lies where in it, and that one command at a time works in it.

Knows locks; what a resumed run may change is in `resume_changes`. Knows nothing about what a run does.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from pregate.config import Run, UsageError, save_run
from pregate.system.durable import FULL, clear_scratch, make_directory
from pregate.system.process_group import join, main_only
from pregate.training.resume_changes import check_changes
from pregate.training.saved_state import processes_of

CONFIG = "config.yaml"
SOURCE, INITIAL, CONVERTED = "source", "initial", "converted"
"""The model trained as a source, a random one, and the converted one."""
CHECKPOINT, LAST, SUMMARY = "checkpoint", "last", "summary.json"
"""The model that training leaves, the state to resume from, and the outcome."""
KEPT = "kept"
"""With `train.experts=offloaded`: what the model to keep has learnt, until the checkpoint is made of it."""


def claim_run_dir(run: Run) -> Path:
    """The run directory, new or to be resumed, with `config.yaml` in it. Prints which settings of a resumed run have
    changed. Raises `UsageError` if the directory is in use, or the changes give another result and are not allowed."""
    run_dir = Path(run.run_dir)
    main_only(lambda: _claim(run, run_dir), "claiming the run directory")
    return run_dir


def _claim(run: Run, run_dir: Path) -> None:
    used = f"{run_dir} holds a run already: continue it with resume=true, or choose another run_dir=DIR."
    if not run.resume and run_dir.is_dir() and any(run_dir.iterdir()):
        raise UsageError(used)
    try:
        make_directory(run_dir)
        _lock(run_dir)
        if not run.resume and any(run_dir.iterdir()):  # another process was faster, and has ended
            raise UsageError(used)
        begun = any((run_dir / name).exists() for name in (SOURCE, INITIAL, CONVERTED, LAST, CHECKPOINT))
        processes = processes_of(run_dir / LAST) or processes_of(run_dir / SOURCE / LAST)
        check_changes(run, run_dir / CONFIG, (processes, join().num_processes), begun)
        for place in (run_dir, run_dir / CHECKPOINT, run_dir / SOURCE, run_dir / SOURCE / CHECKPOINT):
            clear_scratch(place)
        save_run(run, run_dir / CONFIG)
    except OSError as error:
        way = "make room" if error.errno in FULL else "choose another run_dir=DIR"
        raise UsageError(f"{run_dir} cannot be written ({error.strerror}): {way}.") from error


_locked: dict[Path, int] = {}


def _let_go() -> None:
    """In a forked process: a loader's worker that outlives its killed parent must not keep the directory locked."""
    while _locked:
        os.close(_locked.popitem()[1])


os.register_at_fork(after_in_child=_let_go)


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
