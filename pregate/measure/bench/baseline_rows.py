"""The rows beside the engine's: the whole model in memory, which also says what every other row must decode, and
Accelerate's offload, which reads as coldly as the engine does.

Knows how these are built and when they do not fit; knows nothing about the grid's order or about tables.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pregate.config import SlabDtype, Tier, UsageError
from pregate.engine.storage.store import Store
from pregate.measure.bench.active_experts import forced_experts
from pregate.measure.bench.baseline_models import (
    bytes_needed,
    cpu_offloaded,
    dequantised_resident,
    disk_offloaded,
    resident_model,
    write_offload_folder,
)
from pregate.measure.bench.floors import Probes
from pregate.measure.bench.grid import ACCELERATE, BASELINES, RESIDENT, RowSpec
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.page_cache import cached_share, drop_page_cache, fill_page_cache
from pregate.measure.bench.references import Reference, References, resident_of
from pregate.measure.bench.requests import Effort
from pregate.measure.bench.row import Beside, measure_row
from pregate.measure.servers import whole_server
from pregate.models.finite import WHAT_TO_CHECK
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import say
from pregate.system.memory import PeakMemory, free_memory

COLD_SHARE = 0.01
"""More than this of a folder still in the page cache is not a cold read."""

Record = Callable[[dict[str, Any]], None]
"""Keeps a measured row."""


@dataclass(frozen=True)
class Whole:
    """Measures the whole model on `device`. `open_store` gives a quantised store to take weights from."""

    model: BenchModel
    device: torch.device
    effort: Effort
    references: References
    open_store: Callable[[RowSpec], AbstractContextManager[Store]]

    def measure(self, pending: Sequence[RowSpec], record: Record) -> None:
        """The resident rows among `pending`, and the references that the others lack; in one loading of the model."""
        rows = [spec for spec in pending if spec.policy == RESIDENT]
        new_tokens = self.references.new_tokens
        asked = {(resident_of(s, new_tokens), s.slab_dtype or str(SlabDtype.source)): s for s in pending}
        missing = {key: spec for key, spec in asked.items() if self.references.get(spec, key[1]) is None}
        if not rows and not missing:
            return
        forget()
        needed = bytes_needed(self.model)
        if needed > free_memory(self.device):
            say(
                f"{self.model.name}: the whole model needs {human_bytes(needed)}, {self.device} has "
                f"{human_bytes(free_memory(self.device))} free: no resident row, and tokens are not compared with it."
            )
            return
        try:
            self._in_memory(rows, missing, record)
        except (torch.OutOfMemoryError, MemoryError):
            say(f"{self.model.name}: the whole model does not fit in memory: tokens are not compared with it.")
        finally:
            forget()

    def _in_memory(self, rows: Sequence[RowSpec], missing: dict[tuple[RowSpec, str], RowSpec], record: Record) -> None:
        with PeakMemory(self.device) as peak:
            whole = resident_model(self.model, self.device)
            opening = peak.read() or 0
            # quantised weights replace the model's own, so those come last
            for load in dict.fromkeys([*rows, *(spec for spec, _ in missing)]):
                peak.lower_to(opening)  # or a row would have the peak of a larger one before it
                row = self._row(whole, load, SlabDtype.source, peak)
                if load in rows:
                    record(row)
                self._refuse_not_finite(row, SlabDtype.source)
        for weights in sorted({weights for _, weights in missing} - {SlabDtype.source}):
            specs = {load: spec for (load, w), spec in missing.items() if w == weights}
            with self.open_store(next(iter(specs.values()))) as store:
                dequantised_resident(whole, self.model, store)
            for load in specs:
                # dequantised, it is as fast as before
                self._refuse_not_finite(self._row(whole, load, weights, peak), weights)

    def _row(self, whole: Any, spec: RowSpec, weights: str, peak: PeakMemory) -> dict[str, Any]:
        """One row, and its tokens and logits among the references."""
        with forced_experts(whole, spec.forced_experts), whole_server(whole, self.device) as server:
            beside = Beside(Probes(None, None))
            row, timed, logits = measure_row(spec, self.model, server, self.effort, peak, beside)
        if row["logits_finite"]:
            tokens = torch.stack([request.tokens for request in timed])
            Reference(tokens, logits).save(self.references.path(spec, weights))
        return row

    def _refuse_not_finite(self, found: dict[str, Any], weights: str) -> None:
        """Raises `UsageError` where there is nothing that other rows could be compared with."""
        if not found["logits_finite"]:
            slabs = "" if weights == SlabDtype.source else f" with {weights} experts"
            raise UsageError(
                f"{self.model.name}: the logits of the whole model in memory{slabs} are NaN or infinite, so nothing "
                f"can be compared with it: {WHAT_TO_CHECK}."
            )


@dataclass(frozen=True)
class Accelerated:
    """Measures Accelerate's offload of one model; `folder` is written for it and removed again."""

    model: BenchModel
    device: torch.device
    effort: Effort
    references: References
    folder: Path

    def measure(self, pending: Sequence[RowSpec], record: Record) -> None:
        rows = [spec for spec in pending if spec.policy in BASELINES and spec.policy != RESIDENT]
        # what a killed run left here may be of other weights, or a part
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            for spec in rows:
                if spec.tier == Tier.dram:
                    self._from_host_memory(spec, record)
                else:
                    self._from_disk(spec, record)
                forget()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _from_host_memory(self, spec: RowSpec, record: Record) -> None:
        needed = bytes_needed(self.model)
        if needed > free_memory(torch.device("cpu")):
            say(f"{spec.sentence()} is left out: it needs {human_bytes(needed)} of host memory.")
            return
        record(self._row(spec, lambda: cpu_offloaded(self.model, self.device)))

    def _from_disk(self, spec: RowSpec, record: Record) -> None:
        if not (self.folder / "index.json").is_file():
            write_offload_folder(self.model, self.folder)
        cold = spec.policy == ACCELERATE
        (drop_page_cache if cold else fill_page_cache)(self.folder)
        share = cached_share(self.folder)
        if cold and share is not None and share > COLD_SHARE:
            say(f"{spec.sentence()}: {share:.0%} of its files stayed in the page cache, so its reads are not all cold.")
        between = (lambda: drop_page_cache(self.folder)) if cold else None
        row = self._row(spec, lambda: disk_offloaded(self.model, self.folder, self.device), between)
        record(row | ({} if share is None else {"page_cache_share": share}))

    def _row(
        self, spec: RowSpec, build: Callable[[], Any], between: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        beside = Beside(Probes(None, None), self.references.get(spec))
        with PeakMemory(self.device) as peak:
            served = build()
            with forced_experts(served, spec.forced_experts), whole_server(served, self.device, between) as server:
                return measure_row(spec, self.model, server, self.effort, peak, beside).row


def forget() -> None:
    """Give a dropped model's memory back before the next one is measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
