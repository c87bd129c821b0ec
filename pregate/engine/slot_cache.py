"""Which slab is in which slot, which slots may be reused, and in which order. Pure bookkeeping, no tensors.

A slot is free, or it holds a slab. A slab may be *reserved* (announced, its use is still to come) and *pinned*
(being computed with); else it is *idle*, kept only in case it is needed again. A pinned slot is never reused; a
reserved one only when a block that must run now finds no other.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from pregate.config import CacheRule
from pregate.models.experts import ExpertKey


class Placed(NamedTuple):
    """A slot given to a slab, and the slab that had to leave it."""

    slot: int
    evicted: ExpertKey | None


class SlotTable:
    """The map between slots and slabs.

    `rule` says which idle slab leaves first: `lru` the one unused for longest, `lfu` the one used least often so far
    (of those, the one unused for longest), `lifo` the one that came last. With `none` a slab leaves as soon as it is
    used, as in the paper's engine without a cache.
    """

    def __init__(self, num_slots: int, rule: CacheRule) -> None:
        assert num_slots > 0
        self.num_slots = num_slots
        self._rule = rule
        self._uses: Counter[ExpertKey] = Counter()
        self._clock = 0
        self.clear()

    def clear(self) -> None:
        """Forget what every slot holds; all are free."""
        self._slot_of: dict[ExpertKey, int] = {}
        self._key_in: list[ExpertKey | None] = [None] * self.num_slots
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._reserved: dict[int, None] = {}
        self._pinned: set[int] = set()
        self._idle: dict[int, None] = {}
        self._came: list[int] = [0] * self.num_slots

    def find(self, key: ExpertKey) -> int | None:
        return self._slot_of.get(key)

    def is_reserved(self, key: ExpertKey) -> bool:
        slot = self._slot_of.get(key)
        return slot is not None and (slot in self._reserved or slot in self._pinned)

    def place(self, key: ExpertKey) -> Placed | None:
        """Give `key` a slot that is free or idle and reserve it; None if there is none. The slab is not there yet."""
        assert key not in self._slot_of
        evicted = None
        if self._free:
            slot = self._free.pop()
        elif self._idle:
            slot = self._victim()
            evicted = self._key_in[slot]
            self._forget(slot)
        else:
            return None
        self._assign(slot, key)
        return Placed(slot, evicted)

    def steal(self, key: ExpertKey) -> Placed:
        """Give `key` the slot whose announced use is farthest away."""
        slot = next(slot for slot in reversed(self._reserved) if slot not in self._pinned)
        loser = self._key_in[slot]
        self._forget(slot)
        self._assign(slot, key)
        return Placed(slot, loser)

    def reserve(self, key: ExpertKey) -> None:
        slot = self._slot_of[key]
        self._idle.pop(slot, None)
        self._reserved.setdefault(slot)

    def pin(self, key: ExpertKey) -> int:
        slot = self._slot_of[key]
        self._idle.pop(slot, None)
        self._reserved.pop(slot, None)
        self._pinned.add(slot)
        self._uses[key] += 1
        return slot

    def release(self, key: ExpertKey) -> None:
        """The slab's use is over, or was called off."""
        slot = self._slot_of[key]
        self._pinned.discard(slot)
        self._reserved.pop(slot, None)
        if self._rule is CacheRule.none:
            self._forget(slot)
            self._free.append(slot)
        else:
            self._idle.pop(slot, None)
            self._idle[slot] = None

    def reserved_keys(self) -> list[ExpertKey]:
        return [key for slot in self._reserved if (key := self._key_in[slot]) is not None]

    def _victim(self) -> int:
        """`_idle` is ordered by the end of the last use."""
        if self._rule is CacheRule.lfu:
            return min(self._idle, key=lambda slot: self._uses[self._held(slot)])
        if self._rule is CacheRule.lifo:
            return max(self._idle, key=self._came.__getitem__)
        return next(iter(self._idle))

    def _held(self, slot: int) -> ExpertKey:
        key = self._key_in[slot]
        assert key is not None
        return key

    def _assign(self, slot: int, key: ExpertKey) -> None:
        self._clock += 1
        self._came[slot] = self._clock
        self._slot_of[key] = slot
        self._key_in[slot] = key
        self._reserved[slot] = None

    def _forget(self, slot: int) -> None:
        assert slot not in self._pinned
        del self._slot_of[self._held(slot)]
        self._key_in[slot] = None
        self._reserved.pop(slot, None)
        self._idle.pop(slot, None)
