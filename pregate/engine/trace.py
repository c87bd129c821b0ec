"""What happened when: spans of compute, transfer and wait, and the counters beside them.

On the CPU spans are read from a monotonic clock; on CUDA from events on the streams themselves, so that recording
never synchronises. Knows nothing about what is recorded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass
class Counters:
    """Counted where they happen. A hit is an announced slab that was already on the device; a miss had to be moved, and
    evicts another where no slot was free. `bytes_moved` went into slots; of them, `bytes_read` were read from the
    store, and a host hit was not, because host memory in front of the disk held the slab."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_moved: int = 0
    host_hits: int = 0
    bytes_read: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Span:
    """`lane`: compute, transfer, wait or layer. Times in milliseconds since the trace began."""

    lane: str
    name: str
    start_ms: float
    end_ms: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Trace:
    """Collects spans while `enabled`."""

    device: torch.device
    enabled: bool = False
    _lanes: Collection[str] | None = None
    _origin: Any = None
    _spans: list[tuple[str, str, Any, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, lanes: Collection[str] | None = None) -> None:
        """`lanes`: those to collect, by default all."""
        with self._lock:
            self._spans.clear()
        self._lanes = lanes
        self._origin = self.mark()
        self.enabled = True

    def stop(self) -> list[Span]:
        """All spans since `start`, by their begin."""
        self.enabled = False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._lock:
            spans = [
                Span(lane, name, self._ms(self._origin, begin), self._ms(self._origin, end))
                for lane, name, begin, end in self._spans
            ]
            self._spans.clear()
        return sorted(spans, key=lambda span: span.start_ms)

    def mark(self, stream: Any = None) -> Any:
        """A point in time: of the host, or of `stream` (the current one) on CUDA."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(self.device))
        return event

    def add(self, lane: str, name: str, begin: Any, end: Any) -> None:
        if self._lanes is not None and lane not in self._lanes:
            return
        with self._lock:
            self._spans.append((lane, name, begin, end))

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        if not self.enabled or (self._lanes is not None and lane not in self._lanes):
            yield
            return
        begin = self.mark()
        yield
        self.add(lane, name, begin, self.mark())

    @staticmethod
    def _ms(begin: Any, end: Any) -> float:
        return (end - begin) * 1e3 if isinstance(begin, float) else begin.elapsed_time(end)
