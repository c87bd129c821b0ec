"""The Triton kernels behind `want_slabs` and `assign_slots`: one program each, because a fetch waits for them.

Knows numbers in tables only. Stores that later loads of the same program depend on are separated by barriers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pregate.config import UsageError
from pregate.engine.device.slots import DeviceSlots, FetchPlan

MAX_SLOTS = 1 << 14
"""The slots of a table are looked at as one tile, in registers."""
MAX_CHOICES = 1 << 8
"""As many as `prefetch_all` wants of a block of 256 experts; compared pair by pair."""
SLOT_BITS = tl.constexpr(20)
SLOT_MASK = tl.constexpr((1 << 20) - 1)
NO_VICTIM = tl.constexpr((1 << 63) - 1)


@triton.jit
def assign_kernel(
    slot_of_G,
    slab_in_S,
    last_use_S,
    tick_1,
    counters_4,
    wanted_N,
    slot_N,
    copy_slab_N,
    copy_slot_N,
    num_choices: tl.constexpr,
    num_slots: tl.constexpr,
    protected_fetches: tl.constexpr,
    KEEP: tl.constexpr,
    CHOICES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Tiles of CHOICES and SLOTS numbers, the powers of two at or above `num_choices` and `num_slots`."""
    tick = tl.load(tick_1)
    order = tl.arange(0, CHOICES)
    inside = order < num_choices
    wanted = tl.load(wanted_N + order, mask=inside, other=-1)
    earlier = order[None, :] < order[:, None]
    repeated = tl.max(((wanted[:, None] == wanted[None, :]) & earlier).to(tl.int32), axis=1) > 0
    distinct = (wanted >= 0) & (repeated == 0)

    there = tl.load(slot_of_G + wanted, mask=distinct, other=-1)
    present = distinct & (there >= 0)
    tl.store(last_use_S + there, tl.zeros_like(wanted).to(tl.int64) + tick, mask=present)
    tl.debug_barrier()

    # one number a slot, smallest for the best victim: its age, then its place
    places = tl.arange(0, SLOTS)
    in_table = places < num_slots
    last_use = tl.load(last_use_S + places, mask=in_table, other=0)
    is_free = tl.load(slab_in_S + places, mask=in_table, other=0) < 0
    ranking = (tl.where(is_free, 0, last_use + 1) << SLOT_BITS) + places
    is_safe = last_use >= tl.maximum(tick - protected_fetches, 0)
    ranking = tl.where(in_table & (is_safe == 0), ranking, NO_VICTIM)

    missing = distinct & (present == 0)
    rank = tl.sum((missing[None, :] & earlier).to(tl.int32), axis=1)
    num_missing = tl.sum(missing.to(tl.int32), axis=0)
    victim = tl.full((CHOICES,), -1, tl.int32)
    for turn in range(num_missing):
        best = tl.min(ranking, axis=0)
        place = (best & SLOT_MASK).to(tl.int32)
        victim = tl.where(missing & (rank == turn) & (best != NO_VICTIM), place, victim)
        ranking = tl.where(ranking == best, NO_VICTIM, ranking)

    placed = victim >= 0
    evicted = tl.load(slab_in_S + victim, mask=placed, other=-1)
    evicts = placed & (evicted >= 0)
    tl.debug_barrier()
    tl.store(slot_of_G + evicted, tl.full((CHOICES,), -1, tl.int32), mask=evicts)
    tl.store(slot_of_G + wanted, victim, mask=placed)
    tl.store(slab_in_S + victim, wanted, mask=placed)
    tl.store(last_use_S + victim, tl.zeros_like(wanted).to(tl.int64) + tick, mask=placed)
    tl.debug_barrier()

    slot = tl.load(slot_of_G + wanted, mask=wanted >= 0, other=-1)
    tl.store(slot_N + order, slot, mask=inside)
    copied = placed if KEEP else placed | present
    num_copied = tl.sum(copied.to(tl.int32), axis=0)
    before = tl.sum((copied[None, :] & earlier).to(tl.int32), axis=1)
    # copies come first, the rest of the list behind them
    position = tl.where(copied, before, num_copied + order - before)
    tl.store(copy_slab_N + position, tl.where(copied, wanted, -1), mask=inside)
    tl.store(copy_slot_N + position, tl.where(copied, slot, -1), mask=inside)

    if KEEP:
        tl.store(counters_4, tl.load(counters_4) + tl.sum(present.to(tl.int32), axis=0))
    tl.store(counters_4 + 1, tl.load(counters_4 + 1) + num_copied)
    tl.store(counters_4 + 2, tl.load(counters_4 + 2) + tl.sum(evicts.to(tl.int32), axis=0))
    tl.store(counters_4 + 3, tl.load(counters_4 + 3) + tl.sum((missing & (placed == 0)).to(tl.int32), axis=0))
    tl.debug_barrier()
    tl.store(tick_1, tick + 1)


@triton.jit
def want_kernel(
    expert_ids_N, live_B, wanted_N, first_slab, num_choices: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr
):
    """CHOICES: the power of two at or above `num_choices`. Flags are bytes."""
    order = tl.arange(0, CHOICES)
    inside = order < num_choices
    expert = tl.load(expert_ids_N + order, mask=inside, other=-1).to(tl.int32)
    is_live = tl.load(live_B + order // TOP_K, mask=inside, other=0) != 0
    tl.store(wanted_N + order, tl.where((expert >= 0) & is_live, expert + first_slab, -1), mask=inside)


def launch_want_slabs(expert_ids_BTK: Tensor, live_B: Tensor, first_slab: int, wanted_N: Tensor) -> None:
    """See `want_slabs`."""
    num_choices = wanted_N.shape[0]
    assert expert_ids_BTK.numel() == num_choices, (expert_ids_BTK.shape, num_choices)
    launch: Any = want_kernel[(1,)]
    launch(
        expert_ids_BTK.contiguous(),
        live_B.view(torch.uint8),
        wanted_N,
        first_slab,
        num_choices=num_choices,
        TOP_K=num_choices // live_B.shape[0],
        CHOICES=1 << (num_choices - 1).bit_length(),
        num_warps=1,
    )


def launch_assign_slots(
    table: DeviceSlots, wanted_N: Tensor, plan: FetchPlan, *, keep: bool, protected_fetches: int
) -> None:
    """See `assign_slots`. Raises `UsageError` for more slots or choices than one program looks at."""
    num_choices, num_slots = wanted_N.shape[0], table.slab_in_S.shape[0]
    if num_slots > MAX_SLOTS or num_choices > MAX_CHOICES:
        raise UsageError(
            f"{num_slots} slots and {num_choices} choices a block are more than the device's slot table serves "
            f"({MAX_SLOTS} and {MAX_CHOICES}): lower engine.device_budget or the batch."
        )
    slots_tile = max(32, 1 << (num_slots - 1).bit_length())
    launch: Any = assign_kernel[(1,)]
    launch(
        table.slot_of_G,
        table.slab_in_S,
        table.last_use_S,
        table.tick,
        table.counters,
        wanted_N,
        plan.slot_N,
        plan.copy_slab_N,
        plan.copy_slot_N,
        num_choices=num_choices,
        num_slots=num_slots,
        protected_fetches=protected_fetches,
        KEEP=keep,
        CHOICES=max(16, 1 << (num_choices - 1).bit_length()),
        SLOTS=slots_tile,
        num_warps=4 if slots_tile <= 1024 else 8,
    )
