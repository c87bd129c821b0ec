"""The benchmark: every row of the grid measured once, kept the moment it is known, and shown as tables and plots.

Reads as a table of contents; the parts are `models` and `grid` (which rows), `whole` (baselines) and `engines` (rows of
an engine), `results`, `table` and `plots`. Leaves `config.yaml`, `bench.jsonl`, `bench.md`, `plots/` and `traces/` in
`run_dir`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from pregate.config import Baseline, Run, SlabDtype, Tier, UsageError, save_run
from pregate.measure.bench.baseline_rows import Accelerated, Whole
from pregate.measure.bench.engines import EngineRows
from pregate.measure.bench.grid import ACCELERATE_WARM, BASELINES, RowSpec, grid
from pregate.measure.bench.models import BenchModel, bench_models, check_models
from pregate.measure.bench.plots import plot_bench
from pregate.measure.bench.references import References
from pregate.measure.bench.requests import Effort
from pregate.measure.bench.results import ROWS, SCRATCH, Results, earlier_rows, refuse_not_finite, refuse_other_rows
from pregate.measure.bench.table import command, print_bench, write_bench
from pregate.measure.bench.transfer_speed import Reading
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import console
from pregate.system.durable import flush_folders, free_bytes
from pregate.system.machine import environment, pick_device, set_seed
from pregate.tracking import Tracker


@dataclass(frozen=True)
class Benchmark:
    """What is measured, checked and ready: the models and the rows of each."""

    run: Run
    device: torch.device
    rows: dict[BenchModel, list[RowSpec]]
    measured: list[dict[str, Any]]
    """Rows of an earlier run that this one resumes."""

    @classmethod
    def checked(cls, run: Run) -> Benchmark:
        """Check everything that the benchmark needs; nothing is written. Raises `UsageError`."""
        device = pick_device(run.engine.device)
        measured = [] if run.plan else earlier_rows(Path(run.run_dir), run.resume)
        models = bench_models(run)
        check_models(run, models)
        for model in models:
            refuse_other_rows(measured, model, device.type)
        benchmark = cls(run, device, {model: grid(run, model, device) for model in models}, measured)
        if not run.plan:
            _refuse_full_disk(benchmark)
        return benchmark

    @property
    def out_dir(self) -> Path:
        return Path(self.run.run_dir)

    @property
    def scratch(self) -> Path:
        """Where packs and Accelerate's folders go."""
        return Path(self.run.engine.pack_dir) if self.run.engine.pack_dir else self.out_dir / SCRATCH

    @property
    def keeps_packs(self) -> bool:
        return self.run.engine.pack_dir is not None or self.run.checkpoint is not None

    @property
    def effort(self) -> Effort:
        bench = self.run.bench
        return Effort(bench.repeats, bench.warmup, bench.max_seconds_per_row)

    @property
    def reading(self) -> Reading:
        return Reading(self.run.engine.io_threads, self.run.engine.io_uring)

    def pack_dir(self, model: BenchModel, slab_dtype: str) -> Path:
        return self.scratch / f"{model.label}-{slab_dtype}"

    def pending(self, model: BenchModel) -> list[RowSpec]:
        known = {RowSpec.of(row) for row in self.measured}
        return [spec for spec in self.rows[model] if spec not in known]


def _refuse_full_disk(benchmark: Benchmark) -> None:
    """Refuse a benchmark whose packs and folders do not fit beside each other on the scratch disk."""
    needed = []
    for model in benchmark.rows:
        pending = benchmark.pending(model)
        packs = {spec.slab_dtype for spec in pending if spec.tier == Tier.disk and spec.slab_dtype is not None}
        packs = {slab_dtype for slab_dtype in packs if not benchmark.pack_dir(model, slab_dtype).exists()}
        size = sum(model.experts_bytes(slab_dtype) for slab_dtype in packs)
        needed.append(size + model.num_bytes() * any(spec.policy == ACCELERATE_WARM for spec in pending))
    most = sum(needed) if benchmark.keeps_packs else max(needed)
    free = free_bytes(benchmark.scratch)
    if most > free:
        raise UsageError(
            f"The benchmark writes {human_bytes(most)} under {benchmark.scratch}, which has {human_bytes(free)} free: "
            "set engine.pack_dir to a larger disk."
        )


def measure(benchmark: Benchmark, tracker: Tracker) -> list[dict[str, Any]]:
    """Measure what is pending; returns all rows. Raises `UsageError`, when everything is written, for a model whose
    logits are not finite."""
    run, out_dir = benchmark.run, benchmark.out_dir
    set_seed(run.seed)
    total = len(benchmark.measured) + sum(len(benchmark.pending(model)) for model in benchmark.rows)
    results = Results(out_dir / ROWS, total, command(run.overrides), tracker, list(benchmark.measured))
    results.begin()
    save_run(run, out_dir / "config.yaml")
    try:
        for model in benchmark.rows:
            _measure_model(benchmark, model, results)
    finally:
        if results.rows:
            write_bench(out_dir / "bench.md", results.rows, run, environment())
    if run.checkpoint is None:
        shutil.rmtree(out_dir / SCRATCH, ignore_errors=True)
    _publish(results.rows, out_dir, tracker)
    print_bench(results.rows, console())
    refuse_not_finite(results.rows, out_dir)
    return results.rows


def _measure_model(benchmark: Benchmark, model: BenchModel, results: Results) -> None:
    pending = benchmark.pending(model)
    if not pending:
        return
    bench, device, effort = benchmark.run.bench, benchmark.device, benchmark.effort
    folder = benchmark.out_dir / SCRATCH
    references = References(folder, bench.repeats, bench.new_tokens, model.fingerprint)
    engines = EngineRows(
        model, device, effort, references, results, benchmark.reading, partial(benchmark.pack_dir, model)
    )
    if Baseline.resident in bench.baselines:
        Whole(model, device, effort, references, engines.opened_store).measure(pending, results.add)
    accelerated = benchmark.scratch / f"{model.label}-accelerate"
    Accelerated(model, device, effort, references, accelerated).measure(pending, results.add)
    served = [spec for spec in pending if spec.policy not in BASELINES]
    for _, group in groupby(served, key=lambda spec: (spec.tier, spec.slab_dtype)):
        engines.measure(list(group))
    if not benchmark.keeps_packs:
        for slab_dtype in SlabDtype:
            shutil.rmtree(benchmark.pack_dir(model, slab_dtype), ignore_errors=True)


def _publish(rows: Sequence[dict[str, Any]], out_dir: Path, tracker: Tracker) -> None:
    """The table and the plots to the tracker; the plots to `plots/`."""
    columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], dict)))
    tracker.table("bench", columns, [[row.get(column) for column in columns] for row in rows])
    for name, path in plot_bench(rows, out_dir / "plots").items():
        tracker.image(f"plots/{name}", path)
    flush_folders(out_dir, "plots", "traces")
