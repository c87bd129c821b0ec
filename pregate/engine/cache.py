"""Which slab is in which slot, which slots may be reused, and in which order. Pure bookkeeping, no tensors.

A slot is free, or it holds a slab. A slab may be *reserved* (announced, its use is still to come) and *pinned*
(being computed with). A pinned slot is never reused; a reserved one only when a block that must run now finds no
other.
"""

from __future__ import annotations

from pregate.models.adapter import ExpertKey


class SlotTable:
    """The map between slots and slabs. `keep`: after use a slab stays until its slot is needed (least recently used
    first); without it the slot is free again at once, as in the paper's engine without a cache."""

    def __init__(self, num_slots: int, keep: bool) -> None:
        assert num_slots > 0
        self.num_slots = num_slots
        self._keep = keep
        self._slot_of: dict[ExpertKey, int] = {}
        self._key_in: list[ExpertKey | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._reserved: dict[int, None] = {}
        self._pinned: set[int] = set()
        self._idle: dict[int, None] = {}

    def find(self, key: ExpertKey) -> int | None:
        return self._slot_of.get(key)

    def is_reserved(self, key: ExpertKey) -> bool:
        slot = self._slot_of.get(key)
        return slot is not None and (slot in self._reserved or slot in self._pinned)

    def place(self, key: ExpertKey) -> int | None:
        """Give `key` a slot that is free or idle and reserve it; None if there is none. The slab is not there yet."""
        assert key not in self._slot_of
        if self._free:
            slot = self._free.pop()
        elif self._idle:
            slot = next(iter(self._idle))
            self._forget(slot)
        else:
            return None
        self._assign(slot, key)
        return slot

    def steal(self, key: ExpertKey) -> tuple[int, ExpertKey]:
        """Give `key` the slot whose announced use is farthest away; returns it and the slab that lost it."""
        slot = next(slot for slot in reversed(self._reserved) if slot not in self._pinned)
        loser = self._key_in[slot]
        assert loser is not None
        self._forget(slot)
        self._assign(slot, key)
        return slot, loser

    def reserve(self, key: ExpertKey) -> None:
        slot = self._slot_of[key]
        self._idle.pop(slot, None)
        self._reserved.setdefault(slot)

    def pin(self, key: ExpertKey) -> int:
        slot = self._slot_of[key]
        self._idle.pop(slot, None)
        self._reserved.pop(slot, None)
        self._pinned.add(slot)
        return slot

    def release(self, key: ExpertKey) -> None:
        """The slab's use is over, or was called off."""
        slot = self._slot_of[key]
        self._pinned.discard(slot)
        self._reserved.pop(slot, None)
        if self._keep:
            self._idle[slot] = None
        else:
            self._forget(slot)
            self._free.append(slot)

    def drop(self, key: ExpertKey) -> None:
        """Forget a slab whose bytes cannot be trusted; its slot is free again."""
        slot = self._slot_of[key]
        self._pinned.discard(slot)
        self._forget(slot)
        self._free.append(slot)

    def reserved_keys(self) -> list[ExpertKey]:
        return [key for slot in self._reserved if (key := self._key_in[slot]) is not None]

    def resident_keys(self) -> list[ExpertKey]:
        return list(self._slot_of)

    def _assign(self, slot: int, key: ExpertKey) -> None:
        self._slot_of[key] = slot
        self._key_in[slot] = key
        self._reserved[slot] = None

    def _forget(self, slot: int) -> None:
        key = self._key_in[slot]
        assert key is not None and slot not in self._pinned
        del self._slot_of[key]
        self._key_in[slot] = None
        self._reserved.pop(slot, None)
        self._idle.pop(slot, None)
