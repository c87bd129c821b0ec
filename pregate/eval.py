"""`python -m pregate.eval checkpoint=DIR`: accuracy, parity with a reference, and each policy's latency and memory."""

from __future__ import annotations

from pathlib import Path

from pregate.cli import entry_point, refuse_ignored
from pregate.config import Run, UsageError
from pregate.system.launcher_environment import check_alone

ADVICE = {"source": "the model is checkpoint=DIR_OR_ID", "plan": "only pregate.bench makes plans"}


def main(run: Run) -> None:
    check_alone("eval")
    refuse_ignored(run, "eval", ADVICE)
    from pregate.engine.storage.pack import refuse_output
    from pregate.measure.evaluation import evaluate, prepare
    from pregate.system.directory_lock import held
    from pregate.tracking import open_tracker

    checkpoint, reference, out_dir = subjects(run)
    setting = "output" if run.output or run.checkpoint else "run_dir"
    refuse_output(setting, out_dir)
    bench = prepare(run, checkpoint, reference)
    with held(out_dir, setting), open_tracker(run, out_dir) as tracker:
        evaluate(bench, out_dir, tracker)
    print(f"Report: {out_dir / 'report.html'}" if run.eval.report else f"Results: {out_dir / 'eval.json'}")


def subjects(run: Run) -> tuple[str, str | None, Path]:
    """What to evaluate, against what, and where the results go: as named, or those of the run in `run_dir`."""
    run_dir = Path(run.run_dir)
    own, own_source = run_dir / "checkpoint", run_dir / "source" / "checkpoint"
    if run.checkpoint is not None:
        place = Path(run.checkpoint)
        place = place if place.is_dir() else run_dir  # in run_dir itself a training of that name may lie
        place = place if place.name not in ("", "..") else place.resolve()  # "." has no name to put a suffix to
        beside = place.with_name(f"{place.name}-eval")
        return run.checkpoint, run.reference, Path(run.output) if run.output else beside
    if not own.is_dir():
        raise UsageError(f"There is nothing to evaluate: set checkpoint=DIR, or train first, so that {own} exists.")
    reference = run.reference or (str(own_source) if own_source.is_dir() else None)
    return str(own), reference, Path(run.output) if run.output else run_dir


if __name__ == "__main__":
    entry_point(main)
