"""Computing with slabs that come and go: the scheduler of slots, and the module that stands in for resident experts.

Only the thread that computes touches the scheduler; movers merely fill the slots they were given. Knows nothing
about model families beyond `ExpertFamily`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pregate.engine.cache import SlotTable
from pregate.engine.mover import Mover, Transfer, label
from pregate.engine.policy import MovePolicy
from pregate.engine.store import SlabLayout
from pregate.engine.trace import Counters, Trace
from pregate.models.adapter import ExpertFamily, ExpertKey
from pregate.models.moe import combine, group_by_expert
from pregate.models.routing import DROPPED, Routing


class Scheduler:
    """Decides which slot each announced slab gets and when. Requests wait in a queue while no slot is free.

    With one slot or more every block can run: what runs now comes first and may take a slot from a later block's
    prefetched slab, which is then fetched again.
    """

    def __init__(
        self, slots_NB: Tensor, layout: SlabLayout, table: SlotTable, mover: Mover, trace: Trace, counters: Counters
    ) -> None:
        assert slots_NB.shape == (table.num_slots, layout.slab_bytes)
        self._slots = slots_NB
        self._views = [layout.views(slots_NB[slot]) for slot in range(table.num_slots)]
        self._table, self._mover, self._trace, self._counters = table, mover, trace, counters
        self._queue: deque[ExpertKey] = deque()
        self._transfers: dict[int, Transfer] = {}

    def request(self, keys: Iterable[ExpertKey], urgent: bool = False) -> None:
        """Announce that `keys` will be used. `urgent` puts them before everything announced earlier."""
        waiting = []
        for key in keys:
            if key in self._queue:
                if urgent:
                    self._queue.remove(key)
                    waiting.append(key)
            elif self._table.find(key) is None:
                waiting.append(key)
            elif not self._table.is_reserved(key):
                self._counters.hits += 1
                self._table.reserve(key)
        if urgent:
            self._queue.extendleft(reversed(waiting))
        else:
            self._queue.extend(waiting)
        self._pump()

    def is_ready(self, key: ExpertKey) -> bool:
        slot = self._table.find(key)
        return slot is not None and (slot not in self._transfers or self._transfers[slot].done())

    def is_placed(self, key: ExpertKey) -> bool:
        return self._table.find(key) is not None

    def acquire(self, key: ExpertKey) -> list[Tensor]:
        """The matrices of an announced slab, there and safe from reuse until `release`; waits if it must."""
        if self._table.find(key) is None:
            if key in self._queue:
                self._queue.remove(key)
            slot = self._table.place(key)
            if slot is None:
                slot, loser = self._table.steal(key)
                self._counters.evictions += 1
                self._queue.append(loser)
            self._load(slot, key)
        slot = self._table.pin(key)
        self._arrive(slot, label(key))
        return self._views[slot]

    def release(self, key: ExpertKey) -> None:
        """The computation with `key` has been submitted; its slot may be reused behind it."""
        slot = self._table.find(key)
        assert slot is not None
        self._mover.used(self._slots[slot])
        self._table.release(key)
        self._pump()

    def finish_block(self, stack: str, block: int) -> None:
        """Call off what was announced for a block that has run. What is already moving arrives first."""
        self._queue = deque(key for key in self._queue if (key.stack, key.block) != (stack, block))
        for key in self._table.reserved_keys():
            if (key.stack, key.block) == (stack, block):
                slot = self._table.find(key)
                assert slot is not None
                self._arrive(slot, label(key))
                self._table.release(key)
        self._pump()

    def settle(self) -> None:
        """Call everything off, wait for what is moving, and drop slabs whose transfer failed. Never raises."""
        self._queue.clear()
        for key in self._table.resident_keys():
            slot = self._table.find(key)
            assert slot is not None
            transfer = self._transfers.pop(slot, None)
            try:
                if transfer is not None:
                    transfer.wait()
            except BaseException:
                self._table.drop(key)
                continue
            if self._table.is_reserved(key):
                self._mover.used(self._slots[slot])
                self._table.release(key)

    def _pump(self) -> None:
        while self._queue:
            key = self._queue[0]
            slot = self._table.place(key)
            if slot is None:
                return
            self._queue.popleft()
            self._load(slot, key)

    def _load(self, slot: int, key: ExpertKey) -> None:
        earlier = self._transfers.pop(slot, None)
        try:
            if earlier is not None:
                earlier.wait()
            self._transfers[slot] = self._mover.start(key, self._slots[slot])
        except BaseException:
            self._table.drop(key)
            raise
        self._counters.misses += 1

    def _arrive(self, slot: int, name: str) -> None:
        transfer = self._transfers.get(slot)
        if transfer is None:
            return
        if transfer.done():
            transfer.wait()
        else:
            with self._trace.span("wait", name):
                transfer.wait()
        self._transfers.pop(slot, None)


class OffloadedExperts(nn.Module):
    """Stands in for a block's resident experts: same call, same arithmetic, slabs from slots."""

    def __init__(
        self,
        family: ExpertFamily,
        stack: str,
        block: int,
        scheduler: Scheduler,
        policy: MovePolicy,
        trace: Trace,
    ) -> None:
        super().__init__()
        self._family, self._scheduler, self._policy, self._trace = family, scheduler, policy, trace
        self._stack, self._block = stack, block

    def forward(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        grouping = group_by_expert(expert_ids_TK)
        scheduler = self._scheduler
        runs = {ExpertKey(self._stack, self._block, e): (first, last) for e, first, last in grouping.groups}
        scheduler.request(runs, urgent=True)
        scheduler.request(self._policy.on_enter(self._stack, self._block))
        if not runs:
            scheduler.finish_block(self._stack, self._block)
            return torch.zeros_like(hidden_TD)
        gathered_ND = hidden_TD[grouping.order // weights_TK.shape[1]]
        results: dict[ExpertKey, Tensor] = {}
        for key in self._in_order_of_arrival(list(runs)):
            first, last = runs[key]
            matrices = scheduler.acquire(key)
            with self._trace.span("compute", label(key)):
                results[key] = self._family.apply(matrices, gathered_ND[first:last])
            scheduler.release(key)
        scheduler.finish_block(self._stack, self._block)
        result_ND = torch.cat([results[key] for key in runs])
        return combine(result_ND, grouping, weights_TK, hidden_TD)

    def _in_order_of_arrival(self, keys: list[ExpertKey]) -> Iterable[ExpertKey]:
        """Slabs that are here first, then those under way, then those still waiting for a slot."""
        while keys:
            ready = next((key for key in keys if self._scheduler.is_ready(key)), None)
            coming = next((key for key in keys if self._scheduler.is_placed(key)), None)
            key = ready or coming or keys[0]
            keys.remove(key)
            yield key


def routed_experts(routing: Routing) -> Sequence[int]:
    """The ids a route uses, by how many tokens they serve, most first."""
    ids, counts = routing.expert_ids_BTK[routing.expert_ids_BTK != DROPPED].unique(return_counts=True)
    return ids[counts.argsort(descending=True, stable=True)].tolist()
