"""The directory of one run: what lies where in it, and that one command at a time works in it.

What a resumed run may change is in `resume_changes`. Knows nothing about what a run does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pregate.config import Run, UsageError, save_run
from pregate.system.directory_lock import hold, let_go, refusing_unwritable
from pregate.system.durable import clear_scratch, read_object
from pregate.system.process_group import join, main_only
from pregate.training.durable_directories import recover
from pregate.training.resume_changes import check_changes
from pregate.training.saved_state import earlier_states, processes_of

RUN_DIR = "run_dir"
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


@contextmanager
def claimed_run_dir(run: Run) -> Iterator[Path]:
    """`claim_run_dir` for as long as the work lasts: one process may do several runs."""
    run_dir = claim_run_dir(run)
    try:
        yield run_dir
    finally:
        let_go(run_dir)


def _claim(run: Run, run_dir: Path) -> None:
    _refuse_in_use(run, run_dir)
    hold(run_dir, RUN_DIR)
    _refuse_in_use(run, run_dir)  # another process was faster, and has ended
    with refusing_unwritable(run_dir, RUN_DIR):
        recover(run_dir / LAST)
        _refuse_lost_state(run, run_dir)
        processes = processes_of(run_dir / LAST) or processes_of(run_dir / SOURCE / LAST)
        check_changes(run, run_dir / CONFIG, (processes, join().num_processes), _begun(run_dir))
        for place in (run_dir, run_dir / CHECKPOINT, run_dir / SOURCE, run_dir / SOURCE / CHECKPOINT):
            clear_scratch(place)
        save_run(run, run_dir / CONFIG)


def _begun(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in (SOURCE, INITIAL, CONVERTED, LAST, CHECKPOINT))


def _refuse_in_use(run: Run, run_dir: Path) -> None:
    """Raises `UsageError` for a directory that holds something, unless that is a run that can be resumed."""
    another = f"choose another {RUN_DIR}=DIR"
    is_run = (run_dir / CONFIG).is_file()
    if run.resume:
        if not is_run and _begun(run_dir):
            raise UsageError(f"{run_dir} holds models but no {CONFIG} that says of which run: {another}.")
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        way = "holds a run already: continue it with resume=true, or" if is_run else "holds files but no run:"
        raise UsageError(f"{run_dir} {way} {another}.")


def _refuse_lost_state(run: Run, run_dir: Path) -> None:
    """Raises `UsageError` for a finished run that would begin at step 0, and replace what it has made."""
    finished = (read_object(run_dir / SUMMARY) or {}).get("train", {}).get("steps")
    if finished and run.train.steps and not ((run_dir / LAST).exists() or earlier_states(run_dir / LAST)):
        raise UsageError(
            f"{run_dir} holds a finished run without the state to resume from, {LAST}/, so that it would begin at "
            f"step 0: evaluate it with python -m pregate.eval run_dir={run_dir}, or choose another {RUN_DIR}=DIR."
        )
