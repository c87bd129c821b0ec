"""The engine: a model whose experts live elsewhere, served with Hugging Face `generate`.

    with OffloadEngine.open("checkpoint", policy="pre_gated", device_budget="25%") as engine:
        tokens = engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32)

`OffloadEngine` itself is driven by the host. With `drive="device"`, `open` gives a `DeviceEngine`, whose decoding steps
need no host. Knows models, stores and budgets; knows nothing about tasks or metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import device as Device

from pregate.config import CacheRule, Drive, Policy, SlabDtype, Tier, UsageError
from pregate.engine.base import Engine
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.engine.device.engine import DeviceEngine
from pregate.engine.opening import Checkpoint, Opened
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.system.machine import compute_device


class OffloadEngine(Engine):
    """A served checkpoint. Use `open`; close it, or use it as a context manager."""

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        drive: Drive | str = Drive.host,
        policy: Policy = Policy.pre_gated,
        tier: Tier = Tier.auto,
        device: Device | str = "cpu",
        device_budget: str | None = None,
        host_budget: str | None = None,
        pack_dir: str | Path | None = None,
        io_threads: int = 2,
        io_uring: bool = True,
        cache: CacheRule = CacheRule.none,
        slab_dtype: SlabDtype = SlabDtype.source,
        store: Store | None = None,
        batch: int = 1,
        max_source_len: int = 512,
        max_new_tokens: int = 256,
    ) -> Any:
        """Open a pre-gated or conventional directory for serving: an `OffloadEngine`, or a `DeviceEngine`.

        `drive`: `host` serves any request; `device` serves those that `DeviceEngine.open` describes, of at most `batch`
        rows, `max_source_len` and `max_new_tokens`, from host memory (`host_budget`, `pack_dir` and `io_…` mean
        nothing there). `device_budget`: bytes of expert slots on the compute device, as "4GB" or "25%" of all experts.
        `cache`: which used slab leaves its slot first, or `none` to keep nothing. `host_budget`: host memory, in the
        same units, that keeps slabs of the disk tier. `io_threads`: slabs in flight from the disk. `io_uring`: let the
        kernel read by itself where it can (a CPU, no host budget), not threads. `tier`, `pack_dir`, `slab_dtype`: see
        `open_store`. `store`: an opened one of this checkpoint, used instead of those three; it stays open when the
        engine closes. Enumerations may be given by name. Raises `UsageError` for a checkpoint or budget that cannot
        be served.
        """
        shared: dict[str, Any] = {"policy": policy, "cache": cache, "slab_dtype": slab_dtype, "store": store}
        shared |= {"tier": tier, "device": device, "device_budget": device_budget}
        if Drive(drive) is Drive.device:
            sizes = {"batch": batch, "max_source_len": max_source_len, "max_new_tokens": max_new_tokens}
            return DeviceEngine.open(checkpoint, **sizes, **shared)
        place, policy = compute_device(device), Policy(policy)
        opened = Opened(checkpoint)
        layout = opened.layout(SlabDtype(slab_dtype), store)
        if io_threads < 1:
            raise UsageError(f"io_threads={io_threads} must be at least 1.")
        return cls._assemble(
            opened,
            layout,
            slots_within(device_budget, policy, opened.family, layout.slab_bytes),
            store or (lambda: opened.store(layout, Tier(tier), place, pack_dir)),
            policy=policy,
            cache=CacheRule(cache),
            device=place,
            io_threads=io_threads,
            host_buffers=host_buffers_within(host_budget, opened.family, layout.slab_bytes),
            io_uring=io_uring,
        )

    def forward(self, **inputs: Any) -> Any:
        """One teacher-forced call of the model: same arguments and result as its `forward`."""
        with self._served():
            return self.host.run(self.model, inputs)

    def generate(self, **inputs: Any) -> Any:
        """Hugging Face `generate` with the engine's policy; takes and returns the same. The engine stays usable
        after an error or an interrupt; calls from several threads are served one after the other. Raises `RuntimeError`
        for a call from within a request and for a closed engine."""
        with self._served():
            return self.host.run(self.model.generate, inputs)

    @property
    def trace(self) -> Trace:
        return self.host.trace

    @property
    def counters(self) -> Counters:
        """Of everything since the engine was opened, or since `reset_counters`."""
        return self.host.counters

    def reset_counters(self) -> None:
        self.host.reset_counters()

    @property
    def reader(self) -> str:
        """What reads slabs from a disk: `threads` or `io_uring`."""
        return self.host.mover.reader
