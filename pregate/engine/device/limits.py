"""What a device-driven engine can be opened for: settings, and slots enough for every step. Opens nothing."""

from __future__ import annotations

from typing import Any

from pregate.config import CacheRule, Policy, Tier, UsageError
from pregate.engine.budget import default_slots, slots_within
from pregate.engine.device.fetching import slots_needed
from pregate.engine.device.ops.assign_slots import MAX_CHOICES
from pregate.engine.storage.store import Store
from pregate.models.family import experts_of
from pregate.system.byte_sizes import human_bytes

MOST_ROWS = 32
"""A step of more tokens than that is better served by matrix products over groups of tokens."""


def slots_for(budget: str | None, policy: Policy, config: Any, slab_bytes: int, batch: int) -> int:
    """How many slots `budget` buys. Raises `UsageError` if a step of `batch` rows could need more of them, or has more
    choices than one fetch looks at."""
    family = experts_of(config)
    if batch * family.top_k > MAX_CHOICES:
        raise UsageError(
            f"engine.drive=device looks at {MAX_CHOICES} choices of a block together, but {batch} rows choose "
            f"{family.top_k} experts each: serve {MAX_CHOICES // family.top_k} rows or fewer, or use engine.drive=host."
        )
    total, lookahead = len(family.keys()), config.pregating.lookahead_of(list(family.layers)[-1])
    fewest = slots_needed(policy, total, batch * family.top_k, family.num_experts, lookahead)
    if budget is None:
        return min(total, max(fewest, default_slots(policy, family)))
    slots = slots_within(budget, policy, family, slab_bytes)
    if slots < min(total, fewest):
        least = fewest * slab_bytes
        raise UsageError(
            f"engine.device_budget={budget} holds {slots} experts, but a step of {policy} with engine.drive=device and "
            f"batch {batch} can need {fewest}: give {least}B ({human_bytes(least)}) or more."
        )
    return slots


def refuse_settings(
    batch: int, max_source_len: int, max_new_tokens: int, cache: CacheRule, tier: Tier, store: Store | None
) -> None:
    """Raises `UsageError` for settings that no checkpoint could be served with."""
    if not 1 <= batch <= MOST_ROWS:
        raise UsageError(f"engine.drive=device serves 1 to {MOST_ROWS} rows, not {batch}: use engine.drive=host.")
    for name, value in (("max_source_len", max_source_len), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1.")
    if cache not in (CacheRule.none, CacheRule.lru):
        raise UsageError(f"engine.drive=device knows the caches none and lru, not {cache}: choose one of them.")
    if tier is Tier.disk or (store is not None and not store.in_host_memory):
        raise UsageError(
            "engine.drive=device fetches experts from host memory, not from the disk: set engine.tier=dram, or use "
            "engine.drive=host."
        )
