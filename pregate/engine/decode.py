"""The engine: a model whose experts live elsewhere, served with Hugging Face `generate`.

    with OffloadEngine.open("checkpoint", policy=Policy.pre_gated, device_budget="25%") as engine:
        tokens = engine.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32)

Knows models, stores and schedulers; knows nothing about tasks or metrics.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from pregate.config import CacheRule, Policy, SlabDtype, Tier, UsageError
from pregate.engine.cache import SlotTable
from pregate.engine.experts import OffloadedExperts, Scheduler, routed_experts
from pregate.engine.mover import CudaMover, Mover, ThreadMover
from pregate.engine.policy import default_slots, make_policy
from pregate.engine.store import DiskStore, DramStore, SlabLayout, Store, aligned_bytes, expert_dtype, pack
from pregate.engine.trace import Counters, Trace
from pregate.models.adapter import ExpertFamily
from pregate.models.checkpoint import SourceCheckpoint, open_checkpoint, side_files
from pregate.models.routing import Routing
from pregate.models.switch import PreGatedSwitchTransformersForConditionalGeneration
from pregate.models.switch_layers import WITHOUT_EXPERTS, PreGatedSwitchTransformersConfig, switch_expert_family
from pregate.runtime import human_bytes, parse_bytes


class DeviceFullError(UsageError):
    """The slots asked for do not fit on the compute device."""


def serving_dtype(
    config: PreGatedSwitchTransformersConfig, source: SourceCheckpoint, family: ExpertFamily
) -> torch.dtype:
    """The dtype that the resident model would have: the config's, or that of the weights. Raises `UsageError` for
    missing experts."""
    stored = expert_dtype(source, family)
    return config.dtype if isinstance(config.dtype, torch.dtype) else stored


def resolve_tier(tier: Tier, device: torch.device) -> Tier:
    """`auto`: page-locked host memory for a GPU; the disk where the compute device is host memory itself."""
    if tier is not Tier.auto:
        return tier
    return Tier.dram if device.type == "cuda" else Tier.disk


def slots_within(budget: str | None, policy: Policy, family: ExpertFamily, slab_bytes: int) -> int:
    """How many slots a device budget buys: bytes ("4GB"), a share of all experts ("25%"), or None for the default.

    Raises `UsageError` if it does not hold one expert, or not all of them for `gpu_only`.
    """
    total = len(family.keys())
    if budget is None:
        return default_slots(policy, family)
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(budget))
    size = float(share.group(1)) / 100 * total * slab_bytes if share else parse_bytes(budget)
    slots = min(total, int(size // slab_bytes))
    if slots < 1:
        raise UsageError(
            f"engine.device_budget={budget} is {human_bytes(size)}, less than one expert of {human_bytes(slab_bytes)}: "
            f"give at least {human_bytes(slab_bytes)}."
        )
    if policy is Policy.gpu_only and slots < total:
        raise UsageError(
            f"engine.device_budget={budget} holds {slots} of {total} experts, but gpu_only keeps all of them on the "
            f"device: give {human_bytes(total * slab_bytes)} or another policy."
        )
    return slots


def open_store(
    checkpoint: str | Path | SourceCheckpoint,
    *,
    tier: Tier = Tier.auto,
    device: torch.device | str = "cpu",
    pack_dir: str | Path | None = None,
    slab_dtype: SlabDtype = SlabDtype.source,
    host_budget: str | None = None,
) -> Store:
    """Where the experts of `checkpoint` live, ready to be read; several engines may share it. Close it after them.

    `tier`: host memory (page-locked for a GPU), or the disk, where the experts are packed once into `pack_dir`
    (default: `experts` in the checkpoint).
    """
    device = torch.device(device)
    source = checkpoint if isinstance(checkpoint, SourceCheckpoint) else open_checkpoint(str(checkpoint))
    config = PreGatedSwitchTransformersConfig.of_checkpoint(source.config)
    family = switch_expert_family(config)
    layout = SlabLayout.of(family, serving_dtype(config, source, family))
    if resolve_tier(tier, device) is Tier.disk:
        where = Path(pack_dir) if pack_dir else source.directory / "experts"
        return DiskStore(pack(source, family, layout, where))
    return DramStore(source, family, layout, page_locked=device.type == "cuda")


class OffloadEngine:
    """A served checkpoint. Use `open`; close it, or use it as a context manager."""

    def __init__(
        self,
        model: PreGatedSwitchTransformersForConditionalGeneration,
        family: ExpertFamily,
        store: Store,
        mover: Mover,
        slots_NB: Tensor,
        policy: Policy,
        trace: Trace,
        counters: Counters,
        keep: bool,
    ) -> None:
        self.model: Any = model
        self.family, self.policy = family, policy
        self.trace, self.counters = trace, counters
        self.slab_bytes, self.num_slots = store.layout.slab_bytes, slots_NB.shape[0]
        self._store, self._mover = store, mover
        self._scheduler = Scheduler(slots_NB, store.layout, SlotTable(self.num_slots, keep), mover, trace, counters)
        self._moves = make_policy(policy, family)
        for block in model.moe_blocks():
            block.module.experts = OffloadedExperts(
                family, block.stack, block.index, self._scheduler, self._moves, trace
            )
        model.set_listener(self._on_route)
        self._time_layers()
        if policy is Policy.gpu_only:
            self._scheduler.request(family.keys())
            self._scheduler.settle()
            self.reset_counters()

    @classmethod
    def open(
        cls,
        checkpoint: str | Path | SourceCheckpoint,
        *,
        policy: Policy = Policy.pre_gated,
        tier: Tier = Tier.auto,
        device: torch.device | str = "cpu",
        device_budget: str | None = None,
        host_budget: str | None = None,
        pack_dir: str | Path | None = None,
        io_threads: int = 2,
        cache: CacheRule = CacheRule.none,
        slab_dtype: SlabDtype = SlabDtype.source,
        store: Store | None = None,
    ) -> OffloadEngine:
        """Open a pre-gated or conventional Switch directory for serving.

        `device_budget`: bytes of expert slots on the compute device, as "4GB" or "25%" of all experts. `cache`: which
        used slab leaves its slot first, or `none` to keep nothing. `tier`, `host_budget`, `pack_dir`, `slab_dtype`:
        see `open_store`. `store`: an opened one for this checkpoint, which stays open when the engine closes; then
        those four are ignored. Raises `UsageError` for a checkpoint or budget that cannot be served.
        """
        device = torch.device(device)
        source = checkpoint if isinstance(checkpoint, SourceCheckpoint) else open_checkpoint(str(checkpoint))
        config = PreGatedSwitchTransformersConfig.of_checkpoint(source.config)
        family = switch_expert_family(config)
        dtype = serving_dtype(config, source, family)
        layout = SlabLayout.of(family, dtype)
        num_slots = slots_within(device_budget, policy, family, layout.slab_bytes)
        model = _without_experts(config, str(checkpoint), source, device, dtype)
        trace, counters = Trace(device), Counters()
        own_store = store is None
        if store is None:
            store = open_store(
                source, tier=tier, device=device, pack_dir=pack_dir, slab_dtype=slab_dtype, host_budget=host_budget
            )
        mover: Mover | None = None
        try:
            slots_NB = _allocate_slots(num_slots, layout, device)
            if device.type == "cuda":
                mover = CudaMover(store, trace, counters, io_threads, device)
            else:
                mover = ThreadMover(store, trace, counters, io_threads)
            keep = cache is not CacheRule.none or policy is Policy.gpu_only
            return cls(model, family, store, mover, slots_NB, policy, trace, counters, keep)
        except BaseException:
            if mover is not None:
                mover.close()
            if own_store:
                store.close()
            raise

    @torch.inference_mode()
    def forward(self, **inputs: Any) -> Any:
        """One teacher-forced call of the model: same arguments and result as its `forward`."""
        try:
            return self.model(**inputs)
        finally:
            self._scheduler.settle()

    @torch.inference_mode()
    def generate(self, **inputs: Any) -> Any:
        """Hugging Face `generate` with the engine's policy; takes and returns the same. The engine stays usable
        after an error."""
        try:
            return self.model.generate(**inputs)
        finally:
            self._scheduler.settle()

    def reset_counters(self) -> None:
        for name in self.counters.to_dict():
            setattr(self.counters, name, 0)

    def close(self) -> None:
        self._scheduler.settle()
        self._mover.close()
        self._store.close()
        self.model.set_listener(None)

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

            block.layer_module.register_forward_pre_hook(begin)
            block.layer_module.register_forward_hook(end)

    def _on_route(self, stack: str, block: int, routing: Routing) -> None:
        if self.policy is Policy.pre_gated:
            self._scheduler.request(self._moves.on_route(stack, block, routed_experts(routing)))


def _allocate_slots(num_slots: int, layout: SlabLayout, device: torch.device) -> Tensor:
    size = num_slots * layout.slab_bytes
    try:
        flat = aligned_bytes(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise DeviceFullError(
            f"{num_slots} slots need {human_bytes(size)} on {device}, which has not that much free: lower "
            "engine.device_budget."
        ) from error
    return flat.view(num_slots, layout.slab_bytes)


def _without_experts(
    config: PreGatedSwitchTransformersConfig,
    checkpoint: str,
    source: SourceCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
) -> PreGatedSwitchTransformersForConditionalGeneration:
    """The model with everything but its experts on `device`; the experts' tensors stay unread."""
    setattr(config, WITHOUT_EXPERTS, True)
    with torch.device("meta"):
        model = PreGatedSwitchTransformersForConditionalGeneration(config)
    wanted = [name for name in model.state_dict() if name in source.tensors]
    # one at a time and the largest first: a tensor's mapped pages are resident memory beside its copy
    for name in sorted(wanted, key=source.num_bytes, reverse=True):
        owned = source.read([name])[name].to(device=device, dtype=dtype, copy=True)
        model.load_state_dict({name: owned}, assign=True, strict=False)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise UsageError(f"{source.directory} lacks {missing[0]} (and {len(missing) - 1} more): convert it again.")
    # asked for by name, because of a hub id only the weights are here so far
    for file in side_files(checkpoint, names=("generation_config.json",)) if source.files else ():
        model.generation_config = GenerationConfig.from_pretrained(file.parent)
    model.requires_grad_(False)
    return model.eval()
