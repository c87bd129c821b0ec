"""Reads by threads, and the mover for a compute device that is host memory, whose slots they read straight into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from pregate.engine.io.base import Move, Transfer
from pregate.engine.io.host_cache import HostBuffer, HostBuffers
from pregate.engine.io.read_pool import ReadJob, ReadPool, parts_of
from pregate.engine.storage.aligned_memory import copy_bytes
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertKey


class SlabReader:
    """Reads slabs in parts on a pool of threads: into host buffers where there are some, else straight into slots."""

    def __init__(self, store: Store, counters: Counters, num_threads: int, buffers: HostBuffers | None) -> None:
        self._store, self._counters, self._buffers = store, counters, buffers
        self._parts = parts_of(store.layout.slab_bytes)
        self._pool = ReadPool(num_threads)

    def job(
        self, key: ExpertKey, slot: Tensor, began: Callable[[], None], deliver: Callable[[HostBuffer], Any]
    ) -> ReadJob:
        """A read to `submit`. `deliver` takes the slab on from where it was read to, which without buffers is `slot`,
        and gives the result. What it leaves in `copied` is waited for before the buffer is filled again."""
        taken: list[tuple[HostBuffer, bool]] = []

        def begin() -> list[Callable[[], None]] | None:
            found = (HostBuffer(slot), False) if self._buffers is None else self._buffers.take(key)
            if found is None:
                return None
            taken.append(found)
            began()
            buffer, is_hit = found
            if is_hit:
                self._counters.host_hits += 1
                return [lambda: None]
            self._counters.bytes_read += self._store.layout.slab_bytes
            return self._part_reads(key, buffer)

        def finish() -> Any:
            buffer, is_hit = taken[0]
            if not is_hit:
                self._store.arrived(key, buffer.memory)
            result = deliver(buffer)
            self._give_back(buffer, key)
            return result

        return ReadJob(begin, finish, failed=lambda: self._give_back(taken[0][0], None))

    def submit(self, jobs: Sequence[ReadJob]) -> None:
        self._pool.submit(jobs)

    def _give_back(self, buffer: HostBuffer, key: ExpertKey | None) -> None:
        if self._buffers is not None:
            self._buffers.give_back(buffer, key)

    def _part_reads(self, key: ExpertKey, buffer: HostBuffer) -> list[Callable[[], None]]:
        copied = buffer.copied

        def part(first: int, last: int) -> None:
            if copied is not None:
                copied.synchronize()
            self._store.read_part(key, buffer.memory, first, last)

        return [partial(part, first, last) for first, last in self._parts]

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
        buffers = HostBuffers(host_buffers, store.layout.slab_bytes, page_locked=False) if host_buffers else None
        self.host_bytes = buffers.num_bytes if buffers else 0
        self._reader = SlabReader(store, counters, num_threads, buffers)

    def start(self, moves: Sequence[Move]) -> list[Transfer]:
        self._counters.bytes_moved += len(moves) * self._store.layout.slab_bytes
        jobs = [self._job(*move) for move in moves]
        self._reader.submit(jobs)
        return [_JobTransfer(job) for job in jobs]

    def _job(self, key: ExpertKey, slot: Tensor) -> ReadJob:
        times: list[Any] = []

        def deliver(buffer: HostBuffer) -> None:
            if buffer.memory is not slot:
                copy_bytes(buffer.memory, slot)
            if self._trace.enabled:
                self._trace.add("transfer", key.label, times[0], self._trace.mark())

        return self._reader.job(key, slot, lambda: times.append(self._trace.mark()), deliver)

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
