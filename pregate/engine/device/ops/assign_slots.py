"""Gives the slabs of one fetch their slots, in the table on the device: finds hits, chooses victims, lists copies.

The kernel is one program, because a fetch waits for it. It knows numbers in tables only. Stores that later loads of the
same program depend on are separated by barriers.

Letters: G slabs of the store, S slots, N choices of one block and step (tokens times experts a token).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.registry import operation
from pregate.engine.device.slots import NONE

NEVER_A_VICTIM = torch.iinfo(torch.int64).max
MAX_SLOTS = 1 << 14
"""The slots of a table are looked at as one tile, in registers."""
MAX_CHOICES = 1 << 8
"""As many as `prefetch_all` wants of a block of 256 experts; compared pair by pair."""
SLOT_BITS = tl.constexpr(20)
SLOT_MASK = tl.constexpr((1 << 20) - 1)
NO_VICTIM = tl.constexpr((1 << 63) - 1)


@operation("slot_of_G", "slab_in_S", "last_use_S", "tick_1", "counters_4", "slot_N", "copy_slab_N", "copy_slot_N")
def assign_slots(
    slot_of_G: Tensor,
    slab_in_S: Tensor,
    last_use_S: Tensor,
    tick_1: Tensor,
    counters_4: Tensor,
    wanted_N: Tensor,
    slot_N: Tensor,
    copy_slab_N: Tensor,
    copy_slot_N: Tensor,
    keep: bool,
    protected_fetches: int,
) -> None:
    """Give each slab of `wanted_N` (int32 slab numbers, -1 for a dropped choice, repeats allowed) a slot.

    A slab that is there stays where it is. The others take free slots first (the lowest first), then those whose slab
    was wanted longest ago (of those the lowest slot), never one that this fetch or the `protected_fetches` before it
    wanted. `keep` false copies every distinct slab, where it is if it is there. A slab that finds no slot gets -1 and
    counts as an error: `minimum_slots` says what rules that out. The first five arguments are a `DeviceSlots`, and the
    three after `wanted_N` a `Fetch`.
    """
    # no number is read back: the same shapes whatever is wanted
    num_choices, num_slots = wanted_N.shape[0], slab_in_S.shape[0]
    order_N = torch.arange(num_choices, device=wanted_N.device)
    earlier_NN = order_N[None, :] < order_N[:, None]
    real_N = wanted_N >= 0
    repeated_N = ((wanted_N[:, None] == wanted_N[None, :]) & earlier_NN).any(1)
    distinct_N = real_N & ~repeated_N
    slab_N = wanted_N.clamp_min(0).long()

    there_N = slot_of_G[slab_N].long()
    present_N = distinct_N & (there_N >= 0)
    _set_where(last_use_S, there_N, tick_1, present_N)

    oldest_safe = (tick_1 - protected_fetches).clamp_min(0)
    age_S = torch.where(slab_in_S < 0, NONE, last_use_S)
    age_S = age_S.masked_fill(last_use_S >= oldest_safe, NEVER_A_VICTIM)
    age_S, victims_S = age_S.sort(stable=True)

    missing_N = distinct_N & ~present_N
    rank_N = (missing_N[None, :] & earlier_NN).sum(1)
    in_table_N = rank_N.clamp_max(num_slots - 1)
    placed_N = missing_N & (rank_N < num_slots) & (age_S[in_table_N] != NEVER_A_VICTIM)
    victim_N = victims_S[in_table_N]
    evicted_N = slab_in_S[victim_N]
    evicts_N = placed_N & (evicted_N >= 0)
    _set_where(slot_of_G, evicted_N.long(), torch.full_like(wanted_N, NONE), evicts_N)
    _set_where(slot_of_G, slab_N, victim_N.int(), placed_N)
    _set_where(slab_in_S, victim_N, wanted_N, placed_N)
    _set_where(last_use_S, victim_N, tick_1, placed_N)

    found_N = torch.where(real_N, slot_of_G[slab_N], NONE)
    slot_N.copy_(found_N)
    copied_N = placed_N if keep else placed_N | present_N
    num_copied = copied_N.sum()
    place_N = (copied_N[None, :] & earlier_NN).sum(1)
    place_N = torch.where(copied_N, place_N, num_copied + order_N - place_N)
    copy_slab_N.scatter_(0, place_N, torch.where(copied_N, wanted_N, NONE))
    copy_slot_N.scatter_(0, place_N, torch.where(copied_N, found_N, NONE))

    hits = present_N.sum() if keep else torch.zeros_like(num_copied)
    counters_4.add_(torch.stack([hits, num_copied, evicts_N.sum(), (missing_N & ~placed_N).sum()]))
    tick_1.add_(1)


def _set_where(target: Tensor, index_N: Tensor, value_N: Tensor, mask_N: Tensor) -> None:
    """`target[index] = value` where `mask`, whose indices are distinct. Adding the difference leaves the rest as it
    is, where writing would need a place for what is masked out."""
    index_N = index_N.clamp_min(0)
    change_N = torch.where(mask_N, value_N - target[index_N], 0)
    target.index_add_(0, index_N, change_N.to(target.dtype))


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


@assign_slots.on_cuda
def launch_assign_slots(
    slot_of_G: Tensor,
    slab_in_S: Tensor,
    last_use_S: Tensor,
    tick_1: Tensor,
    counters_4: Tensor,
    wanted_N: Tensor,
    slot_N: Tensor,
    copy_slab_N: Tensor,
    copy_slot_N: Tensor,
    keep: bool,
    protected_fetches: int,
) -> None:
    """Raises `UsageError` for more slots or choices than one program looks at."""
    num_choices, num_slots = wanted_N.shape[0], slab_in_S.shape[0]
    if num_slots > MAX_SLOTS or num_choices > MAX_CHOICES:
        raise UsageError(
            f"{num_slots} slots and {num_choices} choices a block are more than the device's slot table serves "
            f"({MAX_SLOTS} and {MAX_CHOICES}): lower engine.device_budget or the batch."
        )
    slots_tile = max(32, 1 << (num_slots - 1).bit_length())
    assign_kernel[(1,)](
        slot_of_G,
        slab_in_S,
        last_use_S,
        tick_1,
        counters_4,
        wanted_N,
        slot_N,
        copy_slab_N,
        copy_slot_N,
        num_choices=num_choices,
        num_slots=num_slots,
        protected_fetches=protected_fetches,
        KEEP=keep,
        CHOICES=max(16, 1 << (num_choices - 1).bit_length()),
        SLOTS=slots_tile,
        num_warps=4 if slots_tile <= 1024 else 8,
    )
