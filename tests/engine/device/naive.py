"""What slot table, gather and experts are held to: the same rules, written from their descriptions as loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pregate.engine.device.slots import DeviceSlots, Fetch


class NaiveTable:
    """A slot table as a dictionary and the history of what was wanted."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slab_in: dict[int, int] = {}
        self.history: list[set[int]] = []
        self.hits = self.misses = self.evictions = self.errors = 0

    def slot_of(self, slab: int) -> int:
        return next((slot for slot, held in self.slab_in.items() if held == slab), -1)

    def last_wanted(self, slab: int) -> int:
        return next((n for n in reversed(range(len(self.history))) if slab in self.history[n]), -1)

    def fetch(self, wanted: Sequence[int], keep: bool, protected_fetches: int) -> tuple[list[int], list[tuple]]:
        """The slot of each choice, and the (slab, slot) pairs to copy."""
        distinct = list(dict.fromkeys(slab for slab in wanted if slab >= 0))
        before = self.history[len(self.history) - protected_fetches :] if protected_fetches else []
        protected = set(distinct).union(*before)
        self.history.append(set(distinct))
        copies = []
        for slab in distinct:
            if self.slot_of(slab) >= 0:
                self.hits += keep
                if not keep:
                    copies.append((slab, self.slot_of(slab)))
                continue
            slot = self._room(protected)
            if slot is None:
                self.errors += 1
                continue
            self.evictions += slot in self.slab_in
            self.slab_in[slot] = slab
            copies.append((slab, slot))
        self.misses += len(copies)
        return [self.slot_of(slab) if slab >= 0 else -1 for slab in wanted], copies

    def _room(self, protected: set[int]) -> int | None:
        for slot in range(self.num_slots):
            if slot not in self.slab_in:
                return slot
        victims = [(self.last_wanted(held), slot) for slot, held in self.slab_in.items() if held not in protected]
        return min(victims)[1] if victims else None


def random_wanted(generator: torch.Generator, num_slabs: int, num_choices: int, *, step: int, blocks: int) -> Tensor:
    """Choices of one block after the other, some dropped, some repeated; now and then of any block at all."""
    per_block = num_slabs // blocks
    wanted_N = torch.randint(per_block, (num_choices,), generator=generator) + step % blocks * per_block
    odd = torch.rand(num_choices, generator=generator)
    anything_N = torch.randint(num_slabs, (num_choices,), generator=generator)
    wanted_N = torch.where(odd < 0.05, anything_N, wanted_N)
    return torch.where(odd > 0.9, -1, wanted_N).int()


def assert_tables_equal(one: tuple[DeviceSlots, Fetch], other: tuple[DeviceSlots, Fetch], note: object = "") -> None:
    for mine, theirs in zip(one, other, strict=True):
        for name, value in mine._asdict().items():
            expected = getattr(theirs, name)
            assert torch.equal(value.cpu(), expected.cpu()), f"{note} {name}\n{value}\n{expected}"


def assert_consistent(table: DeviceSlots) -> None:
    """Each map is the other's inverse."""
    held = {slot: slab for slot, slab in enumerate(table.slab_in_S.tolist()) if slab >= 0}
    placed = {slot: slab for slab, slot in enumerate(table.slot_of_G.tolist()) if slot >= 0}
    assert held == placed, f"{held}\n{placed}"
