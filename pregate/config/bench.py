"""The settings of `pregate.bench`: which rows it has and how each is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from pregate.config.choices import Baseline, CacheRule, Drive, Precision, SlabDtype, Tier
from pregate.config.validators import Limit, at_least, setting, share_of

FILLED = {"empty": "name at least one, or leave the setting out"}
EACH_POSITIVE = {"each": Limit(lambda value: value > 0, "must all be at least 1")}


@dataclass
class BenchConfig:
    """What `pregate.bench` measures: one row for each combination of the lists that makes sense, for every policy of
    `engine.policies`.

    `drives`: values of `engine.drive`; what `device` cannot serve is measured with `host` alone. `models`: members of
    the model group, served with random weights, in `dtype` or in one of their own as in
    `switch_large_128@bf16`; a `checkpoint` given takes their place. `num_blocks`: so many MoE blocks a stack of each of
    them, for a machine that is too small for all; the rows say so. `budgets`: values of `engine.device_budget`.
    `active_experts`: route every block to exactly so many experts (empty: as the gates decide). `new_tokens`,
    `repeats`, `warmup` (tokens and requests) are per row; prefetch_all and Accelerate decode `slow_new_tokens`
    at most, and no row begins another repeat after `max_seconds_per_row`.
    """

    models: list[str] = field(default_factory=list)
    dtype: Precision = Precision.auto
    num_blocks: int | None = setting(None, at_least(1, ", or null for all"))
    tiers: list[Tier] = field(default_factory=lambda: [Tier.auto], metadata=FILLED)
    drives: list[Drive] = field(default_factory=lambda: [Drive.host], metadata=FILLED)
    slab_dtypes: list[SlabDtype] = field(default_factory=lambda: [SlabDtype.source], metadata=FILLED)
    caches: list[CacheRule] = field(default_factory=lambda: [CacheRule.none], metadata=FILLED)
    budgets: list[str | None] = field(default_factory=lambda: [None], metadata=FILLED)
    batches: list[int] = field(default_factory=lambda: [1], metadata=FILLED | EACH_POSITIVE)
    active_experts: list[int] = field(default_factory=list, metadata=EACH_POSITIVE)
    baselines: list[Baseline] = field(default_factory=lambda: [Baseline.resident])
    prompt_len: int = setting(256, at_least(1))
    new_tokens: int = setting(32, at_least(2, ", to time tokens apart"))
    slow_new_tokens: int = setting(4, at_least(2, ", to time tokens apart"))
    repeats: int = setting(3, at_least(1))
    warmup: int = setting(1, at_least(1))
    max_seconds_per_row: int = setting(60, at_least(1))

    def check(self, prefix: str) -> None:
        for budget in self.budgets:
            share_of(f"{prefix}budgets", budget or "")
