"""How fast slabs come: the bandwidth of a store as an engine reads it, and files that the page cache has forgotten.

Knows stores, CUDA copies and the page cache; knows nothing about models or policies. GB are powers of 1000.
"""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.engine.io.base import Mover, Transfer
from pregate.engine.io.choose import make_mover
from pregate.engine.storage.memory import aligned_bytes
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.models.family import ExpertKey

PROBE_SECONDS = 1.0
"""Long enough for a disk to show more than its mood, short beside the requests it stands next to."""
COPY_SECONDS = 0.2
"""A link is steadier."""
COPIES_AT_ONCE = 16


def link_bandwidth(
    store: Store,
    keys: list[ExpertKey],
    device: torch.device,
    io_threads: int,
    io_uring: bool = True,
    seed: int = 0,
    in_order: bool = False,
) -> float:
    """GB/s of whole slabs chosen at random, or `in_order`, one behind the other, as `prefetch_all` wants them.

    Copies to a CUDA device where the slabs lie in host memory; else reads into host memory as an engine with these
    settings does them, `io_threads` slabs under way.
    """
    if device.type == "cuda" and store.in_host_memory:
        return _copy_bandwidth(store, keys, device, seed)
    with slab_stream(store, keys, io_threads, io_uring, seed, in_order) as stream:
        stream.wait_for_one()
        begun, before = time.perf_counter(), stream.num_arrived
        while time.perf_counter() - begun < PROBE_SECONDS:
            stream.wait_for_one()
        num_bytes = (stream.num_arrived - before) * store.layout.slab_bytes
        return num_bytes / (time.perf_counter() - begun) / 1e9


class SlabStream:
    """Slabs without an end on their way into a few slots in host memory."""

    def __init__(self, mover: Mover, slots_NB: Tensor, keys: Iterator[ExpertKey]) -> None:
        self._mover, self._keys = mover, keys
        self.num_arrived = 0
        self._under_way = deque((slot_B, self._start(slot_B)) for slot_B in slots_NB)

    def _start(self, slot_B: Tensor) -> Transfer:
        return self._mover.start(next(self._keys), slot_B)

    def wait_for_one(self) -> None:
        slot_B, transfer = self._under_way.popleft()
        transfer.wait()
        self.num_arrived += 1
        self._under_way.append((slot_B, self._start(slot_B)))

    def go_on(self) -> None:
        """Start further slabs in the place of those that have arrived; without waiting."""
        for _ in range(len(self._under_way)):
            if not self._under_way[0][1].done():
                return
            self.wait_for_one()


@contextmanager
def _cpu_mover(store: Store, num_slots: int, io_threads: int, io_uring: bool) -> Iterator[tuple[Mover, Tensor]]:
    """The mover that an engine on a CPU would use, and its slots_NB."""
    slots_NB = aligned_bytes(num_slots * store.layout.slab_bytes).view(num_slots, -1)
    mover = make_mover(store, Trace(torch.device("cpu")), Counters(), io_threads, slots_NB, io_uring=io_uring)
    try:
        yield mover, slots_NB
    finally:
        mover.close()


@contextmanager
def slab_stream(
    store: Store,
    keys: list[ExpertKey],
    io_threads: int,
    io_uring: bool = True,
    seed: int = 0,
    in_order: bool = False,
) -> Iterator[SlabStream]:
    """A stream through the mover that an engine on a CPU would use; twice as many are asked for as are in flight. Where
    no order is wanted, blocks drawn at random give all their slabs, shuffled: only those of one block are in flight
    together."""
    draw = random.Random(seed)
    first = draw.randrange(len(keys))
    order = cycle(keys[first:] + keys[:first]) if in_order else _block_by_block(keys, draw)
    with _cpu_mover(store, 2 * io_threads, io_threads, io_uring) as (mover, slots_NB):
        yield SlabStream(mover, slots_NB, order)


@contextmanager
def lone_slabs(
    store: Store, keys: list[ExpertKey], io_threads: int, io_uring: bool = True
) -> Iterator[Callable[[], float]]:
    """A function that has one slab come from the store, as fetching on demand does, and gives the seconds it waited."""
    draw = random.Random(0)
    with _cpu_mover(store, 1, io_threads, io_uring) as (mover, slots_NB):

        def fetch() -> float:
            transfer = mover.start(draw.choice(keys), slots_NB[0])
            began = time.perf_counter()
            transfer.wait()
            return time.perf_counter() - began

        yield fetch


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


# --- the page cache -------------------------------------------------------------------------------------------------


def drop_page_cache(folder: Path) -> None:
    """Have the page cache forget every file of `folder`, where the system can be asked to. What is not yet written
    to the disk, or is mapped, stays: see `cached_share`."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fill_page_cache(folder: Path) -> None:
    """Read every file of `folder` once."""
    buffer = bytearray(8 << 20)
    for file in _files(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def cached_share(folder: Path) -> float | None:
    """The share of the bytes of `folder` that the page cache holds; None where the system does not say."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        cached, total = 0, 0
        for file in _files(folder):
            pages = _resident_pages(libc, file)
            cached += sum(pages)
            total += len(pages)
    except (OSError, AttributeError, TypeError):
        return None
    return cached / total if total else None


def _resident_pages(libc: Any, file: Path) -> bytes:
    """One byte a page of `file`, 1 if it is in memory (mincore)."""
    size, prot_read, map_shared = file.stat().st_size, 1, 1
    if size == 0:
        return b""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, prot_read, map_shared, descriptor, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"{file} cannot be mapped")
        try:
            found = ctypes.create_string_buffer(-(-size // os.sysconf("SC_PAGE_SIZE")))
            if libc.mincore(address, size, found) != 0:
                raise OSError(ctypes.get_errno(), f"the pages of {file} cannot be counted")
        finally:
            libc.munmap(address, size)
    finally:
        os.close(descriptor)
    return bytes(byte & 1 for byte in found.raw)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.is_file() and not file.is_symlink())
