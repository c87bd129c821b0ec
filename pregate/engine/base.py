"""What both engines are: a model without its experts, slots, and one request at a time.

Knows which calls may come when, and what is closed in which order. Each engine serves requests in its own way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import torch

from pregate.config import CacheRule, Policy
from pregate.engine.budget import allocate_slots
from pregate.engine.host import HostDriver
from pregate.engine.io.base import CLOSED
from pregate.engine.offloaded_experts import OffloadedExperts
from pregate.engine.opening import Opened
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.storage.store import Store

BUSY = "This engine is serving a request: call it again, or close it, when that request has ended."


class Engine:
    """A served checkpoint. Close it, or use it as a context manager."""

    def __init__(self, opened: Opened, store: Store, policy: Policy, host: HostDriver, model: Any) -> None:
        self.model, self.family, self.policy, self.host = model, opened.family, policy, host
        self.slab_bytes, self.num_slots = store.layout.slab_bytes, host.num_slots
        self._closers: list[Callable[[], None]] = []
        """In the order of opening; called from the last to the first."""
        self._device = host.matrices.device
        self._serving = threading.RLock()
        self._busy = self._closed = False

    @classmethod
    @torch.inference_mode(False)  # tensors of that mode may not be changed outside of it, where an engine lives on
    def _assemble(
        cls,
        opened: Opened,
        layout: SlabLayout,
        num_slots: int,
        store: Store | Callable[[], Store],
        *,
        policy: Policy,
        cache: CacheRule,
        device: torch.device,
        io_threads: int = 1,
        host_buffers: int = 0,
        io_uring: bool = False,
        experts: Callable[..., OffloadedExperts] = OffloadedExperts,
        dtype: torch.dtype | None = None,
        **own: Any,
    ) -> Self:
        """`store`: one that stays open when the engine closes, or how to open one. `experts`: see `HostDriver`.
        `dtype`: see `Opened.model`. `own` goes to the class."""
        closers: list[Callable[[], None]] = []
        try:
            if callable(store):
                store = store()
                closers.append(store.close)
            model = opened.model(device, dtype)
            slots_NB = allocate_slots(num_slots, layout, device)
            buffers = 0 if store.in_host_memory else host_buffers
            reads = io_threads, buffers, io_uring
            host = HostDriver(model, opened.family, store, slots_NB, policy, cache, *reads, experts)
            closers.append(host.close)
            if policy is Policy.gpu_only:
                host.load_all()
                host.reset_counters()
            engine = cls(opened, store, policy, host, model, **own)
        except BaseException:
            for close in reversed(closers):
                close()
            raise
        engine._closers = closers + engine._closers
        return engine

    @contextmanager
    def _served(self) -> Iterator[None]:
        """One call at a time, none of a closed engine, and none from within another: a streamer, a hook or a signal
        handler of a request may call in the same thread. The engine's GPU is the current one meanwhile: Triton starts
        kernels there, wherever their tensors are."""
        with self._serving:
            if self._closed:
                raise RuntimeError(CLOSED)
            if self._busy:
                raise RuntimeError(BUSY)
            try:
                self._busy = True
                with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
                    yield
            finally:
                self._busy = False

    def expected_bytes(self) -> dict[str, int]:
        """What the engine takes by its own account, without activations: see `HostDriver.expected_bytes`."""
        return self.host.expected_bytes()

    def close(self) -> None:
        """Give back threads, files and memory; may be called again. Waits for another thread's request. Raises
        `RuntimeError` if called from within a request."""
        with self._serving:
            if self._busy:
                raise RuntimeError(BUSY)
            self._closed = True
            while self._closers:
                self._closers[-1]()
                self._closers.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
