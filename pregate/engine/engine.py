"""The engine: a model whose experts live elsewhere, served with Hugging Face `generate`.

    with OffloadEngine.open("checkpoint", policy="pre_gated", device_budget="25%") as engine:
        tokens = engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32)

`OffloadEngine` itself is driven by the host. With `drive="device"`, `open` gives a `DeviceEngine`, whose decoding steps
need no host. Knows models, stores and budgets; knows nothing about tasks or metrics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from torch import device as Device
from torch import dtype as DType

from pregate.config import CacheRule, Drive, Policy, SlabDtype, Tier, UsageError
from pregate.config.validators import chosen
from pregate.engine.base import Engine
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.engine.conversation import Conversation
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.generation_options import asked_for
from pregate.engine.opening import Checkpoint, Opened
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.models.family import family_of_model
from pregate.system.machine import compute_device


class OffloadEngine(Engine):
    """A served checkpoint. Use `open`; close it, or use it as a context manager."""

    def __init__(self, *served: Any, prefill_chunk: int | None) -> None:
        super().__init__(*served)
        self.prefill_chunk = prefill_chunk
        objective = family_of_model(self.model).objective
        self._continues_prompts = objective.continues_prompts
        # upstream masks no padding in a call of one token, and layers that carry a state would carry it on
        self._least_chunk = 1 if objective.packs else 2

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        drive: Drive | str = Drive.host,
        policy: Policy | str = Policy.pre_gated,
        tier: Tier | str = Tier.auto,
        device: Device | str = "cpu",
        device_budget: str | None = None,
        host_budget: str | None = None,
        pack_dir: str | Path | None = None,
        io_threads: int = 2,
        io_uring: bool = True,
        prefill_chunk: int | None = 4096,
        cache: CacheRule | str = CacheRule.none,
        slab_dtype: SlabDtype | str = SlabDtype.source,
        store: Store | None = None,
        batch: int = 1,
        max_source_len: int = 512,
        max_new_tokens: int = 256,
        dtype: DType | None = None,
    ) -> Any:
        """Open a pre-gated or conventional directory for serving: an `OffloadEngine`, or a `DeviceEngine`.

        `drive`: `host` serves any request; `device` serves those that `DeviceEngine.open` describes, of at most `batch`
        rows, `max_source_len` and `max_new_tokens`, from host memory (`host_budget`, `pack_dir` and `io_…` mean
        nothing there). `device_budget`: bytes of expert slots on the compute device, as "4GB" or "25%" of all experts.
        `cache`: which used slab leaves its slot first, or `none` to keep nothing. `host_budget`: host memory, in the
        same units, that keeps slabs of the disk tier. `io_threads`: slabs in flight from the disk. `io_uring`: let the
        kernel read by itself where it can (a CPU, no host budget), not threads. `prefill_chunk`: see `generate`.
        `tier`, `pack_dir`, `slab_dtype`: see `open_store`. `store`: an opened one of this checkpoint, used instead of
        those three; it stays open when the engine closes. `dtype`: to compute in, by default the checkpoint's; experts
        keep theirs in slots (host). Enumerations may be given by name. Raises `UsageError` for a name or number that
        does not exist, and for a checkpoint or budget that cannot be served.
        """
        policy, tier = chosen("policy", Policy, policy), chosen("tier", Tier, tier)
        cache, slab_dtype = chosen("cache", CacheRule, cache), chosen("slab_dtype", SlabDtype, slab_dtype)
        shared: dict[str, Any] = {"policy": policy, "cache": cache, "slab_dtype": slab_dtype, "store": store}
        shared |= {"tier": tier, "device": device, "device_budget": device_budget}
        if chosen("drive", Drive, drive) is Drive.device:
            if dtype is not None:
                raise UsageError("dtype is of an engine that the host drives: leave it out, or use drive=host.")
            sizes = {"batch": batch, "max_source_len": max_source_len, "max_new_tokens": max_new_tokens}
            return DeviceEngine.open(checkpoint, **sizes, **shared)
        for name, number in {"io_threads": io_threads, "prefill_chunk": prefill_chunk}.items():
            if number is not None and number < 1:
                raise UsageError(f"{name}={number} must be at least 1.")
        place, opened = compute_device(device), Opened(checkpoint)
        layout = opened.layout(slab_dtype, store)
        return cls._assemble(
            opened,
            layout,
            slots_within(device_budget, policy, opened.family, layout.slab_bytes),
            store or (lambda: opened.store(layout, tier, place, pack_dir)),
            policy=policy,
            cache=cache,
            device=place,
            io_threads=io_threads,
            host_buffers=host_buffers_within(host_budget, opened.family, layout.slab_bytes),
            io_uring=io_uring,
            prefill_chunk=prefill_chunk,
            dtype=dtype,
        )

    def forward(self, **inputs: Any) -> Any:
        """One teacher-forced call of the model: same arguments and result as its `forward`."""
        with self._served():
            return self.host.run(self.model, inputs)

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **options: Any) -> Any:
        """Hugging Face `generate` with the engine's policy; takes and returns the same. The engine stays usable
        after an error or an interrupt; calls from several threads are served one after the other. Raises `RuntimeError`
        for a call from within a request and for a closed engine.

        A decoder-only model reads a prompt of more than `prefill_chunk` tokens a row in chunks of so many: activations
        need less memory, and each chunk moves the experts that it uses. `prefill_chunk_size`, upstream's option, comes
        before it.
        """
        named = {"inputs": inputs, "generation_config": generation_config}
        given = {name: value for name, value in named.items() if value is not None}
        with self._served():
            return self.host.run(self.model.generate, self._in_chunks(given | options))

    def conversation(self) -> Conversation:
        """A new one, each turn of which goes on from the KV cache of the turns before. Raises `UsageError` for a model
        that reads its prompt in another stack."""
        if not self._continues_prompts:
            raise UsageError("A conversation needs a decoder-only model: give this one the whole text with generate.")
        return Conversation(self.model, self.generate)

    def _in_chunks(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = inputs.get("input_ids")
        ids = inputs.get("inputs") if ids is None else ids
        is_cached = asked_for("use_cache", inputs, self.model) is not False
        is_chunked = bool(asked_for("prefill_chunk_size", inputs, self.model))
        if not (self._continues_prompts and self.prefill_chunk and is_cached) or is_chunked:
            return inputs
        chunk = max(self.prefill_chunk, self._least_chunk)
        if ids is None or ids.shape[1] <= chunk:
            return inputs
        return {"prefill_chunk_size": chunk, **inputs}

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
