"""Copies slabs from the store into slots, ahead of the computation, and says when they have arrived.

`ThreadMover`: a thread pool that reads straight into slots in host memory. `CudaMover`: a copy stream, fed from
page-locked host memory, or from disk through page-locked staging buffers. Knows nothing about which slab should
move; a slot handed to `start` must not be in use until its transfer is over.
"""

from __future__ import annotations

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from pregate.engine.store import Store, aligned_bytes, page_lock, page_unlock
from pregate.engine.trace import Counters, Trace
from pregate.models.adapter import ExpertKey


class Transfer(Protocol):
    def done(self) -> bool:
        """Whether computing with the slab would not wait."""
        ...

    def wait(self) -> None:
        """Make the computation that follows see the slab. Raises what the copy raised."""
        ...


class Mover(Protocol):
    def start(self, key: ExpertKey, slot: Tensor) -> Transfer: ...

    def used(self, slot: Tensor) -> None:
        """The computation submitted so far is the last that reads `slot` as it is now."""
        ...

    def close(self) -> None: ...


def label(key: ExpertKey) -> str:
    return f"{key.stack} block {key.block} expert {key.expert}"


class ThreadMover:
    """For a compute device that is host memory: several reads in flight, each straight into its slot."""

    def __init__(self, store: Store, trace: Trace, counters: Counters, num_threads: int) -> None:
        self._store, self._trace, self._counters = store, trace, counters
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pregate-mover")

    def start(self, key: ExpertKey, slot: Tensor) -> Transfer:
        self._counters.bytes_moved += self._store.layout.slab_bytes
        return _FutureTransfer(self._pool.submit(self._read, key, slot))

    def _read(self, key: ExpertKey, slot: Tensor) -> None:
        begin = self._trace.mark()
        self._store.read_into(key, slot)
        if self._trace.enabled:
            self._trace.add("transfer", label(key), begin, self._trace.mark())

    def used(self, slot: Tensor) -> None:
        return None

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _FutureTransfer:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        self._future.result()


class CudaMover:
    """For a GPU: copies on a stream of their own; waiting is left to the streams, never to the whole device."""

    def __init__(self, store: Store, trace: Trace, counters: Counters, num_threads: int, device: torch.device) -> None:
        self._store, self._trace, self._counters, self._device = store, trace, counters, device
        self._stream = torch.cuda.Stream(device)
        self._last_use: dict[int, Any] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._staging: queue.Queue[tuple[Tensor, Any]] = queue.Queue()
        self._pinned: list[Tensor] = []
        if not store.in_host_memory:
            self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="pregate-mover")
            for _ in range(2 * num_threads):
                buffer = aligned_bytes(store.layout.slab_bytes)
                page_lock(buffer)
                self._pinned.append(buffer)
                self._staging.put((buffer, None))

    def start(self, key: ExpertKey, slot: Tensor) -> Transfer:
        self._counters.bytes_moved += self._store.layout.slab_bytes
        free_again = self._last_use.pop(slot.data_ptr(), None)
        source = self._store.slab(key)
        if source is not None:
            return _EventTransfer(self._copy(key, source, slot, free_again))
        assert self._pool is not None
        return _StagedTransfer(self._pool.submit(self._through_staging, key, slot, free_again))

    def _copy(self, key: ExpertKey, source: Tensor, slot: Tensor, free_again: Any) -> Any:
        with torch.cuda.stream(self._stream):
            if free_again is not None:
                self._stream.wait_event(free_again)
            begin = self._trace.mark(self._stream)
            slot.copy_(source, non_blocking=True)
            end = self._trace.mark(self._stream)
        if self._trace.enabled:
            self._trace.add("transfer", label(key), begin, end)
        return end

    def _through_staging(self, key: ExpertKey, slot: Tensor, free_again: Any) -> Any:
        buffer, copied = self._staging.get()
        event = None
        try:
            if copied is not None:
                copied.synchronize()
            self._store.read_into(key, buffer)
            event = self._copy(key, buffer, slot, free_again)
        finally:
            self._staging.put((buffer, event))
        return event

    def used(self, slot: Tensor) -> None:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        self._last_use[slot.data_ptr()] = event

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._stream.synchronize()
        for buffer in self._pinned:
            page_unlock(buffer)
        self._pinned.clear()


class _EventTransfer:
    def __init__(self, event: Any) -> None:
        self._event = event

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class _StagedTransfer:
    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done() and self._future.exception() is None and self._future.result().query()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._future.result())
