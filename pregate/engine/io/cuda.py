"""The mover for a GPU: a copy stream, fed from page-locked host memory, or from disk through page-locked host buffers.

Waiting is left to the streams, never to the whole device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pregate.engine.io.base import Move, Transfer
from pregate.engine.io.host_cache import HostBuffer, HostBuffers
from pregate.engine.io.read_pool import ReadJob
from pregate.engine.io.threads import SlabReader
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertKey

STAGING_BUFFERS = 4


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
        self._reader: SlabReader | None = None
        self.host_bytes = 0
        if not store.in_host_memory:
            buffers = HostBuffers(max(STAGING_BUFFERS, host_buffers), store.layout.slab_bytes, page_locked=True)
            self.host_bytes = buffers.num_bytes
            self._reader = SlabReader(store, counters, num_threads, buffers)

    def start(self, moves: Sequence[Move]) -> list[Transfer]:
        size = len(moves) * self._store.layout.slab_bytes
        self._counters.bytes_moved += size
        if self._reader is None:
            self._counters.bytes_read += size
            return [_EventTransfer(self._copy_resident(*move), self._device) for move in moves]
        jobs = [self._job(self._reader, *move) for move in moves]
        self._reader.submit(jobs)
        return [_StagedTransfer(job, self._device) for job in jobs]

    def _copy_resident(self, key: ExpertKey, slot: Tensor) -> Any:
        source = self._store.slab(key)
        assert source is not None, "a store in host memory gives its slabs"
        return self._copy(key, source, slot, self._free_again(slot))

    def _job(self, reader: SlabReader, key: ExpertKey, slot: Tensor) -> ReadJob:
        free_again = self._free_again(slot)

        def deliver(buffer: HostBuffer) -> Any:
            buffer.copied = self._copy(key, buffer.memory, slot, free_again)
            return buffer.copied

        return reader.job(key, slot, lambda: None, deliver)

    def _free_again(self, slot: Tensor) -> Any:
        """The event behind the last computation with what `slot` holds; None if there was none."""
        return self._last_use.pop(slot.data_ptr(), None)

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
