"""The benchmark: every row of the grid measured once, kept the moment it is known, and shown as tables and plots.

Reads as a table of contents; the parts are `bench_grid` (which rows), `bench_whole` and `bench_row` (how each is
measured), `bench_table` and `bench_plots`. Leaves `config.yaml`, `bench.jsonl`, `bench.md`, `plots/` and
`traces/` in `run_dir`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from pregate.config import Baseline, Policy, Run, SlabDtype, Tier, UsageError, save_run
from pregate.engine.budget import DeviceFullError
from pregate.engine.opening import open_store
from pregate.engine.storage.pack import INDEX
from pregate.engine.storage.store import DiskStore, Store
from pregate.measure.bench.baselines import free_bytes
from pregate.measure.bench.device import captured_compute_ms, is_device_driven, serve_by_device
from pregate.measure.bench.grid import (
    ACCELERATE_WARM,
    BASELINES,
    BenchModel,
    RowSpec,
    bench_models,
    check_models,
    grid,
)
from pregate.measure.bench.planner import Profile, all_on_device, few_experts, is_predictable, predict, profile, step_ms
from pregate.measure.bench.plots import plot_bench
from pregate.measure.bench.probes import Ground
from pregate.measure.bench.row import Beside, Effort, measure_row
from pregate.measure.bench.table import command, print_bench, short_figures, write_bench
from pregate.measure.bench.whole import HEADROOM, Accelerated, References, Whole, forget, resident_of
from pregate.models.finite import WHAT_TO_CHECK
from pregate.system.console import console, say
from pregate.system.durable import append_text, flush_folders, to_jsonable, write_text
from pregate.system.machine import environment, pick_device, set_seed
from pregate.system.memory import PeakMemory
from pregate.system.sizes import human_bytes
from pregate.tracking import Tracker

ROWS = "bench.jsonl"
SCRATCH = "scratch"
FIGURES = ("ttft_ms", "tpot_ms", "tokens_per_s", "block_ms", "exposed_ms_per_token", "over_floor", "peak_device_bytes")


@dataclass
class Results:
    """The rows so far, each in the file as soon as it is measured, with the command that measured it."""

    path: Path
    total: int
    command: str
    tracker: Tracker
    rows: list[dict[str, Any]] = field(default_factory=list)

    def find(self, spec: RowSpec) -> dict[str, Any] | None:
        return next((row for row in self.rows if RowSpec.of(row) == spec), None)

    def add(self, row: dict[str, Any]) -> None:
        plain = to_jsonable({**row, "command": self.command})
        append_text(self.path, json.dumps(plain, ensure_ascii=False) + "\n")
        self.rows.append(plain)
        sentence = RowSpec.of(plain).sentence()
        say(f"{len(self.rows)} of {self.total}: {sentence}: {short_figures(plain)}")
        label = sentence.replace(" ", "_")
        self.tracker.log({f"bench/{label}/{k}": plain[k] for k in FIGURES if plain.get(k) is not None}, len(self.rows))


@dataclass(frozen=True)
class Study:
    """What is measured, checked and ready: the models and the rows of each."""

    run: Run
    device: torch.device
    rows: dict[BenchModel, list[RowSpec]]
    measured: list[dict[str, Any]]
    """Rows of an earlier run that this one resumes."""

    @property
    def out_dir(self) -> Path:
        return Path(self.run.run_dir)

    @property
    def scratch(self) -> Path:
        """Where packs and Accelerate's folders go."""
        return Path(self.run.engine.pack_dir) if self.run.engine.pack_dir else self.out_dir / SCRATCH

    @property
    def effort(self) -> Effort:
        bench = self.run.bench
        return Effort(bench.repeats, bench.warmup, bench.max_seconds_per_row)

    def ground(self, store: Store) -> Ground:
        return Ground(store, self.device, self.run.engine.io_threads, self.run.engine.io_uring)

    def pack_dir(self, model: BenchModel, slab_dtype: str) -> Path:
        return self.scratch / f"{model.label}-{slab_dtype}"

    def offload_dir(self, model: BenchModel) -> Path:
        return self.scratch / f"{model.label}-accelerate"

    def pending(self, model: BenchModel) -> list[RowSpec]:
        known = {RowSpec.of(row) for row in self.measured}
        return [spec for spec in self.rows[model] if spec not in known]


def prepare(run: Run) -> Study:
    """Check everything that the benchmark needs; nothing is written. Raises `UsageError`."""
    device = pick_device(run.engine.device)
    measured = [] if run.plan else _earlier_rows(run)
    models = bench_models(run)
    check_models(run, models)
    study = Study(run, device, {model: grid(run, model, device) for model in models}, measured)
    if not run.plan:
        _refuse_full_disk(study)
    return study


def _earlier_rows(run: Run) -> list[dict[str, Any]]:
    """The rows that lie in the run directory. Raises `UsageError` unless they, or nothing, may lie there."""
    path = Path(run.run_dir) / ROWS
    if not path.is_file():
        if (path.parent / "config.yaml").is_file():
            raise UsageError(f"{path.parent} holds another kind of run: choose name=NAME or run_dir=DIR.")
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # torn by an interruption: that row is measured again
            break
    if rows and not run.resume:
        raise UsageError(f"{path} holds {len(rows)} rows: go on with resume=true, or choose another run_dir=DIR.")
    return rows


def _refuse_full_disk(study: Study) -> None:
    """Refuse a benchmark whose packs and folders do not fit beside each other on the scratch disk."""
    needed = []
    for model in study.rows:
        pending = study.pending(model)
        packs = {spec.slab_dtype for spec in pending if spec.tier == Tier.disk and spec.slab_dtype is not None}
        packs = {slab_dtype for slab_dtype in packs if not study.pack_dir(model, slab_dtype).exists()}
        size = sum(model.experts_bytes(slab_dtype) for slab_dtype in packs)
        needed.append(size + model.num_bytes() * any(spec.policy == ACCELERATE_WARM for spec in pending))
    keeps_packs = study.run.engine.pack_dir is not None or study.run.checkpoint is not None
    most = sum(needed) if keeps_packs else max(needed)
    place = next(p for p in (study.scratch.absolute(), *study.scratch.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if most > free:
        raise UsageError(
            f"The benchmark writes {human_bytes(most)} under {study.scratch}, which has {human_bytes(free)} free: set "
            "engine.pack_dir to a larger disk."
        )


def measure(study: Study, tracker: Tracker) -> list[dict[str, Any]]:
    """Measure what is pending of what `prepare` has checked; returns all rows. Raises `UsageError`, when everything is
    written, for a model whose logits are not finite."""
    run = study.run
    set_seed(run.seed)
    total = len(study.measured) + sum(len(study.pending(model)) for model in study.rows)
    results = Results(study.out_dir / ROWS, total, command(run.overrides), tracker, list(study.measured))
    _write_rows(results.path, study.measured)
    save_run(run, study.out_dir / "config.yaml")
    try:
        for model in study.rows:
            _measure_model(study, model, results)
    finally:
        if results.rows:
            write_bench(study.out_dir / "bench.md", results.rows, run, environment())
    if run.checkpoint is None:
        shutil.rmtree(study.out_dir / SCRATCH, ignore_errors=True)
    _publish(results.rows, study.out_dir, tracker)
    print_bench(results.rows, console())
    refuse_not_finite(results.rows, study.out_dir)
    return results.rows


def refuse_not_finite(rows: Sequence[dict[str, Any]], out_dir: Path) -> None:
    """Raises `UsageError` for rows with logits that are not finite. They are kept, and the tables say so."""
    broken = [row for row in rows if row.get("logits_finite") is False]
    if broken:
        raise UsageError(
            f"The logits of {len(broken)} of {len(rows)} rows are NaN or infinite, first of "
            f"{RowSpec.of(broken[0]).sentence()} (see {out_dir / 'bench.md'}): {WHAT_TO_CHECK}."
        )


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The file without a torn last line; empty at first, which marks the directory as a benchmark's."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _measure_model(study: Study, model: BenchModel, results: Results) -> None:
    pending = study.pending(model)
    if not pending:
        return
    bench, identity = study.run.bench, model.source.identity()
    references = References(study.out_dir / SCRATCH, bench.repeats, bench.new_tokens, identity)

    packing: dict[str, int] = {}

    def opened(spec: RowSpec) -> Any:
        return _opened_store(study, model, spec, packing)

    if Baseline.resident in study.run.bench.baselines:
        Whole(model, study.device, study.effort, references, opened).measure(pending, results.add)
    Accelerated(model, study.device, study.effort, references, study.offload_dir(model)).measure(pending, results.add)
    served = [spec for spec in pending if spec.policy not in BASELINES]
    for _, group in groupby(served, key=lambda spec: (spec.tier, spec.slab_dtype)):
        _measure_store(study, model, list(group), references, packing, results)
    if model.directory is None and study.run.engine.pack_dir is None:
        for slab_dtype in SlabDtype:
            shutil.rmtree(study.pack_dir(model, slab_dtype), ignore_errors=True)


def _measure_store(
    study: Study,
    model: BenchModel,
    specs: list[RowSpec],
    references: References,
    packing: dict[str, int],
    results: Results,
) -> None:
    """All rows that read from one store, which is opened once."""
    size = model.experts_bytes(specs[0].slab_dtype or SlabDtype.source)
    free = free_bytes(torch.device("cpu"))
    if specs[0].tier == Tier.dram and size * HEADROOM > free:
        say(
            f"{model.name}: all experts in host memory need {human_bytes(size)}, {human_bytes(free)} are free: tier "
            "dram is left out."
        )
        return
    with _opened_store(study, model, specs[0], packing) as store:
        profiles: dict[tuple[Any, ...], Profile] = {}
        for spec in specs:
            with _beside(study, model, spec) as step:
                row = _engine_row(study, model, spec, store, references, results, step)
                if row is None:
                    continue
                packed = packing.get(str(spec.slab_dtype)) if spec.tier == Tier.disk else None
                row |= {} if packed is None else {"peak_bytes_packing": packed}
                results.add(row | _prediction(study, model, spec, row, store, profiles, step))


@contextmanager
def _beside(study: Study, model: BenchModel, spec: RowSpec) -> Iterator[Callable[[], float] | None]:
    """Times a step that waits for nothing, whenever called; None where few experts would not do the same work."""
    if spec.batch > 1 or spec.forced_experts is not None or is_device_driven(spec):
        yield None
        return
    with all_on_device(few_experts(model), SlabDtype.source, study.device) as engine:
        step_ms(engine, 1, spec.prompt_len, study.device)  # warm-up
        yield lambda: step_ms(engine, 1, spec.prompt_len, study.device)


def _prediction(
    study: Study,
    model: BenchModel,
    spec: RowSpec,
    row: dict[str, Any],
    store: Store,
    profiles: dict[tuple[Any, ...], Profile],
    step: Callable[[], float] | None,
) -> dict[str, Any]:
    """What the planner says of a row, from a profile taken once for its load, and the link and the speed of
    computation (`step` in a row's probes and in the profile) as they were beside the row."""
    if not is_predictable(spec):
        return {}
    load = (spec.batch, spec.prompt_len)
    if load not in profiles:
        profiles[load] = profile(few_experts(model), study.ground(store), spec.batch, spec.prompt_len, step)
    profiled = profiles[load]
    factor = row["compute_ms"] / profiled.step_ms if profiled.step_ms and "compute_ms_probes" in row else None
    said = predict(model, spec, profiled, row.get("link_gb_per_s"), factor)
    return {"predicted": said, "predicted_over_measured": said["tokens_per_s"] / row["tokens_per_s"]}


@contextmanager
def _opened_store(study: Study, model: BenchModel, spec: RowSpec, packing: dict[str, int]) -> Iterator[Store]:
    """The store of a row. If its experts had to be packed, the measured peak of that goes to `packing`."""
    place = study.pack_dir(model, str(spec.slab_dtype))
    index = place / INDEX
    before = index.stat().st_mtime_ns if index.is_file() else None
    with PeakMemory(torch.device("cpu")) as peak:
        store = open_store(
            model.source,
            tier=Tier(str(spec.tier)),
            device=study.device,
            pack_dir=place,
            slab_dtype=SlabDtype(str(spec.slab_dtype)),
        )
    try:
        if isinstance(store, DiskStore):
            if index.stat().st_mtime_ns != before and peak.num_bytes is not None:
                packing[str(spec.slab_dtype)] = peak.num_bytes
            store.verify()  # or the first reads of each slab would be slower by its checksum
        yield store
    finally:
        store.close()


def _engine_row(
    study: Study,
    model: BenchModel,
    spec: RowSpec,
    store: Store,
    references: References,
    results: Results,
    step: Callable[[], float] | None,
) -> dict[str, Any] | None:
    """The measured row, or None, with a sentence, where it does not fit."""
    if spec.policy == Policy.gpu_only:
        forget()
        needed = model.experts_bytes(str(spec.slab_dtype)) * HEADROOM
        free = free_bytes(study.device)
        if needed > free:
            say(f"{spec.sentence()} is left out: it needs {human_bytes(needed)}, {human_bytes(free)} are free.")
            return None
    whole = results.find(resident_of(spec, study.run.bench.new_tokens)) or {}
    driven = is_device_driven(spec)
    beside = Beside(
        captured_compute_ms(spec, study.run.bench.new_tokens, results.find) if driven else whole.get("tpot_ms"),
        step,
        references.get(spec, str(spec.slab_dtype)),
        references.get(spec) if spec.slab_dtype != SlabDtype.source else None,
    )
    try:
        traced = study.out_dir / "traces" / f"{spec.slug()}.json"
        serve = serve_by_device if driven else None
        return measure_row(spec, model, study.ground(store), study.effort, beside, traced, serve)
    except (DeviceFullError, torch.OutOfMemoryError):
        say(f"{spec.sentence()} is left out: it does not fit on the device.")
        return None


def _publish(rows: Sequence[dict[str, Any]], out_dir: Path, tracker: Tracker) -> None:
    """The table and the plots to the tracker; the plots to `plots/`."""
    columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], dict)))
    tracker.table("bench", columns, [[row.get(column) for column in columns] for row in rows])
    for name, path in plot_bench(rows, out_dir / "plots").items():
        tracker.image(f"plots/{name}", path)
    flush_folders(out_dir, "plots", "traces")
