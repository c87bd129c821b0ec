"""Which slab is in which slot, kept on the compute device, so that finding hits and victims asks no host.

Knows slab numbers, slots and their ages; knows nothing about blocks, bytes or addresses. Every operation has static
shapes and is in place, so that it can be part of a CUDA graph.

Letters: G slabs of the store, S slots, N choices of one block and step (tokens times experts a token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1
"""No slab, no slot, no choice."""
HITS, MISSES, EVICTIONS, ERRORS = range(4)
"""Where each count lies in `DeviceSlots.counters`."""
NEVER_A_VICTIM = torch.iinfo(torch.int64).max


def minimum_slots(num_choices: int, num_experts: int, lookahead: int) -> int:
    """Slots with which no fetch can fail: a block's distinct slabs, and those of the `lookahead` fetches under way."""
    return (lookahead + 1) * min(num_experts, num_choices)


@dataclass(frozen=True)
class DeviceSlots:
    """The slot table. Its tensors keep their addresses for good.

    slot_of_G: int32, the slot that holds a slab. slab_in_S: int32, the slab in a slot. last_use_S: int64, the number
    of the latest fetch that wanted what is in the slot, -1 before the first. tick: int64 (1,), fetches so far.
    counters: int64 (4,), distinct slabs that were there (`HITS`), that had to be copied (`MISSES`), that left their
    slot for another (`EVICTIONS`), and that found no slot, because more was wanted than can be protected (`ERRORS`).
    """

    slot_of_G: Tensor
    slab_in_S: Tensor
    last_use_S: Tensor
    tick: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, num_slabs: int, num_slots: int, device: torch.device | str) -> DeviceSlots:
        """A table of which every slot is free."""

        def filled(size: int, value: int, dtype: torch.dtype) -> Tensor:
            return torch.full((size,), value, dtype=dtype, device=device)

        return cls(
            filled(num_slabs, NONE, torch.int32),
            filled(num_slots, NONE, torch.int32),
            filled(num_slots, NONE, torch.int64),
            filled(1, 0, torch.int64),
            filled(4, 0, torch.int64),
        )

    def clear(self) -> None:
        """Forget what every slot holds, in place; all are free. The counters start again too."""
        self.slot_of_G.fill_(NONE)
        self.slab_in_S.fill_(NONE)
        self.last_use_S.fill_(NONE)
        self.tick.zero_()
        self.counters.zero_()


@dataclass(frozen=True)
class FetchPlan:
    """What one fetch decides, in preallocated int32 tensors.

    slot_N: where each choice finds its slab, -1 for a dropped choice. copy_slab_N, copy_slot_N: the distinct slabs to
    copy and where to, in the order in which they were first wanted, then -1.
    """

    slot_N: Tensor
    copy_slab_N: Tensor
    copy_slot_N: Tensor

    @classmethod
    def empty(cls, num_choices: int, device: torch.device | str) -> FetchPlan:
        return cls(*(torch.full((num_choices,), NONE, dtype=torch.int32, device=device) for _ in range(3)))


def want_slabs(expert_ids_BTK: Tensor, live_B: Tensor, first_slab: int, wanted_N: Tensor) -> None:
    """Into `wanted_N` (int32, B*K of one place a row): the slab of each choice of a block whose expert 0 is
    `first_slab`; -1 for a dropped choice and for all of a row that does not live."""
    if wanted_N.device.type == "cuda":
        from pregate.engine.device.ops.kernels_slots import launch_want_slabs

        launch_want_slabs(expert_ids_BTK, live_B, first_slab, wanted_N)
    else:
        want_slabs_twin(expert_ids_BTK, live_B, first_slab, wanted_N)


def want_slabs_twin(expert_ids_BTK: Tensor, live_B: Tensor, first_slab: int, wanted_N: Tensor) -> None:
    """`want_slabs` in plain torch."""
    # masked_fill: its value is an argument of the launch, where `torch.where` would make a tensor of it
    unneeded = (expert_ids_BTK < 0) | ~live_B[:, None, None]
    wanted_N.copy_((expert_ids_BTK + first_slab).masked_fill(unneeded, NONE).view(-1))


def assign_slots(table: DeviceSlots, wanted_N: Tensor, plan: FetchPlan, *, keep: bool, protected_fetches: int) -> None:
    """Give each slab of `wanted_N` (int32 slab numbers, -1 for a dropped choice, repeats allowed) a slot.

    A slab that is there stays where it is. The others take free slots first (the lowest first), then those whose slab
    was wanted longest ago (of those the lowest slot), never one that this fetch or the `protected_fetches` before it
    wanted. `keep` false copies every distinct slab, where it is if it is there. A slab that finds no slot gets -1 and
    counts as an error: `minimum_slots` says what rules that out.
    """
    if wanted_N.device.type == "cuda":
        from pregate.engine.device.ops.kernels_slots import launch_assign_slots

        launch_assign_slots(table, wanted_N, plan, keep=keep, protected_fetches=protected_fetches)
    else:
        assign_slots_twin(table, wanted_N, plan, keep=keep, protected_fetches=protected_fetches)


def assign_slots_twin(
    table: DeviceSlots, wanted_N: Tensor, plan: FetchPlan, *, keep: bool, protected_fetches: int
) -> None:
    """`assign_slots` in plain torch, without reading a number back: the same shapes whatever is wanted."""
    num_choices, num_slots = wanted_N.shape[0], table.slab_in_S.shape[0]
    order_N = torch.arange(num_choices, device=wanted_N.device)
    earlier_NN = order_N[None, :] < order_N[:, None]
    real_N = wanted_N >= 0
    repeated_N = ((wanted_N[:, None] == wanted_N[None, :]) & earlier_NN).any(1)
    distinct_N = real_N & ~repeated_N
    slab_N = wanted_N.clamp_min(0).long()

    there_N = table.slot_of_G[slab_N].long()
    present_N = distinct_N & (there_N >= 0)
    _set_where(table.last_use_S, there_N, table.tick, present_N)

    oldest_safe = (table.tick - protected_fetches).clamp_min(0)
    age_S = torch.where(table.slab_in_S < 0, NONE, table.last_use_S)
    age_S = age_S.masked_fill(table.last_use_S >= oldest_safe, NEVER_A_VICTIM)
    age_S, victims_S = age_S.sort(stable=True)

    missing_N = distinct_N & ~present_N
    rank_N = (missing_N[None, :] & earlier_NN).sum(1)
    in_table_N = rank_N.clamp_max(num_slots - 1)
    placed_N = missing_N & (rank_N < num_slots) & (age_S[in_table_N] != NEVER_A_VICTIM)
    victim_N = victims_S[in_table_N]
    evicted_N = table.slab_in_S[victim_N]
    evicts_N = placed_N & (evicted_N >= 0)
    _set_where(table.slot_of_G, evicted_N.long(), torch.full_like(wanted_N, NONE), evicts_N)
    _set_where(table.slot_of_G, slab_N, victim_N.int(), placed_N)
    _set_where(table.slab_in_S, victim_N, wanted_N, placed_N)
    _set_where(table.last_use_S, victim_N, table.tick, placed_N)

    slot_N = torch.where(real_N, table.slot_of_G[slab_N], NONE)
    plan.slot_N.copy_(slot_N)
    copied_N = placed_N if keep else placed_N | present_N
    num_copied = copied_N.sum()
    place_N = (copied_N[None, :] & earlier_NN).sum(1)
    place_N = torch.where(copied_N, place_N, num_copied + order_N - place_N)
    plan.copy_slab_N.scatter_(0, place_N, torch.where(copied_N, wanted_N, NONE))
    plan.copy_slot_N.scatter_(0, place_N, torch.where(copied_N, slot_N, NONE))

    hits = present_N.sum() if keep else torch.zeros_like(num_copied)
    table.counters.add_(torch.stack([hits, num_copied, evicts_N.sum(), (missing_N & ~placed_N).sum()]))
    table.tick.add_(1)


def _set_where(target: Tensor, index_N: Tensor, value_N: Tensor, mask_N: Tensor) -> None:
    """`target[index] = value` where `mask`, whose indices are distinct. Adding the difference leaves the rest as it
    is, where writing would need a place for what is masked out."""
    index_N = index_N.clamp_min(0)
    change_N = torch.where(mask_N, value_N - target[index_N], 0)
    target.index_add_(0, index_N, change_N.to(target.dtype))
