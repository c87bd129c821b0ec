"""The four policies without a host: when the slabs of a decoding step are fetched into slots, and the experts that
compute with them.

Every fetch is a launch whose arguments never change; which slabs it copies, and whether any, is read from tensors.
Fetches are issued in the order of the blocks, so that the slots which must not be overwritten are the last few's.
Knows slots, fetches and streams; knows nothing about models beyond the shape of a route.

Letters: B batch, K experts per token, N = B*K choices of a block, E experts of a block, G all slabs, S slots,
D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pregate.config import Policy
from pregate.engine.device.graph import SideStream, side_stream
from pregate.engine.device.ops.assign_slots import assign_slots
from pregate.engine.device.ops.expert_outputs import ExpertScratch, expert_outputs
from pregate.engine.device.ops.gather_slabs import gather_slabs
from pregate.engine.device.ops.want_slabs import want_slabs
from pregate.engine.device.slots import DeviceSlots, Fetch, minimum_slots
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.routing import DROPPED


@dataclass(frozen=True)
class SlabMemory:
    """Slabs in host memory (`addresses_G`, as the device sees them), the slots they are copied to, and what is where.

    keep: whether a slab may stay for the next step (cache `lru`) or is fetched anew (`none`).
    """

    layout: SlabLayout
    slots_SB: Tensor
    addresses_G: Tensor
    table: DeviceSlots
    keep: bool


@dataclass(frozen=True)
class BlockShape:
    """What is the same for all blocks of a step. first_slab: of each block, the number of expert 0's slab in
    `family.keys()`. activation, constants: of the `ExpertSpec`."""

    first_slab: Sequence[int]
    num_experts: int
    top_k: int
    batch: int
    activation: str
    constants: Sequence[float]

    @property
    def num_choices(self) -> int:
        return self.batch * self.top_k


def slots_needed(policy: Policy, num_slabs: int, num_choices: int, num_experts: int, lookahead: int) -> int:
    """The fewest slots with which every step can run whatever its routes are."""
    if policy is Policy.gpu_only:
        return num_slabs
    if policy is Policy.prefetch_all:
        return 2 * num_experts
    return minimum_slots(num_choices, num_experts, lookahead if policy is Policy.pre_gated else 0)


class Resident:
    """`gpu_only`: slot g holds slab g for good. Also what the other policies have in common."""

    def __init__(self, memory: SlabMemory, blocks: BlockShape, side: SideStream) -> None:
        device, dtype = memory.slots_SB.device, memory.layout.dtype
        self._memory, self._blocks, self._side = memory, blocks, side
        # written beside the computation, so never the allocator's to give to something else
        self._wanted = [
            torch.full((blocks.num_choices,), DROPPED, dtype=torch.int32, device=device) for _ in blocks.first_slab
        ]
        self._scratch = ExpertScratch.empty(blocks.num_choices, memory.layout, device)
        width_D = self._scratch.weighted_ND.shape[1]
        self._out_BD = torch.zeros(blocks.batch, width_D, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """What this takes beside slots and table, without the few numbers of a fetch."""
        return self._out_BD.nbytes + self._scratch.num_bytes

    def forget_slots(self) -> None:
        """For an engine that is closed, so that its memory is free though the engine is still referred to."""
        memory = self._memory
        self._memory = replace(memory, slots_SB=memory.slots_SB[:0].clone(), addresses_G=memory.addresses_G[:0].clone())

    def begin_step(self) -> None:
        """No route is known."""

    def commit(self, block: int, expert_ids_BTK: Tensor, live_B: Tensor) -> None:
        """Note the slabs that the rows that live need for `block`."""
        want_slabs(expert_ids_BTK, live_B, self._blocks.first_slab[block], self._wanted[block])

    def run(self, block: int, hidden_BD: Tensor, weights_BK: Tensor) -> Tensor:
        """The block's output (B, D), in a tensor that the next block's overwrites; 0 where nothing was needed."""
        memory = self._memory
        expert_outputs(
            *(hidden_BD.contiguous(), self._slots(block), weights_BK.reshape(-1), memory.slots_SB),
            *self._scratch,
            self._out_BD,
            memory.layout.text,
            self._blocks.activation,
            self._blocks.constants,
        )
        return self._out_BD

    def _slots(self, block: int) -> Tensor:
        """int32 (N,): the slot of each choice, holding its slab by the time the computation gets there."""
        return self._wanted[block]


class FetchOnDemand(Resident):
    """The slabs of a block are fetched when it runs."""

    def __init__(self, memory: SlabMemory, blocks: BlockShape, side: SideStream) -> None:
        super().__init__(memory, blocks, side)
        device = memory.slots_SB.device
        self._fetches = [Fetch.empty(blocks.num_choices, device) for _ in blocks.first_slab]

    def _slots(self, block: int) -> Tensor:
        self._fetch(self._wanted[block], self._fetches[block], 0)
        return self._fetches[block].slot_N

    def _fetch(self, wanted_N: Tensor, fetch: Fetch, protected_fetches: int) -> None:
        self._assign(wanted_N, fetch, protected_fetches)
        self._copy(fetch)

    def _assign(self, wanted_N: Tensor, fetch: Fetch, protected_fetches: int) -> None:
        memory = self._memory
        assign_slots(*memory.table, wanted_N, *fetch, memory.keep, protected_fetches)

    def _copy(self, fetch: Fetch) -> None:
        memory = self._memory
        gather_slabs(memory.addresses_G, fetch.copy_slab_N, fetch.copy_slot_N, memory.slots_SB)


class FetchAhead(FetchOnDemand):
    """The slabs of a block are fetched as soon as its route is committed, beside the blocks before it. Slots are
    assigned on a stream of their own, beside the copies before, so that the link hardly rests between two copies.

    Of entry gates that decide late, the fetches behind them wait: with a lookahead of 2 block 2 is decided in block 0,
    and fetched in block 1 behind block 1's own. So at most the blocks from the running one on hold slots.
    """

    def __init__(self, memory: SlabMemory, blocks: BlockShape, side: SideStream) -> None:
        super().__init__(memory, blocks, side)
        self._assigning = side_stream(memory.slots_SB.device)

    def begin_step(self) -> None:
        self._known: set[int] = set()
        self._next_fetch = self._running = 0
        self._marks: dict[int, Any] = {}

    def commit(self, block: int, expert_ids_BTK: Tensor, live_B: Tensor) -> None:
        super().commit(block, expert_ids_BTK, live_B)
        self._known.add(block)
        while self._next_fetch in self._known:
            ready = self._next_fetch
            with self._assigning.fork():
                self._assign(self._wanted[ready], self._fetches[ready], ready - self._running)
                assigned = self._assigning.mark()
            with self._side.fork(behind=assigned):
                self._copy(self._fetches[ready])
                self._marks[ready] = self._side.mark()
            self._next_fetch += 1

    def run(self, block: int, hidden_BD: Tensor, weights_BK: Tensor) -> Tensor:
        out_BD = super().run(block, hidden_BD, weights_BK)
        self._running = block + 1
        return out_BD

    def _slots(self, block: int) -> Tensor:
        self._side.join(self._marks.pop(block))
        return self._fetches[block].slot_N


class FetchAll(FetchOnDemand):
    """While a block runs, all experts of the next one are fetched, needed or not."""

    def __init__(self, memory: SlabMemory, blocks: BlockShape, side: SideStream) -> None:
        super().__init__(memory, blocks, side)
        device = memory.slots_SB.device
        self._fetches = [Fetch.empty(blocks.num_experts, device) for _ in blocks.first_slab]
        self._all = [
            torch.arange(first, first + blocks.num_experts, dtype=torch.int32, device=device)
            for first in blocks.first_slab
        ]
        self._mark: Any = None

    def _slots(self, block: int) -> Tensor:
        if block == 0:
            self._fetch(self._all[0], self._fetches[0], 0)
        else:
            self._side.join(self._mark)
        following = block + 1
        if following < len(self._all):
            with self._side.fork():
                self._fetch(self._all[following], self._fetches[following], 1)
                self._mark = self._side.mark()
        wanted_N = self._wanted[block]
        expert_N = (wanted_N - self._blocks.first_slab[block]).clamp_min(0)
        return self._fetches[block].slot_N.index_select(0, expert_N).masked_fill(wanted_N == DROPPED, DROPPED)


def make_experts(policy: Policy, memory: SlabMemory, blocks: BlockShape, side: SideStream) -> Resident:
    kinds = {
        Policy.gpu_only: Resident,
        Policy.on_demand: FetchOnDemand,
        Policy.pre_gated: FetchAhead,
        Policy.prefetch_all: FetchAll,
    }
    return kinds[policy](memory, blocks, side)
