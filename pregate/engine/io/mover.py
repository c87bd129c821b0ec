"""Copies slabs from the store into slots, ahead of the computation, and says when they have arrived.

`ThreadMover`: threads that read straight into slots in host memory. `CudaMover`: a copy stream, fed from
page-locked host memory, or from disk through page-locked host buffers. Knows nothing about which slab should
move; a slot handed to `start` must not be in use until its transfer is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from pregate.engine.io.readers import HostBuffer, HostBuffers, ReadJob, ReadPool, parts_of
from pregate.engine.storage.store import Store, copy_bytes
from pregate.engine.trace import Counters, Trace
from pregate.models.family import ExpertKey

STAGING_BUFFERS = 4


class Transfer(Protocol):
    def done(self) -> bool:
        """Whether computing with the slab would not wait."""
        ...

    def wait(self) -> None:
        """Make the computation that follows see the slab. Raises what the copy raised."""
        ...


class Mover(Protocol):
    reader: str
    """Who reads slabs from a disk: `threads` or `io_uring`."""

    @property
    def host_bytes(self) -> int:
        """Host memory taken for buffers."""
        ...

    def start(self, key: ExpertKey, slot: Any) -> Transfer: ...

    def used(self, slot: Any) -> None:
        """The computation submitted so far is the last that reads `slot` as it is now."""
        ...

    def drain(self) -> None:
        """Wait until nothing moves, whoever holds the transfers. Never raises what they raised."""
        ...

    def close(self) -> None: ...


class _Reader:
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
        self._reader = _Reader(store, counters, num_threads, buffers)

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


class CudaMover:
    """For a GPU: copies on a stream of their own; waiting is left to the streams, never to the whole device.

    Slabs on disk pass through `host_buffers` page-locked buffers, at least a few for staging.
    """

    reader = "threads"

    def __init__(
        self,
        store: Store,
        trace: Trace,
        counters: Counters,
        num_threads: int,
        device: torch.device,
        host_buffers: int = 0,
    ) -> None:
        self._store, self._trace, self._counters, self._device = store, trace, counters, device
        self._stream = torch.cuda.Stream(device)
        self._last_use: dict[int, Any] = {}
        self._reader: _Reader | None = None
        self.host_bytes = 0
        if not store.in_host_memory:
            buffers = HostBuffers(max(STAGING_BUFFERS, host_buffers), store.layout.slab_bytes, page_locked=True)
            self.host_bytes = buffers.num_bytes
            self._reader = _Reader(store, counters, num_threads, buffers)

    def start(self, key: ExpertKey, slot: Tensor) -> Transfer:
        self._counters.bytes_moved += self._store.layout.slab_bytes
        free_again = self._last_use.pop(slot.data_ptr(), None)
        source = self._store.slab(key)
        if source is not None:
            return _EventTransfer(self._copy(key, source, slot, free_again), self._device)
        assert self._reader is not None

        def deliver(buffer: HostBuffer) -> Any:
            buffer.copied = self._copy(key, buffer.memory, slot, free_again)
            return buffer.copied

        return _StagedTransfer(self._reader.read_through(key, lambda: None, deliver), self._device)

    def _copy(self, key: ExpertKey, source: Tensor, slot: Tensor, free_again: Any) -> Any:
        with torch.cuda.stream(self._stream):
            if free_again is not None:
                self._stream.wait_event(free_again)
            begin = self._trace.mark(self._stream)
            slot.copy_(source, non_blocking=True)
            end = self._trace.mark(self._stream)
        if self._trace.enabled:
            self._trace.add("transfer", key.label, begin, end)
        return end

    def used(self, slot: Tensor) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._last_use[slot.data_ptr()] = event

    def drain(self) -> None:
        if self._reader is not None:
            self._reader.drain()
        self._stream.synchronize()

    def close(self) -> None:
        if self._reader is not None:
            self._reader.stop()
        # copies end before the buffers they read from are unlocked
        self._stream.synchronize()
        if self._reader is not None:
            self._reader.close()


class _EventTransfer:
    def __init__(self, event: Any, device: torch.device) -> None:
        self._event, self._device = event, device

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class _StagedTransfer:
    def __init__(self, job: ReadJob, device: torch.device) -> None:
        self._job, self._device = job, device

    def done(self) -> bool:
        return self._job.ended_well() and self._job.result().query()

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._job.result())
