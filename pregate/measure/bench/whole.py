"""The rows beside the engine's: the whole model in memory, which also says what every other row must decode, and
Accelerate's offload under the same cold-read rule.

Knows how these are served and measured; knows nothing about the grid's order or about tables.
"""

from __future__ import annotations

import gc
import hashlib
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pregate.config import SlabDtype, Tier, UsageError
from pregate.measure.bench.active_experts import forced_experts
from pregate.measure.bench.baselines import (
    Reference,
    cpu_offloaded,
    dequantised_resident,
    disk_offloaded,
    free_bytes,
    resident_model,
    write_offload_folder,
)
from pregate.measure.bench.drives import cached_share, drop_page_cache, fill_page_cache
from pregate.measure.bench.grid import ACCELERATE, BASELINES, RESIDENT, BenchModel, RowSpec
from pregate.measure.bench.row import (
    Effort,
    Requests,
    figures,
    first_logits,
    logits_record,
    measure_whole,
    tokens_given,
)
from pregate.models.finite import WHAT_TO_CHECK, finite_logits
from pregate.system.console import say
from pregate.system.memory import PeakMemory
from pregate.system.sizes import human_bytes

HEADROOM = 1.1
"""Activations and the allocator's own take, as a factor on weights."""
COLD_SHARE = 0.01
"""More than this of a folder still in the page cache is not a cold read."""

Record = Callable[[dict[str, Any]], None]
"""Keeps a measured row."""


def resident_of(spec: RowSpec, new_tokens: int) -> RowSpec:
    """The row of the whole model under the load of `spec`."""
    plain = dict.fromkeys(("tier", "slab_dtype", "cache", "budget", "host_budget", "drive"))
    return replace(spec, policy=RESIDENT, new_tokens=new_tokens, **plain)


@dataclass(frozen=True)
class References:
    """What the whole model decodes, by load and weights, kept in `folder` so that a resumed run need not ask again.
    `source`: the identity of the model's checkpoint; after it has changed, what is kept is of another."""

    folder: Path
    repeats: int
    new_tokens: int
    source: dict[str, Any]

    def path(self, spec: RowSpec, weights: str) -> Path:
        said = repr((resident_of(spec, self.new_tokens), str(weights), self.repeats, self.source))
        return self.folder / f"reference-{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"

    def get(self, spec: RowSpec, weights: str = SlabDtype.source) -> Reference | None:
        return Reference.load(self.path(spec, weights))


@dataclass(frozen=True)
class Whole:
    """Measures the whole model on `device`. `open_store` gives a quantised store to take weights from."""

    model: BenchModel
    device: torch.device
    effort: Effort
    references: References
    open_store: Callable[[RowSpec], Any]

    def measure(self, pending: Sequence[RowSpec], record: Record) -> None:
        """The resident rows among `pending`, and the references that the others lack; in one loading of the model."""
        rows = [spec for spec in pending if spec.policy == RESIDENT]
        asked = {
            (resident_of(s, self.references.new_tokens), s.slab_dtype or str(SlabDtype.source)): s for s in pending
        }
        missing = {key: spec for key, spec in asked.items() if self.references.get(spec, key[1]) is None}
        if not rows and not missing:
            return
        forget()
        needed = self.model.num_bytes() * HEADROOM
        if needed > free_bytes(self.device):
            say(
                f"{self.model.name}: the whole model needs {human_bytes(needed)}, {self.device} has "
                f"{human_bytes(free_bytes(self.device))} free: no resident row, and tokens are not compared with it."
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
            # quantised weights replace the model's own, so those come last
            loads = dict.fromkeys([*rows, *(spec for spec, _ in missing)])
            for spec in loads:
                found = self._request(whole, spec, SlabDtype.source, peak)
                if spec in rows:
                    peak_bytes = peak.read()
                    memory = {} if peak_bytes is None else {"peak_device_bytes": peak_bytes}
                    record({**spec.to_dict(), **found, **memory})
                self._refuse_not_finite(found, SlabDtype.source)
        for weights in sorted({weights for _, weights in missing} - {SlabDtype.source}):
            specs = {load: spec for (load, w), spec in missing.items() if w == weights}
            with self.open_store(next(iter(specs.values()))) as store:
                dequantised_resident(whole, self.model, store)
            for load in specs:
                # dequantised, it is as fast as before
                self._refuse_not_finite(self._request(whole, load, weights), weights)

    def _refuse_not_finite(self, found: dict[str, Any], weights: str) -> None:
        """Raises `UsageError` where there is nothing that other rows could be compared with."""
        if not found["logits_finite"]:
            slabs = "" if weights == SlabDtype.source else f" with {weights} experts"
            raise UsageError(
                f"{self.model.name}: the logits of the whole model in memory{slabs} are NaN or infinite, so nothing "
                f"can be compared with it: {WHAT_TO_CHECK}."
            )

    def _request(self, whole: Any, spec: RowSpec, weights: str, peak: PeakMemory | None = None) -> dict[str, Any]:
        requests = Requests.of(spec, self.model, self.device)
        with forced_experts(whole, spec.forced_experts), finite_logits(whole) as finite:
            timed = measure_whole(whole.generate, requests, spec.new_tokens, self.effort)
            tokens = torch.stack([request.tokens for request in timed])
            with nullcontext() if peak is None else peak.left_out():
                logits = first_logits(whole, requests, tokens[0])
        found = figures(timed, spec, None) | logits_record(logits, None, bool(finite.rows_not_finite()), ())
        if found["logits_finite"]:
            Reference(tokens, logits).save(self.references.path(spec, weights))
        return found


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
                self._row(spec, record)
                forget()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _row(self, spec: RowSpec, record: Record) -> None:
        if spec.tier == Tier.dram:
            needed = self.model.num_bytes() * HEADROOM
            if needed > free_bytes(torch.device("cpu")):
                say(f"{spec.sentence()} is left out: it needs {human_bytes(needed)} of host memory.")
                return
            record(self._measured(spec, lambda: cpu_offloaded(self.model, self.device)))
            return
        if not (self.folder / "index.json").is_file():
            write_offload_folder(self.model, self.folder)
        cold = spec.policy == ACCELERATE
        (drop_page_cache if cold else fill_page_cache)(self.folder)
        share = cached_share(self.folder)
        if cold and share is not None and share > COLD_SHARE:
            say(f"{spec.sentence()}: {share:.0%} of its files stayed in the page cache, so its reads are not all cold.")
        between = (lambda: drop_page_cache(self.folder)) if cold else None
        row = self._measured(spec, lambda: disk_offloaded(self.model, self.folder, self.device), between)
        record(row | ({} if share is None else {"page_cache_share": share}))

    def _measured(
        self, spec: RowSpec, build: Callable[[], Any], between: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        requests = Requests.of(spec, self.model, self.device)
        with PeakMemory(self.device) as peak:
            served, reference = build(), self.references.get(spec)
            with forced_experts(served, spec.forced_experts), finite_logits(served) as finite:
                timed = measure_whole(served.generate, requests, spec.new_tokens, self.effort, between)
                peak_bytes = peak.read()
                logits = first_logits(served, requests, tokens_given(reference, timed))
        row = {**spec.to_dict(), **figures(timed, spec, reference)}
        row |= logits_record(logits, reference, bool(finite.rows_not_finite()), (self.model.dtype,))
        return row if peak_bytes is None else row | {"peak_device_bytes": peak_bytes}


def forget() -> None:
    """Give a dropped model's memory back before the next one is measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
