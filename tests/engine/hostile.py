"""As unfriendly as the contracts allow: stores that take their time and leave garbage, slots that lose what they held.

What an engine computes before a slab has arrived, or after its slot was given away, comes out as NaN here.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from pregate.engine.engine import OffloadEngine
from pregate.engine.io.base import Move
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes, copy_bytes
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.storage.store import Store
from pregate.models.experts import ExpertKey

POISON = 0xFF
"""NaN in float32, bfloat16, float16 and fp8; -1 in int8, whose scales are float32."""

BeforeRead = Callable[[int, ExpertKey], None]


class HostileStore(Store):
    """Reads in pieces of its own choosing, last piece first or first, sleeping in between, over a poisoned target.

    before_read: called with the number of reads begun so far and the expert, before each; may raise. withhold:
    leave the poison where the data should go. most_s: the longest of its sleeps.
    """

    in_host_memory = False

    def __init__(
        self,
        store: Store,
        seed: int = 0,
        most_s: float = 0.001,
        before_read: BeforeRead | None = None,
        withhold: bool = False,
    ) -> None:
        self.store, self.layout, self.made_from = store, store.layout, store.made_from
        self.before_read, self.withhold = before_read, withhold
        self.num_reads = 0
        self._draw, self._most_s = random.Random(seed), most_s
        self._lock = threading.Lock()

    def read_part(self, key: ExpertKey, slab_B: Tensor, first: int, last: int) -> None:
        with self._lock:
            self.num_reads += 1
            number = self.num_reads - 1
            cut = self._draw.randrange(first // PAGE, last // PAGE) * PAGE
            pieces = [(first, cut), (cut, last)]
            self._draw.shuffle(pieces)
            sleeps = [self._draw.choice([0.0, 0.0, 0.3, 1.0]) * self._most_s for _ in pieces]
        slab_B[first:last].fill_(POISON)
        if self.before_read is not None:
            self.before_read(number, key)
        for (begin, end), sleep in zip(pieces, sleeps, strict=True):
            time.sleep(sleep)
            if begin < end and not self.withhold:
                self.store.read_part(key, slab_B, begin, end)

    def arrived(self, key: ExpertKey, slab_B: Tensor) -> None:
        if not self.withhold:
            self.store.arrived(key, slab_B)

    def slab(self, key: ExpertKey) -> None:
        return None

    def close(self) -> None:
        self.store.close()


class HostileRing:
    """The kernel's reads as they could be: in pieces, told late, and in another order than asked for.

    Wraps the ring of an engine's mover. A piece is a whole number of pages; what has ended is kept back for a few
    calls of `completed` unless the engine waits for it.
    """

    def __init__(self, engine: OffloadEngine, seed: int = 0) -> None:
        mover: Any = engine.host.mover
        self._ring, mover._ring = mover._ring, self
        self._draw, self._kept = random.Random(seed), []
        self.num_pieces = 0

    def read(self, number: int, file: int, offset: int, address: int, length: int, piece: int) -> None:
        self.num_pieces += 1
        pages = self._draw.randint(1, length // PAGE) if self._draw.random() < 0.5 else length // PAGE
        self._ring.read(number, file, offset, address, pages * PAGE, piece)

    def submit(self) -> None:
        self._ring.submit()

    def completed(self) -> list[tuple[int, int]]:
        self._kept += self._ring.completed()
        self._draw.shuffle(self._kept)
        return [self._kept.pop() for _ in range(len(self._kept)) if self._draw.random() < 0.3]

    def wait(self) -> None:
        if not self._kept:
            self._ring.wait()

    def settle(self) -> None:
        self._ring.settle()
        self._kept.clear()

    def close(self) -> None:
        self._ring.close()


class MemoryStore(Store):
    """Slabs made from given matrices; for experts that belong to no checkpoint."""

    in_host_memory, made_from = False, None

    def __init__(self, layout: SlabLayout, experts: Mapping[ExpertKey, Sequence[Tensor]]) -> None:
        self.layout = layout
        self.slabs = {key: aligned_bytes(layout.slab_bytes) for key in experts}
        for key, matrices in experts.items():
            layout.encode(matrices, self.slabs[key])

    def read_part(self, key: ExpertKey, slab_B: Tensor, first: int, last: int) -> None:
        copy_bytes(self.slabs[key][first:last], slab_B[first:last])

    def arrived(self, key: ExpertKey, slab_B: Tensor) -> None:
        return None

    def slab(self, key: ExpertKey) -> None:
        return None

    def close(self) -> None:
        self.slabs.clear()


def poison_slots(engine: OffloadEngine) -> None:
    """From now on a slot loses what it held at the moment that a transfer into it is started."""
    mover: Any = engine.host.mover
    start = mover.start

    def poisoned_start(moves: Sequence[Move]) -> Any:
        for _, slot in moves:
            slot.fill_(POISON)
            mover.used(slot)  # on a GPU the copy must come behind the poison
        return start(moves)

    mover.start = poisoned_start


class Streamer:
    """Calls `put` with every token, as transformers' own streamers are called."""

    def __init__(self, put: Callable[[Tensor], None]) -> None:
        self.put = put

    def end(self) -> None:
        return None


@contextmanager
def interrupted_expert(engine: OffloadEngine, error: BaseException) -> Iterator[None]:
    """The seventh expert that is computed raises `error`."""
    blocks = [block.module.experts for block in engine.model.moe_blocks()]
    family, calls = engine.family, iter(range(1_000_000))

    def apply(matrices: Any, hidden_ND: Tensor) -> Tensor:
        if next(calls) == 6:
            raise error
        return family.apply(matrices, hidden_ND)

    for experts in blocks:
        experts._family = replace(family, apply=apply)
    try:
        yield
    finally:
        for experts in blocks:
            experts._family = family
