"""`python -m pregate.bench`: latency, throughput, memory and link use over policies, caches, tiers and batch sizes."""

from __future__ import annotations

from pathlib import Path

from pregate.cli import entry_point, refuse_ignored
from pregate.config import Run
from pregate.system.launcher_environment import check_alone

MODEL = "the model is checkpoint=DIR_OR_ID, or bench.models=[NAME,…] with random weights"
ADVICE = {"source": MODEL, "model.source": MODEL, "output": "the directory is run_dir=DIR"}


def main(run: Run) -> None:
    check_alone("bench")
    refuse_ignored(run, "bench", ADVICE)
    from pregate.engine.storage.pack import refuse_output
    from pregate.measure.bench.results import Results
    from pregate.measure.bench.run import Benchmark, measure
    from pregate.system.directory_lock import held, refuse_unwritable
    from pregate.system.durable import make_directory
    from pregate.tracking import open_tracker

    refuse_output("run_dir", Path(run.run_dir))
    benchmark = Benchmark.checked(run)
    out_dir = Path(run.run_dir)
    if run.plan:
        from pregate.measure.bench.plan_report import write_plan

        refuse_unwritable(out_dir, "run_dir")
        make_directory(out_dir)
        write_plan(run, benchmark.rows, benchmark.device, benchmark.reading, out_dir)
        print(f"Plan: {out_dir / 'plan.md'}, {out_dir / 'plan.json'}")
        return
    with held(out_dir, "run_dir"):
        Results.mark(out_dir)
        with open_tracker(run, out_dir) as tracker:
            measure(benchmark, tracker)
    print(f"Rows: {out_dir / 'bench.jsonl'}\nTables: {out_dir / 'bench.md'}\nPlots: {out_dir / 'plots'}")


if __name__ == "__main__":
    entry_point(main)
