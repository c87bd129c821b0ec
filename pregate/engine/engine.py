"""The engine: a model whose experts live elsewhere, served with Hugging Face `generate`.

    with OffloadEngine.open("checkpoint", policy=Policy.pre_gated, device_budget="25%") as engine:
        tokens = engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32)

Knows models, stores and schedulers; knows nothing about tasks or metrics.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pregate.config import CacheRule, Policy, SlabDtype, Tier, UsageError
from pregate.engine.budget import allocate_slots, host_buffers_within, resolve_tier, slots_within
from pregate.engine.cache import SlotTable
from pregate.engine.experts import OffloadedExperts, SlotMatrices, routed_experts
from pregate.engine.io.mover import Mover
from pregate.engine.io.movers import make_mover
from pregate.engine.policy import make_policy
from pregate.engine.scheduler import Scheduler
from pregate.engine.storage.origin import Unchanged
from pregate.engine.storage.pack import check_experts, default_pack_dir, pack
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.storage.store import DiskStore, DramStore, Store
from pregate.engine.trace import Counters, Trace
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.family import ExpertSpec, config_of, experts_of, family_named
from pregate.models.loading import checked, generation_config, open_model
from pregate.models.pregated import compute_buffers, without_experts
from pregate.models.routing import Routing
from pregate.system.runtime import compute_device, first_of

Checkpoint = str | Path | SourceCheckpoint
COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that a model may have."""
CLOSED = "This engine is closed: open it again."
BUSY = "This engine is serving a request: call it again, or close it, when that request has ended."


def serving_dtype(config: Any, source: SourceCheckpoint, family: ExpertSpec) -> torch.dtype:
    """The dtype that `from_pretrained` gives every tensor of the resident model, experts included, whatever dtypes
    they are stored in: the config's, or where that names none, the weights' own. Raises `UsageError` for missing
    experts, and for a dtype that no model computes in."""
    check_experts(source, family)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else source.default_dtype()
    if dtype not in COMPUTED:
        raise UsageError(
            f"{source.directory} is a model of {str(dtype).removeprefix('torch.')}, in which no model computes: set "
            "dtype in its config.json to float32, bfloat16 or float16."
        )
    return dtype


class _Opened:
    """A checkpoint's headers, and what follows from them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        given = isinstance(checkpoint, SourceCheckpoint)
        self.source = checked(checkpoint) if given else open_model(str(checkpoint))
        self.config = config_of(self.source.config)
        self.family = experts_of(self.config).as_found_in(self.source.tensors)
        self.dtype = serving_dtype(self.config, self.source, self.family)


def open_store(
    checkpoint: Checkpoint,
    *,
    tier: Tier = Tier.auto,
    device: torch.device | str = "cpu",
    pack_dir: str | Path | None = None,
    slab_dtype: SlabDtype = SlabDtype.source,
) -> Store:
    """Where the experts of `checkpoint` live, ready to be read; several engines may share it. Close it after them.

    `tier`: host memory (page-locked for a GPU), or the disk, where the experts are packed once into `pack_dir`
    (default: `experts` in the checkpoint). `slab_dtype`: as the weights are, or quantised. Raises `UsageError` for a
    checkpoint that cannot be served, a full disk, or memory that cannot be page-locked.
    """
    device = compute_device(device)
    return _open_store(_Opened(checkpoint), Tier(tier), device, pack_dir, SlabDtype(slab_dtype))


def _open_store(
    opened: _Opened, tier: Tier, device: torch.device, pack_dir: str | Path | None, slab_dtype: SlabDtype
) -> Store:
    layout = SlabLayout.of(opened.family, opened.dtype, slab_dtype)
    if resolve_tier(tier, device) is Tier.disk:
        where = Path(pack_dir) if pack_dir else default_pack_dir(opened.source.directory, slab_dtype)
        with Unchanged(opened.source) as signs:
            packed = pack(opened.source, opened.family, layout, where)
        return DiskStore(packed, signs.identity)
    return DramStore(opened.source, opened.family, layout, page_locked=device.type == "cuda")


class OffloadEngine:
    """A served checkpoint. Use `open`; close it, or use it as a context manager."""

    def __init__(
        self,
        model: Any,
        family: ExpertSpec,
        store: Store,
        mover: Mover,
        slots_NB: Tensor,
        policy: Policy,
        cache: CacheRule,
        trace: Trace,
        counters: Counters,
    ) -> None:
        self.model: Any = model
        self.family, self.policy = family, policy
        self.trace, self.counters = trace, counters
        self.slab_bytes, self.num_slots = store.layout.slab_bytes, slots_NB.shape[0]
        self._mover, self._slots_NB = mover, slots_NB
        self._matrices = SlotMatrices(slots_NB, store.layout)
        rule = CacheRule.lru if policy is Policy.gpu_only else cache
        self._scheduler = Scheduler(list(slots_NB), SlotTable(self.num_slots, rule), mover, trace, counters)
        self._moves = make_policy(policy, family)
        self._on_close: list[Callable[[], None]] = [mover.close]
        self._serving, self._cut_short, self._busy = threading.RLock(), False, False
        for block in model.moe_blocks():
            block.module.experts = OffloadedExperts(
                family, block.stack, block.index, self._matrices, self._scheduler, self._moves, trace
            )
        model.set_listener(self._on_route)
        self._hooks: list[Any] = []
        self._time_layers()
        if policy is Policy.gpu_only:
            self._scheduler.request(family.keys())
            self._scheduler.settle()
            self.reset_counters()

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        policy: Policy = Policy.pre_gated,
        tier: Tier = Tier.auto,
        device: torch.device | str = "cpu",
        device_budget: str | None = None,
        host_budget: str | None = None,
        pack_dir: str | Path | None = None,
        io_threads: int = 2,
        io_uring: bool = True,
        cache: CacheRule = CacheRule.none,
        slab_dtype: SlabDtype = SlabDtype.source,
        store: Store | None = None,
    ) -> OffloadEngine:
        """Open a pre-gated or conventional Switch directory for serving.

        `device_budget`: bytes of expert slots on the compute device, as "4GB" or "25%" of all experts. `cache`: which
        used slab leaves its slot first, or `none` to keep nothing. `host_budget`: host memory, in the same units,
        that keeps slabs of the disk tier. `io_threads`: slabs in flight from the disk. `io_uring`: let the kernel read
        by itself where it can (a CPU, no host budget), not threads. `tier`, `pack_dir`, `slab_dtype`: see
        `open_store`. `store`: an opened one of this checkpoint, used instead of those three; it stays open when the
        engine closes. Enumerations may be given by name. Raises `UsageError` for a checkpoint or budget that cannot
        be served.
        """
        device, policy = compute_device(device), Policy(policy)
        opened = _Opened(checkpoint)
        layout = SlabLayout.of(opened.family, opened.dtype, store.layout.stored if store else SlabDtype(slab_dtype))
        if store is not None and store.layout != layout:
            raise UsageError(
                f"The store given holds no experts of {opened.source.directory}: open one with open_store."
            )
        made_from = None if store is None else getattr(store, "made_from", None)
        if made_from is not None and made_from != opened.source.identity():
            raise UsageError(
                f"The store given holds other experts than {opened.source.directory} does now: open one with "
                "open_store."
            )
        if io_threads < 1:
            raise UsageError(f"io_threads={io_threads} must be at least 1.")
        num_slots = slots_within(device_budget, policy, opened.family, layout.slab_bytes)
        host_buffers = host_buffers_within(host_budget, opened.family, layout.slab_bytes)
        undo: list[Callable[[], None]] = []
        try:
            if store is None:
                store = _open_store(opened, Tier(tier), device, pack_dir, SlabDtype(slab_dtype))
                undo.append(store.close)
            model = _without_experts(opened, device)
            trace, counters = Trace(device), Counters()
            slots_NB = allocate_slots(num_slots, layout, device)
            if store.in_host_memory:
                host_buffers = 0
            mover = make_mover(store, trace, counters, io_threads, slots_NB, host_buffers, io_uring)
            undo.append(mover.close)
            engine = cls(model, opened.family, store, mover, slots_NB, policy, CacheRule(cache), trace, counters)
        except BaseException:
            for close in reversed(undo):
                close()
            raise
        engine._on_close = undo
        return engine

    @torch.inference_mode()
    def forward(self, **inputs: Any) -> Any:
        """One teacher-forced call of the model: same arguments and result as its `forward`."""
        return self._serve(self.model, inputs)

    @torch.inference_mode()
    def generate(self, **inputs: Any) -> Any:
        """Hugging Face `generate` with the engine's policy; takes and returns the same. The engine stays usable
        after an error or an interrupt; calls from several threads are served one after the other. Raises `RuntimeError`
        for a call from within a request and for a closed engine."""
        return self._serve(self.model.generate, inputs)

    @torch.inference_mode()
    def encode(self, **inputs: Any) -> Tensor:
        """The encoder alone, with the arguments of its `forward`: its last hidden states (B, S, D)."""
        return self._serve(self.model.encoder, inputs).last_hidden_state

    def lend_slots(self) -> Tensor:
        """The slots (num_slots, slab_bytes), for another driver to fill until this engine serves again.

        What they hold is forgotten, except with `gpu_only`: there slot i holds the i-th of `family.keys()`, and must.
        """
        keys = self.family.keys()
        if self.policy is not Policy.gpu_only:
            self._scheduler.reset()
        elif any(self._scheduler.slot_of(key) != slot for slot, key in enumerate(keys)):
            # a call that was cut short has forgotten them
            self._scheduler.reset()
            self._scheduler.request(keys)
            self._scheduler.settle()
        return self._slots_NB

    def _serve(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        with self._serving:
            if not self._on_close:
                raise RuntimeError(CLOSED)
            if self._busy:  # by this very thread: a streamer, a hook or a signal handler of the request calls
                raise RuntimeError(BUSY)
            try:
                self._busy = True
                # a second interrupt can cut the reset below short as well
                if self._cut_short:
                    self._scheduler.reset()
                self._cut_short = True
                try:
                    result = call(**inputs)
                    self._scheduler.settle()
                except BaseException:
                    self._scheduler.reset()
                    self._cut_short = False
                    raise
                self._cut_short = False
                return result
            finally:
                self._busy = False

    def expected_bytes(self) -> dict[str, int]:
        """What the engine takes by its own account, without activations: the weights that are not experts, the
        slots, the scratch for dequantised experts, and the host memory it moves slabs through (`staging`)."""
        weights = {id(p): p.nbytes for p in [*self.model.parameters(), *self.model.buffers()]}
        return {
            "non_expert": sum(weights.values()),
            "slots": self.num_slots * self.slab_bytes,
            "scratch": self._matrices.scratch_bytes,
            "staging": self._mover.host_bytes,
        }

    @property
    def reader(self) -> str:
        """Who reads slabs from a disk: `threads` or `io_uring`."""
        return self._mover.reader

    def reset_counters(self) -> None:
        for name in self.counters.to_dict():
            setattr(self.counters, name, 0)

    def close(self) -> None:
        """Give back threads, files and memory; may be called again. Waits for another thread's request. Raises
        `RuntimeError` if called from within a request."""
        with self._serving:
            if self._busy:
                raise RuntimeError(BUSY)
            if self._on_close:
                self._scheduler.reset()
            while self._on_close:
                self._on_close[-1]()
                self._on_close.pop()
            self._scheduler.forget_slots()
            self._matrices.forget_slots()
            self._slots_NB = self._slots_NB[:0].clone()
            self.model.set_listener(None)
            for hook in self._hooks:
                hook.remove()

    def __enter__(self) -> OffloadEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _time_layers(self) -> None:
        """Record a span in lane `layer` for each whole transformer layer that holds an MoE block."""
        for block in self.model.moe_blocks():
            begun: list[Any] = []
            name = f"{block.stack} block {block.index}"

            def begin(*_: Any, begun: list[Any] = begun) -> None:
                begun[:] = [self.trace.mark()] if self.trace.enabled else []

            def end(*_: Any, begun: list[Any] = begun, name: str = name) -> None:
                if begun and self.trace.enabled:
                    self.trace.add("layer", name, begun.pop(), self.trace.mark())

            self._hooks.append(block.layer_module.register_forward_pre_hook(begin))
            self._hooks.append(block.layer_module.register_forward_hook(end))

    def _on_route(self, stack: str, block: int, routing: Routing) -> None:
        if self.policy is Policy.pre_gated:
            self._scheduler.request(self._moves.on_route(stack, block, routed_experts(routing)))


def _without_experts(opened: _Opened, device: torch.device) -> Any:
    """The model with everything but its experts on `device`; the experts' tensors stay unread."""
    config, source = opened.config, opened.source
    config.dtype = opened.dtype
    with without_experts(), torch.device("meta"):
        model = family_named(config.model_type).model_class(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name in source.tensors}
    # one at a time and the largest first: a tensor's mapped pages are resident memory beside its copy
    for name in sorted(wanted, key=source.num_bytes, reverse=True):
        found = source.tensors[name].shape
        if found != wanted[name]:
            raise UsageError(
                f"{source.directory} holds {name} of shape {tuple(found)}, not {tuple(wanted[name])}: use the complete "
                "weights of the model that its config.json describes."
            )
        owned = source.read([name])[name].to(device=device, dtype=opened.dtype, copy=True)
        # load_state_dict would walk all modules for each tensor
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(owned, requires_grad=False))
    compute_buffers(model, device)
    # as from_pretrained: tables that are there and differ stay apart
    model.tie_weights(missing_keys=set(model.state_dict()) - set(wanted), recompute_mapping=False)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UsageError(f"{source.directory} lacks {first_of(missing)}: convert it again.")
    model.generation_config = generation_config(source)
    model.requires_grad_(False)
    return model.eval()
