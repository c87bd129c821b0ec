"""Host memory between the disk and the slots. Knows slabs by their keys; knows nothing about how they are filled."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.engine.storage.aligned_memory import PageLocks, aligned_bytes
from pregate.models.experts import ExpertKey
from pregate.system.byte_sizes import human_bytes


@dataclass(eq=False)
class HostBuffer:
    """One slab's room in host memory. `busy`: a job fills or copies it; `copied`: the CUDA event of its last copy."""

    memory: Tensor
    key: ExpertKey | None = None
    busy: bool = False
    copied: Any = None
    free_since: int = 0


@dataclass
class HostBuffers:
    """Slabs between the disk and the slots: a few are a staging ring, more of them a cache in front of the disk.

    A buffer remembers the slab it holds; of those not busy, the one unused for longest is filled next.
    """

    num_buffers: int
    slab_bytes: int
    page_locked: bool
    _buffers: list[HostBuffer] = field(default_factory=list)
    _clock: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _page_locks: PageLocks = field(default_factory=PageLocks)
    _memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def __post_init__(self) -> None:
        try:
            self._memory = aligned_bytes(self.num_buffers * self.slab_bytes)
        except MemoryError as error:
            raise UsageError(
                f"{self.num_buffers} experts in host memory need {human_bytes(self.num_bytes)}, which are not to be "
                "had: lower engine.host_budget."
            ) from error
        if self.page_locked:
            self._page_locks.lock(self._memory)
        self._buffers = [HostBuffer(m) for m in self._memory.view(self.num_buffers, self.slab_bytes)]

    @property
    def num_bytes(self) -> int:
        return self.num_buffers * self.slab_bytes

    def take(self, key: ExpertKey) -> tuple[HostBuffer, bool] | None:
        """A buffer for `key`, now busy, and whether it holds the slab already; None while all are busy."""
        with self._lock:
            idle = [buffer for buffer in self._buffers if not buffer.busy]
            if not idle:
                return None
            held = next((buffer for buffer in idle if buffer.key == key), None)
            buffer = held or min(idle, key=lambda b: (b.key is not None, b.free_since))
            buffer.busy = True
            if held is None:
                buffer.key = None
            return buffer, held is not None

    def give_back(self, buffer: HostBuffer, key: ExpertKey | None) -> None:
        """`key`: what the buffer now holds, None if that cannot be trusted."""
        with self._lock:
            self._clock += 1
            buffer.busy, buffer.key, buffer.free_since = False, key, self._clock

    def close(self) -> None:
        """May be called again."""
        for buffer in self._buffers if self._page_locks.are_ours() else ():
            if buffer.copied is not None:  # a copy to the device that still reads
                buffer.copied.synchronize()
        self._page_locks.release()
        self._buffers, self._memory = [], self._memory[:0].clone()

    def __del__(self) -> None:
        # memory of an engine that was dropped unclosed would stay page-locked after it is freed
        self.close()
