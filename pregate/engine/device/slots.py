"""Which slab is in which slot, kept on the compute device, so that finding hits and victims asks no host.

Knows slab numbers, slots and their ages; knows nothing about blocks, bytes or addresses. `assign_slots` changes it.

Letters: G slabs of the store, S slots, N choices of one block and step (tokens times experts a token).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NONE = -1
"""No slab, no slot, no choice."""
HITS, MISSES, EVICTIONS, ERRORS = range(4)
"""Where each count lies in `DeviceSlots.counters`."""


def minimum_slots(num_choices: int, num_experts: int, lookahead: int) -> int:
    """Slots with which no fetch can fail: a block's distinct slabs, and those of the `lookahead` fetches under way."""
    return (lookahead + 1) * min(num_experts, num_choices)


class DeviceSlots(NamedTuple):
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


class Fetch(NamedTuple):
    """What one fetch decides, in preallocated int32 tensors.

    slot_N: where each choice finds its slab, -1 for a dropped choice. copy_slab_N, copy_slot_N: the distinct slabs to
    copy and where to, in the order in which they were first wanted, then -1.
    """

    slot_N: Tensor
    copy_slab_N: Tensor
    copy_slot_N: Tensor

    @classmethod
    def empty(cls, num_choices: int, device: torch.device | str) -> Fetch:
        return cls(*(torch.full((num_choices,), NONE, dtype=torch.int32, device=device) for _ in range(3)))
