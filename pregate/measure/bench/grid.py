"""Which rows a benchmark has: the models it serves and every combination of settings that makes sense.

Knows settings, geometries and sizes; measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from pregate.config import Baseline, CacheRule, Drive, Policy, Precision, Run, SlabDtype, Tier, UsageError
from pregate.config.groups import config_dir
from pregate.engine.budget import host_buffers_within, resolve_tier, slots_within
from pregate.engine.device.limits import MOST_ROWS, slots_for
from pregate.engine.device.ops.expert_outputs import check_activation
from pregate.engine.device.ops.language import require_triton
from pregate.engine.opening import serving_dtype
from pregate.engine.storage.slabs import SlabLayout
from pregate.measure.evaluation import check_gates
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.family import ExpertSpec, config_of, experts_of, family_named
from pregate.models.loading import open_model
from pregate.models.pregating import PreGating
from pregate.models.synthetic import synthetic_checkpoint
from pregate.system.machine import pick_device

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
RESIDENT = "resident"
"""The whole model in memory through Hugging Face `generate`."""
ACCELERATE, ACCELERATE_WARM = "accelerate", "accelerate, page cache warm"
"""Accelerate's `cpu_offload` (tier dram) or `disk_offload` (tier disk); of that, read cold and read warm."""
BASELINES = (RESIDENT, ACCELERATE, ACCELERATE_WARM)


@dataclass(frozen=True, eq=False)
class BenchModel:
    """A model to be measured. `directory` is None for random weights."""

    name: str
    directory: str | None
    source: SourceCheckpoint
    family: ExpertSpec
    dtype: torch.dtype
    vocab_size: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def gating(self) -> PreGating:
        return PreGating.from_dict(self.source.config.get("pregate"))

    @property
    def label(self) -> str:
        """Names its files among those of other models."""
        return f"{self.name}-{self.dtype_name}"

    def num_bytes(self) -> int:
        """Of the whole model in memory."""
        numel = sum(torch.Size(info.shape).numel() for info in self.source.tensors.values())
        return numel * self.dtype.itemsize

    def experts_bytes(self, slab_dtype: SlabDtype | str) -> int:
        """Of all experts as slabs."""
        return len(self.family.keys()) * self.layout(slab_dtype).slab_bytes

    def layout(self, slab_dtype: SlabDtype | str) -> SlabLayout:
        return SlabLayout.of(self.family, self.dtype, SlabDtype(slab_dtype))


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

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RowSpec:
        """The identity of a measured row."""
        known: dict[str, Any] = {field.name: row.get(field.name) for field in fields(cls)}
        return cls(**known)

    def sentence(self) -> str:
        """The row in a few words, for the user who watches."""
        parts = [self.model, self.tier, self.slab_dtype if self.slab_dtype != "source" else None, self.policy]
        parts += [self.cache if self.cache != "none" else None, self.budget]
        parts += ["device-driven" if self.drive == Drive.device else None]
        parts += [f"batch {self.batch}", f"{self.forced_experts} experts" if self.forced_experts else None]
        return " ".join(str(part) for part in parts if part is not None)

    def slug(self) -> str:
        """`sentence` as a file name."""
        return re.sub(r"[^\w.-]+", "_", self.sentence())


def bench_models(run: Run) -> list[BenchModel]:
    """The models asked for: `checkpoint`, or members of the model group, or the run's own model.

    Raises `UsageError` for an unknown one, one without a geometry, and one that cannot be served.
    """
    if run.checkpoint is not None:
        return [_checkpoint_model(run, run.checkpoint)]
    if not run.bench.models:
        return [_random_model(run, run.model.name, run.model.family, run.model.geometry, run.bench.dtype)]
    models = []
    for entry in run.bench.models:
        name, _, dtype = entry.partition("@")
        if dtype not in ("", *Precision):
            raise UsageError(f"bench.models has {entry}: write one of {', '.join(DTYPES)} behind the @.")
        settings = _group_member(name)
        precision = Precision(dtype) if dtype else run.bench.dtype
        family = settings.get("family", run.model.family)
        named = settings.get("name", name)
        models.append(_random_model(run, named, family, settings.get("geometry") or {}, precision))
    labels = [model.label for model in models]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"bench.models names {twice} twice: name each model once.")
    return models


def _group_member(name: str) -> dict[str, Any]:
    folder = config_dir() / "model"
    file = folder / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UsageError(f"bench.models has {name!r}, but there is no such model: choose from {names}.")
    settings = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _random_model(run: Run, name: str, family: str, geometry: dict[str, Any], precision: Precision) -> BenchModel:
    if not geometry:
        raise UsageError(f"The model {name} has no geometry to fill with random weights: set checkpoint=DIR.")
    dtype, gating = DTYPES.get(precision, torch.float32), PreGating.of_config(run.pregate)
    return bench_model(name, None, synthetic_checkpoint(family_named(family), geometry, gating, dtype, run.seed))


def _checkpoint_model(run: Run, checkpoint: str) -> BenchModel:
    check_gates(run, checkpoint)
    source = open_model(checkpoint)
    if run.bench.dtype in DTYPES:
        stored = {key: value for key, value in source.config.items() if key != "torch_dtype"}  # the older name
        dtype = str(DTYPES[run.bench.dtype]).removeprefix("torch.")
        source = replace(source, config={**stored, "dtype": dtype})
    place = Path(checkpoint).resolve()
    # a training run calls every checkpoint by that name, and its directory by the run's
    return bench_model(place.parent.name if place.name == "checkpoint" else place.name, checkpoint, source)


def bench_model(name: str, directory: str | None, source: SourceCheckpoint) -> BenchModel:
    """`source` as a model to measure. Raises `UsageError` if it cannot be served."""
    config = config_of(source.config)
    family = experts_of(config)
    return BenchModel(name, directory, source, family, serving_dtype(config, source, family), config.vocab_size)


def check_models(run: Run, models: Sequence[BenchModel]) -> None:
    """Refuse budgets and numbers of experts that some model cannot be measured with. Raises `UsageError`."""
    for model in models:
        most = max(run.bench.active_experts, default=1)
        if most > model.family.num_experts:
            raise UsageError(
                f"bench.active_experts={most}, but a block of {model.name} has {model.family.num_experts} experts: "
                "lower it."
            )
        for slab_dtype in run.bench.slab_dtypes:
            slab_bytes = model.layout(slab_dtype).slab_bytes
            host_buffers_within(run.engine.host_budget, model.family, slab_bytes)
            for policy, budget in product(run.engine.policies, run.bench.budgets):
                if policy is not Policy.gpu_only:
                    slots_within(budget, policy, model.family, slab_bytes)
            if Drive.device in run.bench.drives:
                _check_steps(run, model, slab_bytes)


def _check_steps(run: Run, model: BenchModel, slab_bytes: int) -> None:
    """Refuse experts that the device cannot compute, and budgets with which some batch could not be decoded by it."""
    config = config_of(model.source.config)
    check_activation(config.dense_act_fn)
    if pick_device(run.engine.device).type == "cuda":
        require_triton()
    for policy, budget, batch in product(run.engine.policies, run.bench.budgets, run.bench.batches):
        if policy is not Policy.gpu_only and batch <= MOST_ROWS:
            slots_for(budget, policy, config, slab_bytes, batch)


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
    )
    loads = [
        replace(base, batch=batch, forced_experts=forced)
        for batch, forced in product(bench.batches, bench.active_experts or [None])
    ]
    tiers = list(dict.fromkeys(resolve_tier(tier, device) for tier in bench.tiers))
    rows: list[RowSpec] = list(loads) if Baseline.resident in bench.baselines else []
    if Baseline.accelerate in bench.baselines:
        rows += _accelerate_rows(run, loads, tiers, device)
    for tier, slab_dtype, load in product(tiers, bench.slab_dtypes, loads):
        for drive in bench.drives:
            served = replace(load, tier=str(tier), slab_dtype=str(slab_dtype), drive=str(drive))
            rows += filter(_can_be_driven, _engine_rows(run, served))
    if Drive.device in bench.drives and not any(row.drive == Drive.device for row in rows):
        raise UsageError(
            "bench.drives has device, which needs experts in host memory, a cache of none or lru and at most "
            f"{MOST_ROWS} rows: set bench.tiers=[dram], or leave it out."
        )
    return list(dict.fromkeys(rows))


def _can_be_driven(row: RowSpec) -> bool:
    served = row.tier == Tier.dram and row.cache in (None, CacheRule.none, CacheRule.lru) and row.batch <= MOST_ROWS
    return row.drive == Drive.host or served


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
