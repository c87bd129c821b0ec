"""The rows of one model that an engine serves: their store, their probes, and what the planner says of them.

Knows stores, servers and probes; knows nothing about the grid's order or about tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pregate.config import CacheRule, Policy, SlabDtype, Tier
from pregate.engine.budget import DeviceFullError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from pregate.engine.storage.pack import INDEX
from pregate.engine.storage.store import DiskStore, Store
from pregate.measure.bench.active_experts import forced_experts
from pregate.measure.bench.baseline_models import HEADROOM, use_generation_config
from pregate.measure.bench.baseline_rows import forget
from pregate.measure.bench.floors import Probes
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.references import References, resident_of
from pregate.measure.bench.requests import Effort
from pregate.measure.bench.results import Results
from pregate.measure.bench.row import Beside, measure_row
from pregate.measure.bench.speed_prediction import is_predictable, predicted_row
from pregate.measure.bench.step_times import Profile, profile, step_timer
from pregate.measure.bench.transfer_speed import Ground, Reading
from pregate.measure.perfetto import write_perfetto
from pregate.measure.servers import engine_server
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import say
from pregate.system.memory import PeakMemory, free_memory

PROFILED = "profiled"


@dataclass
class EngineRows:
    """`pack_dir`: where the pack of a slab dtype lies."""

    model: BenchModel
    device: torch.device
    effort: Effort
    references: References
    results: Results
    reading: Reading
    pack_dir: Callable[[str], Path]
    _peaks_packing: dict[str, int] = field(default_factory=dict)
    """Peak memory of packing a slab dtype, where this run has packed it."""
    _profiles: dict[tuple[Any, ...], Profile] = field(default_factory=dict)

    def measure(self, specs: list[RowSpec]) -> None:
        """All rows that read from one store, which is opened once. What does not fit is left out, with a sentence."""
        size = self.model.experts_bytes(specs[0].slab_dtype or SlabDtype.source)
        free = free_memory(torch.device("cpu"))
        if specs[0].tier == Tier.dram and size * HEADROOM > free:
            say(
                f"{self.model.name}: all experts in host memory need {human_bytes(size)}, {human_bytes(free)} are "
                "free: tier dram is left out."
            )
            return
        with self.opened_store(specs[0]) as store:
            for spec in specs:
                if not self._fits(spec):
                    continue
                try:
                    row = self._row(spec, Ground(store, self.device, self.reading))
                except (DeviceFullError, torch.OutOfMemoryError):
                    say(f"{spec.sentence()} is left out: it does not fit on the device.")
                    continue
                packed = self._peaks_packing.get(str(spec.slab_dtype)) if spec.tier == Tier.disk else None
                row |= {} if packed is None else {"peak_bytes_packing": packed}
                self.results.add(row | self._prediction(spec, row))

    @contextmanager
    def opened_store(self, spec: RowSpec) -> Iterator[Store]:
        """The store of a row. If its experts had to be packed, the measured peak of that is kept."""
        place = self.pack_dir(str(spec.slab_dtype))
        index = place / INDEX
        before = index.stat().st_mtime_ns if index.is_file() else None
        tier, slab_dtype = Tier(str(spec.tier)), SlabDtype(str(spec.slab_dtype))
        with PeakMemory(torch.device("cpu")) as peak:
            store = open_store(self.model.source, tier=tier, device=self.device, pack_dir=place, slab_dtype=slab_dtype)
        try:
            if isinstance(store, DiskStore):
                if index.stat().st_mtime_ns != before and peak.num_bytes is not None:
                    self._peaks_packing[str(spec.slab_dtype)] = peak.num_bytes
                store.verify()  # or the first reads of each slab would be slower by its checksum
            yield store
        finally:
            store.close()

    def _fits(self, spec: RowSpec) -> bool:
        if spec.policy != Policy.gpu_only:
            return True
        forget()
        needed, free = self.model.experts_bytes(str(spec.slab_dtype)) * HEADROOM, free_memory(self.device)
        if needed > free:
            say(f"{spec.sentence()} is left out: it needs {human_bytes(needed)}, {human_bytes(free)} are free.")
        return needed <= free

    def _row(self, spec: RowSpec, ground: Ground) -> dict[str, Any]:
        # few experts would not do the same work for several tokens, nor for a number of experts that is forced
        alike = not spec.device_driven and spec.batch == 1 and spec.forced_experts is None
        link = "bytes_moved" if self.device.type == "cuda" and ground.store.in_host_memory else "bytes_read"
        with (
            step_timer(self.model, spec, self.device) if alike else nullcontext() as step_ms,
            PeakMemory(self.device) as peak,
            self._opened(spec, ground) as engine,
            forced_experts(engine.model, spec.forced_experts),
            engine_server(engine, self.device, link) as server,
        ):
            use_generation_config(engine.model, self.model)
            # forced by its place in a call, a token has another route alone than among others
            server.captured = spec.device_driven and spec.forced_experts is None
            compute_ms = (self.results.find(computing_row(spec, self.references.new_tokens)) or {}).get("tpot_ms")
            probes = Probes(self._link_probe(spec, ground, engine), step_ms, compute_ms)
            quantised = spec.slab_dtype != SlabDtype.source
            reference = self.references.get(spec, str(spec.slab_dtype))
            beside = Beside(probes, reference, self.references.get(spec) if quantised else None)
            row, timed, _ = measure_row(spec, self.model, server, self.effort, peak, beside)
        if spec.device_driven:
            return row
        traces = self.results.path.parent / "traces"
        write_perfetto(traces / f"{spec.slug()}.json", timed[0].spans or [], spec.sentence())
        return row | {"io_threads": self.reading.io_threads}

    def _opened(self, spec: RowSpec, ground: Ground) -> Any:
        """The engine of a row. Raises what opening it raises."""
        shared: dict[str, Any] = {
            "policy": Policy(spec.policy),
            "device": self.device,
            "device_budget": spec.budget,
            "cache": CacheRule(spec.cache or CacheRule.none),
            "store": ground.store,
        }
        if spec.device_driven:
            lengths = {"max_source_len": spec.prompt_len, "max_new_tokens": spec.new_tokens}
            return DeviceEngine.open(self.model.source, batch=spec.batch, **lengths, **shared)
        own = {"host_budget": spec.host_budget, "prefill_chunk": spec.prefill_chunk}
        return OffloadEngine.open(self.model.source, **own, **vars(ground.reading), **shared)

    def _link_probe(self, spec: RowSpec, ground: Ground, engine: Any) -> Callable[[int], float] | None:
        """Measures the link as the row uses it; None for a row that moves nothing."""
        if spec.policy == Policy.gpu_only:
            return None
        keys, in_order = self.model.family.keys(), spec.policy == Policy.prefetch_all
        io_uring = not spec.device_driven and engine.reader == "io_uring"
        same = replace(ground, reading=replace(ground.reading, io_uring=io_uring))
        # other slabs each time: a disk's host may remember what it has read
        return lambda number: same.gb_per_s(keys, 1000 * spec.seed + number, in_order)

    def _prediction(self, spec: RowSpec, row: dict[str, Any]) -> dict[str, Any]:
        """What the planner says of a row, with the link and the computation as they were beside it."""
        if not is_predictable(spec):
            return {}
        load = (spec.tier, spec.slab_dtype, spec.batch, spec.prompt_len)
        if load not in self._profiles:
            scratch = self.pack_dir(PROFILED)
            self._profiles[load] = profile(self.model, spec, self.device, self.reading, scratch)
        compute_ms = row["compute_ms"] if "compute_ms_probes" in row else None
        said = predicted_row(self.model, spec, self._profiles[load], row.get("link_gb_per_s"), compute_ms)
        return {"predicted": said, "predicted_over_measured": said["tokens_per_s"] / row["tokens_per_s"]}


def computing_row(spec: RowSpec, new_tokens: int) -> RowSpec:
    """The row whose time for a token is T_compute of `spec`: the whole model's, or of a device-driven row that with all
    experts on the device, driven the same way."""
    if not spec.device_driven:
        return resident_of(spec, new_tokens)
    return replace(spec, policy=str(Policy.gpu_only), cache=None, budget=None, host_budget=None, new_tokens=new_tokens)
