"""How fast slabs come from a store, by the mover that an engine would use, and how fast cores read host memory. GB are
powers of 1000.

Knows stores, movers and CUDA copies; knows nothing about models or policies.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from pregate.engine.io.base import Move, Mover, Transfer
from pregate.engine.io.make_mover import make_mover
from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertKey

PROBE_SECONDS = 1.0
"""Long enough for a disk to show more than its mood, short beside the requests it stands next to."""
COPY_SECONDS = 0.2
"""A link is steadier."""
COPIES_AT_ONCE = 16
HOST_BYTES = 256 << 20
"""More than the caches of a CPU hold."""


@dataclass(frozen=True)
class Reading:
    """How slabs come from a disk; see `OffloadEngine.open`."""

    io_threads: int = 2
    io_uring: bool = True


@dataclass(frozen=True)
class Ground:
    """What rows are served from: an opened store, the compute device, and how the store is read."""

    store: Store
    device: torch.device
    reading: Reading = Reading()

    def gb_per_s(self, keys: list[ExpertKey], seed: int = 0, in_order: bool = False) -> float:
        """GB/s of whole slabs chosen at random, or `in_order`, one behind the other, as `prefetch_all` wants them.

        Copies to a CUDA device where the slabs lie in host memory; else reads into host memory as an engine with these
        settings does them, `io_threads` slabs under way.
        """
        if self.device.type == "cuda" and self.store.in_host_memory:
            return _copy_bandwidth(self.store, keys, self.device, seed)
        with self.stream(keys, seed, in_order) as stream:
            stream.wait_for_one()
            begun, before = time.perf_counter(), stream.num_arrived
            while time.perf_counter() - begun < PROBE_SECONDS:
                stream.wait_for_one()
            num_bytes = (stream.num_arrived - before) * self.store.layout.slab_bytes
            return num_bytes / (time.perf_counter() - begun) / 1e9

    @contextmanager
    def stream(self, keys: list[ExpertKey], seed: int = 0, in_order: bool = False) -> Iterator[SlabStream]:
        """Slabs without an end, into host memory; twice as many are asked for as are in flight. Where no order is
        wanted, blocks drawn at random give all their slabs, shuffled: only those of one block are in flight together.
        """
        draw = random.Random(seed)
        first = draw.randrange(len(keys))
        order = cycle(keys[first:] + keys[:first]) if in_order else _block_by_block(keys, draw)
        io_threads, io_uring = self.reading.io_threads, self.reading.io_uring and self.device.type == "cpu"
        slots_NB = aligned_bytes(2 * io_threads * self.store.layout.slab_bytes).view(2 * io_threads, -1)
        trace = Trace(torch.device("cpu"))
        mover = make_mover(self.store, trace, Counters(), io_threads, slots_NB, io_uring=io_uring)
        try:
            yield SlabStream(mover, slots_NB, order)
        finally:
            mover.close()

    @contextmanager
    def busy(self, keys: list[ExpertKey]) -> Iterator[Callable[[], int]]:
        """While it lasts, slabs come without an end beside what the caller computes; a function counts their bytes."""
        stopped = threading.Event()
        with self.stream(keys) as stream:

            def keep_going() -> None:
                while not stopped.is_set():
                    stream.wait_for_one()

            thread = threading.Thread(target=keep_going, daemon=True)
            thread.start()
            try:
                yield lambda: stream.num_arrived * self.store.layout.slab_bytes
            finally:
                stopped.set()
                thread.join()


class SlabStream:
    """Slabs without an end on their way into a few slots in host memory."""

    def __init__(self, mover: Mover, slots_NB: Tensor, keys: Iterator[ExpertKey]) -> None:
        self._mover, self._keys = mover, keys
        self.num_arrived = 0
        self._under_way = deque((slot_B, self._start(slot_B)) for slot_B in slots_NB)

    def _start(self, slot_B: Tensor) -> Transfer:
        return self._mover.start([Move(next(self._keys), slot_B)])[0]

    def wait_for_one(self) -> None:
        slot_B, transfer = self._under_way.popleft()
        transfer.wait()
        self.num_arrived += 1
        self._under_way.append((slot_B, self._start(slot_B)))


def host_gb_per_s() -> float:
    """GB/s at which the cores that torch uses read host memory; of several passes the fastest, because a shared machine
    only ever slows."""
    numbers = torch.ones(HOST_BYTES // torch.float32.itemsize)
    passes, begun = [], time.perf_counter()
    while not passes or time.perf_counter() - begun < COPY_SECONDS:
        start = time.perf_counter()
        numbers.sum()
        passes.append(time.perf_counter() - start)
    return numbers.nbytes / min(passes) / 1e9


def _block_by_block(keys: list[ExpertKey], draw: random.Random) -> Iterator[ExpertKey]:
    blocks: dict[tuple[str, int], list[ExpertKey]] = {}
    for key in keys:
        blocks.setdefault((key.stack, key.block), []).append(key)
    while True:
        block = draw.choice(list(blocks.values()))
        yield from draw.sample(block, len(block))


def _copy_bandwidth(store: Store, keys: list[ExpertKey], device: torch.device, seed: int) -> float:
    draw, size = random.Random(seed), store.layout.slab_bytes
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    stream: Any = torch.cuda.Stream(device)
    elapsed_ms, num_slabs = 0.0, 0
    while elapsed_ms < COPY_SECONDS * 1e3:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            begin.record(stream)
            for key in draw.choices(keys, k=COPIES_AT_ONCE):
                slab = store.slab(key)
                assert slab is not None, "a store in host memory gives its slabs"
                buffer.copy_(slab, non_blocking=True)
            end.record(stream)
        end.synchronize()
        elapsed_ms += begin.elapsed_time(end)
        num_slabs += COPIES_AT_ONCE
    return num_slabs * size / elapsed_ms / 1e6
