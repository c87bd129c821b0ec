"""Reads by threads, and the mover for a compute device that is host memory, whose slots they read straight into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pregate.engine.io.base import Transfer
from pregate.engine.io.host_buffers import HostBuffer, HostBuffers
from pregate.engine.io.read_pool import ReadJob, ReadPool, parts_of
from pregate.engine.storage.memory import copy_bytes
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.models.pregating import ExpertKey


class SlabReader:
    """Reads slabs into given memory, or into host buffers, in parts on a pool of threads."""

    def __init__(self, store: Store, counters: Counters, num_threads: int, buffers: HostBuffers | None) -> None:
        self._store, self._counters, self._buffers = store, counters, buffers
        self._parts = parts_of(store.layout.slab_bytes)
        self._pool = ReadPool(num_threads)

    def read(self, key: ExpertKey, slot: Tensor, began: Callable[[], None], ended: Callable[[], Any]) -> ReadJob:
        """Straight into `slot`; `ended` gives the result."""

        def begin() -> list[Callable[[], None]]:
            began()
            self._counters.bytes_read += self._store.layout.slab_bytes
            return self._part_reads(key, slot)

        def finish() -> Any:
            self._store.arrived(key, slot)
            return ended()

        return self._pool.submit(ReadJob(begin, finish))

    def read_through(self, key: ExpertKey, began: Callable[[], None], deliver: Callable[[HostBuffer], Any]) -> ReadJob:
        """Into a host buffer, unless one holds the slab already; `deliver` hands it on and gives the result. What
        it leaves in `copied` is waited for before the buffer is filled again."""
        buffers = self._buffers
        assert buffers is not None
        held: list[tuple[HostBuffer, bool]] = []

        def begin() -> list[Callable[[], None]] | None:
            taken = buffers.take(key)
            if taken is None:
                return None
            held.append(taken)
            began()
            buffer, is_hit = taken
            if is_hit:
                self._counters.host_hits += 1
                return [lambda: None]
            self._counters.bytes_read += self._store.layout.slab_bytes
            return self._part_reads(key, buffer.memory, after=buffer.copied)

        def finish() -> Any:
            buffer, is_hit = held[0]
            if not is_hit:
                self._store.arrived(key, buffer.memory)
            result = deliver(buffer)
            buffers.give_back(buffer, key, buffer.copied)
            return result

        def failed() -> None:
            buffer, _ = held[0]
            buffers.give_back(buffer, None, buffer.copied)

        return self._pool.submit(ReadJob(begin, finish, failed))

    def _part_reads(self, key: ExpertKey, memory: Tensor, after: Any = None) -> list[Callable[[], None]]:
        def part(first: int, last: int) -> None:
            if after is not None:
                after.synchronize()
            self._store.read_part(key, memory, first, last)

        return [lambda first=first, last=last: part(first, last) for first, last in self._parts]

    def drain(self) -> None:
        self._pool.drain()

    def stop(self) -> None:
        """End the threads; what they were reading is there or has failed when this returns."""
        self._pool.close()

    def close(self) -> None:
        self._pool.close()
        if self._buffers is not None:
            self._buffers.close()


class ThreadMover:
    """For a compute device that is host memory: several reads in flight, each straight into its slot.

    With `host_buffers` slabs pass through a cache in host memory, as they do in front of a GPU.
    """

    reader = "threads"

    def __init__(self, store: Store, trace: Trace, counters: Counters, num_threads: int, host_buffers: int = 0) -> None:
        self._store, self._trace, self._counters = store, trace, counters
        slab_bytes = store.layout.slab_bytes
        buffers = HostBuffers(host_buffers, slab_bytes, page_locked=False) if host_buffers else None
        self.host_bytes = buffers.num_bytes if buffers else 0
        self._buffered = buffers is not None
        self._reader = SlabReader(store, counters, num_threads, buffers)

    def start(self, key: ExpertKey, slot: Tensor) -> Transfer:
        self._counters.bytes_moved += self._store.layout.slab_bytes
        times: list[Any] = []

        def began() -> None:
            times.append(self._trace.mark())

        def ended() -> None:
            if self._trace.enabled:
                self._trace.add("transfer", key.label, times[0], self._trace.mark())

        def deliver(buffer: HostBuffer) -> None:
            copy_bytes(buffer.memory, slot)
            ended()

        if self._buffered:
            return _JobTransfer(self._reader.read_through(key, began, deliver))
        return _JobTransfer(self._reader.read(key, slot, began, ended))

    def used(self, slot: Tensor) -> None:
        return None

    def drain(self) -> None:
        self._reader.drain()

    def close(self) -> None:
        self._reader.close()


class _JobTransfer:
    def __init__(self, job: ReadJob) -> None:
        self._job = job

    def done(self) -> bool:
        return self._job.done()

    def wait(self) -> None:
        self._job.result()
