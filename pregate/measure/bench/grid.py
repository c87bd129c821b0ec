"""Which rows a benchmark has: every combination of settings that makes sense.

Knows settings; measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

import torch

from pregate.config import Baseline, CacheRule, Drive, Policy, Run, Tier, UsageError
from pregate.engine.budget import resolve_tier
from pregate.engine.device.limits import MOST_ROWS
from pregate.measure.bench.models import BenchModel, drives_of
from pregate.models.family import family_of

RESIDENT = "resident"
"""The whole model in memory through Hugging Face `generate`."""
ACCELERATE, ACCELERATE_WARM = "accelerate", "accelerate, page cache warm"
"""Accelerate's `cpu_offload` (tier dram) or `disk_offload` (tier disk); of that, read cold and read warm."""
BASELINES = (RESIDENT, ACCELERATE, ACCELERATE_WARM)


@dataclass(frozen=True)
class RowSpec:
    """What identifies a row; None where a setting does not apply. Two rows with the same values are the same row."""

    model: str
    dtype: str
    lookahead: int
    entry: str
    policy: str
    batch: int
    prompt_len: int
    new_tokens: int
    seed: int
    forced_experts: int | None = None
    tier: str | None = None
    slab_dtype: str | None = None
    cache: str | None = None
    budget: str | None = None
    host_budget: str | None = None
    drive: str | None = None
    blocks: str | None = None
    prefill_chunk: int | None = None
    gates: str | None = None
    """How they differ from the usual ones, see `PreGating.other_settings`."""

    @property
    def device_driven(self) -> bool:
        return self.drive == Drive.device

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RowSpec:
        """The identity of a measured row."""
        known: dict[str, Any] = {field.name: row.get(field.name) for field in fields(cls)}
        return cls(**known)

    def sentence(self) -> str:
        """The row in a few words, for the user who watches."""
        parts = [self.model, self.gates, f"{self.blocks} blocks" if self.blocks else None, self.tier]
        parts += [self.slab_dtype if self.slab_dtype != "source" else None, self.policy]
        parts += [self.cache if self.cache != "none" else None, self.budget]
        parts += ["device-driven" if self.device_driven else None]
        parts += [f"batch {self.batch}", f"{self.forced_experts} experts" if self.forced_experts else None]
        return " ".join(str(part) for part in parts if part is not None)

    def slug(self) -> str:
        """`sentence` and the dtype as a file name."""
        return re.sub(r"[^\w.-]+", "_", f"{self.sentence()} {self.dtype}")


def grid(run: Run, model: BenchModel, device: torch.device) -> list[RowSpec]:
    """All rows of one model in the order in which they are measured: baselines, then store by store."""
    bench = run.bench
    base = RowSpec(
        model=model.name,
        dtype=model.dtype_name,
        lookahead=model.gating.lookahead,
        entry=model.gating.entry,
        policy=RESIDENT,
        batch=1,
        prompt_len=bench.prompt_len,
        new_tokens=bench.new_tokens,
        seed=run.seed,
        blocks=model.blocks,
        gates=model.gates,
    )
    loads = [
        replace(base, batch=batch, forced_experts=forced)
        for batch, forced in product(bench.batches, bench.active_experts or [None])
    ]
    drives = drives_of(run, model)
    tiers = list(dict.fromkeys(resolve_tier(tier, device) for tier in bench.tiers))
    rows: list[RowSpec] = list(loads) if Baseline.resident in bench.baselines else []
    if Baseline.accelerate in bench.baselines:
        rows += _accelerate_rows(run, loads, tiers, device)
    for tier, slab_dtype, load in product(tiers, bench.slab_dtypes, loads):
        for drive in drives:
            served = replace(load, tier=str(tier), slab_dtype=str(slab_dtype), drive=str(drive))
            if drive is Drive.host:
                served = replace(served, prefill_chunk=_prefill_chunk(run, model))
            rows += filter(_can_be_driven, _engine_rows(run, served))
    if Drive.device in drives and not any(row.device_driven for row in rows):
        raise UsageError(
            "bench.drives has device, which needs experts in host memory, a cache of none or lru and at most "
            f"{MOST_ROWS} rows: set bench.tiers=[dram], or leave it out."
        )
    return list(dict.fromkeys(rows))


def _can_be_driven(row: RowSpec) -> bool:
    served = row.tier == Tier.dram and row.cache in (None, CacheRule.none, CacheRule.lru) and row.batch <= MOST_ROWS
    return served or not row.device_driven


def _prefill_chunk(run: Run, model: BenchModel) -> int | None:
    """None where prompts are read at once."""
    chunk = run.engine.prefill_chunk
    is_long = chunk is not None and chunk < run.bench.prompt_len
    return chunk if is_long and family_of(model.source.config).objective.continues_prompts else None


def _accelerate_rows(
    run: Run, loads: Sequence[RowSpec], tiers: Sequence[Tier], device: torch.device
) -> Iterator[RowSpec]:
    slow = min(run.bench.new_tokens, run.bench.slow_new_tokens)
    for tier, load in product(tiers, loads):
        if tier is Tier.dram and device.type == "cpu":
            continue  # host memory is the compute device: there is nothing to offload to
        for policy in (ACCELERATE, ACCELERATE_WARM) if tier is Tier.disk else (ACCELERATE,):
            yield replace(load, policy=policy, tier=str(tier), new_tokens=slow)


def _engine_rows(run: Run, served: RowSpec) -> Iterator[RowSpec]:
    """Every policy with the budgets and caches that mean something to it."""
    bench = run.bench
    host_budget = run.engine.host_budget if served.tier == Tier.disk else None
    for policy in run.engine.policies:
        row = replace(served, policy=str(policy))
        if policy is Policy.gpu_only:
            yield row
            continue
        row = replace(row, host_budget=host_budget)
        if policy is Policy.prefetch_all:
            slow = min(bench.new_tokens, bench.slow_new_tokens)
            for budget in bench.budgets:
                yield replace(row, budget=budget, cache=str(CacheRule.none), new_tokens=slow)
            continue
        for cache, budget in product(bench.caches, bench.budgets):
            yield replace(row, cache=str(cache), budget=budget)
