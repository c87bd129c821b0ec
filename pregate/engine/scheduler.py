"""Which slot each announced slab gets, and when it starts to move.

Only the thread that computes touches the scheduler; movers merely fill the slots they were given. Slots are opaque to
it, so that the planner can run it against a clock instead of a device. Knows nothing about tensors, model families
or policies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pregate.engine.io.base import Move, Mover, Transfer
from pregate.engine.slot_cache import Placed, SlotTable
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertKey


class Scheduler:
    """Requests wait in a queue while no slot is free; those that find one go to the mover together.

    With one slot or more every block can run: what runs now comes first and may take a slot from a later block's
    prefetched slab, which is then fetched again.
    """

    def __init__(self, slots: Sequence[Any], table: SlotTable, mover: Mover, trace: Trace, counters: Counters) -> None:
        assert len(slots) == table.num_slots
        self._slots, self._table, self._mover = slots, table, mover
        self._trace, self._counters = trace, counters
        self._queue: OrderedDict[ExpertKey, None] = OrderedDict()
        self._transfers: dict[int, Transfer] = {}

    def request(self, keys: Iterable[ExpertKey], urgent: bool = False) -> None:
        """Announce that `keys` will be used. `urgent` puts them before everything announced earlier."""
        waiting = []
        for key in keys:
            if key in self._queue:
                if urgent:
                    waiting.append(key)
            elif self._table.find(key) is None:
                waiting.append(key)
            elif not self._table.is_reserved(key):
                self._counters.hits += 1
                self._table.reserve(key)
        self._queue.update(dict.fromkeys(waiting))
        for key in reversed(waiting) if urgent else ():
            self._queue.move_to_end(key, last=False)
        self._pump()

    def is_ready(self, key: ExpertKey) -> bool:
        """Whether computing with `key` now would not wait."""
        slot = self._table.find(key)
        return slot is not None and (slot not in self._transfers or self._transfers[slot].done())

    def is_placed(self, key: ExpertKey) -> bool:
        return self._table.find(key) is not None

    def slot_of(self, key: ExpertKey) -> int | None:
        """The number of the slot that holds `key` or is being filled with it."""
        return self._table.find(key)

    def in_order_of_arrival(self, keys: Sequence[ExpertKey]) -> Iterable[ExpertKey]:
        """Slabs that are here first, then those under way in the order they were requested in, then those still
        waiting for a slot."""
        late = []
        for key in keys:
            if self.is_ready(key):
                yield key
            else:
                late.append(key)
        while late:
            key = next((key for key in late if self.is_placed(key)), late[0])
            late.remove(key)
            yield key

    def acquire(self, key: ExpertKey) -> int:
        """The slot of an announced slab, there and safe from reuse until `release`; waits if it must."""
        if self._table.find(key) is None:
            self._queue.pop(key, None)
            placed = self._table.place(key)
            if placed is None:
                placed = self._table.steal(key)
                assert placed.evicted is not None
                self._queue[placed.evicted] = None
            self._load({key: placed})
        slot = self._table.pin(key)
        self._arrive(slot, key)
        return slot

    def release(self, key: ExpertKey) -> None:
        """The computation with `key` has been submitted; its slot may be reused behind it."""
        slot = self._table.find(key)
        assert slot is not None
        self._mover.used(self._slots[slot])
        self._table.release(key)
        self._pump()

    def finish_block(self, stack: str, block: int) -> None:
        """Call off what was announced for a block that has run. What is already moving arrives first."""
        for key in [key for key in self._queue if (key.stack, key.block) == (stack, block)]:
            del self._queue[key]
        for key in self._table.reserved_keys():
            if (key.stack, key.block) == (stack, block):
                slot = self._table.find(key)
                assert slot is not None
                self._arrive(slot, key)
                self._table.release(key)
        self._pump()

    def settle(self) -> None:
        """After a call that ended well: nothing is announced any more and nothing moves. What is there stays."""
        self._queue.clear()
        for key in self._table.reserved_keys():
            slot = self._table.find(key)
            assert slot is not None
            self._arrive(slot, key)
            self._mover.used(self._slots[slot])
            self._table.release(key)

    def reset(self) -> None:
        """After a call that was cut short anywhere: wait until nothing moves and forget what every slot holds.

        Bookkeeping that an interrupt left half done cannot be told from the rest, so none of it is kept.
        """
        self._queue.clear()
        self._mover.drain()
        self._transfers.clear()
        self._table.clear()

    def forget_slots(self) -> None:
        """For an engine that is closed, so that its memory is free though the engine is still referred to."""
        self._slots = ()

    def _pump(self) -> None:
        """As much of what waits as there are slots for begins to move, together."""
        placed: dict[ExpertKey, Placed] = {}
        while self._queue:
            key = next(iter(self._queue))
            place = self._table.place(key)
            if place is None:
                break
            del self._queue[key]
            placed[key] = place
        if placed:
            self._load(placed)

    def _load(self, placed: Mapping[ExpertKey, Placed]) -> None:
        for slot, evicted in placed.values():
            self._counters.evictions += evicted is not None
            earlier = self._transfers.pop(slot, None)
            if earlier is not None:
                earlier.wait()
        transfers = self._mover.start([Move(key, self._slots[slot]) for key, (slot, _) in placed.items()])
        for (slot, _), transfer in zip(placed.values(), transfers, strict=True):
            self._transfers[slot] = transfer
        self._counters.misses += len(placed)

    def _arrive(self, slot: int, key: ExpertKey) -> None:
        transfer = self._transfers.get(slot)
        if transfer is None:
            return
        if transfer.done():
            transfer.wait()
        else:
            with self._trace.span("wait", key.label):
                transfer.wait()
        self._transfers.pop(slot, None)
