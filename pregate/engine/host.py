"""The host's way to drive a model whose experts are elsewhere: routes and blocks start fetches, blocks wait for them.

The host-driven engine is made of it, and the device-driven engine begins prompts with it. Knows slots, movers and the
model's MoE blocks; knows nothing about requests or whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pregate.config import CacheRule, Policy
from pregate.engine.fetch_order import routed_experts
from pregate.engine.fetching import Fetcher
from pregate.engine.io.make_mover import make_mover
from pregate.engine.offloaded_experts import OffloadedExperts, SlotMatrices
from pregate.engine.scheduler import Scheduler
from pregate.engine.slot_cache import SlotTable
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertSpec
from pregate.models.routing import Routing


class HostDriver:
    """Puts offloaded experts into `model`, which it computes with over `slots_NB` (slots, bytes) until `close`.
    `experts`: their class, or what makes one with the same arguments."""

    def __init__(
        self,
        model: Any,
        family: ExpertSpec,
        store: Store,
        slots_NB: Tensor,
        policy: Policy,
        cache: CacheRule,
        io_threads: int,
        host_buffers: int,
        io_uring: bool,
        experts: Callable[..., OffloadedExperts] = OffloadedExperts,
    ) -> None:
        self.trace, self.counters = Trace(slots_NB.device), Counters()
        self.mover = make_mover(store, self.trace, self.counters, io_threads, slots_NB, host_buffers, io_uring)
        self.matrices = SlotMatrices(slots_NB, store.layout)
        self.num_slots = len(slots_NB)
        self._family, self._keys, self._slots_NB = family, family.keys(), slots_NB
        self._is_resident = policy is Policy.gpu_only
        table = SlotTable(self.num_slots, CacheRule.lru if self._is_resident else cache)
        # `data`: what a mover copies into one slot must not count as a change of another that a gradient still needs
        self.scheduler = Scheduler(list(slots_NB.data), table, self.mover, self.trace, self.counters)
        self._fetcher = Fetcher(policy, family, self.scheduler)
        self._hooks: list[Any] = []
        self._models: list[Any] = []
        self._experts = experts
        self.put_into(model)
        self._cut_short = False

    def put_into(self, model: Any) -> None:
        """Put the experts into a model. Several models with the same experts may take turns."""
        for block in model.moe_blocks():
            block.module.experts = self._experts(
                self._family, block.stack, block.index, self.matrices, self.scheduler, self._fetcher, self.trace
            ).train(model.training)
            self._time_layer(block)
        model.set_listener(self.on_route)
        self._models.append(model)

    def on_route(self, stack: str, block: int, routing: Routing) -> None:
        """What the model's listener is."""
        if self._fetcher.reads_routes:
            self._fetcher.on_route(stack, block, routed_experts(routing))

    @torch.inference_mode()
    def run(self, call: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """A call of the model, or of a part of it. After an error or an interrupt the next call is served as well."""
        with self.serving():
            return call(**inputs)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """For one or several calls of the model: whatever they leave under way has come to an end behind them."""
        # a second interrupt can cut the reset below short as well
        if self._cut_short:
            self.scheduler.reset()
        self._cut_short = True
        try:
            yield
            self.scheduler.settle()
        except BaseException:
            self.scheduler.reset()
            self._cut_short = False
            raise
        self._cut_short = False

    def load_all(self) -> None:
        """For `gpu_only`: slot i holds the i-th of `family.keys()` from now on."""
        self.scheduler.request(self._keys)
        self.scheduler.settle()

    def lend_slots(self) -> Tensor:
        """The slots, for another driver to fill until the next `run`. What they hold is forgotten, except with
        `gpu_only`, where they hold what `load_all` says."""
        if not self._is_resident:
            self.scheduler.reset()
        elif any(self.scheduler.slot_of(key) != slot for slot, key in enumerate(self._keys)):
            # a call that was cut short has forgotten them
            self.scheduler.reset()
            self.load_all()
        return self._slots_NB

    def reset_counters(self) -> None:
        for name in self.counters.to_dict():
            setattr(self.counters, name, 0)

    def expected_bytes(self) -> dict[str, int]:
        """What this takes by its own account, without activations: the weights that are not experts, the slots, the
        scratch for dequantised experts, and the host memory that slabs move through (`staging`)."""
        parts = [part for model in self._models for part in (*model.parameters(), *model.buffers())]
        weights = {id(part): part.nbytes for part in parts}
        return {
            "non_expert": sum(weights.values()),
            "slots": self._slots_NB.nbytes,
            "scratch": self.matrices.scratch_bytes,
            "staging": self.mover.host_bytes,
        }

    def close(self) -> None:
        """Give back threads and memory, though something may still refer to this. May be called again."""
        self.scheduler.reset()
        self.mover.close()
        self.scheduler.forget_slots()
        self.matrices.forget_slots()
        self._slots_NB = self._slots_NB[:0].clone()
        for model in self._models:
            model.set_listener(None)
        for hook in self._hooks:
            hook.remove()

    def _time_layer(self, block: Any) -> None:
        """Record a span in lane `layer` for each call of the whole transformer layer that holds an MoE block."""
        begun: list[Any] = []
        trace, name = self.trace, f"{block.stack} block {block.index}"

        def begin(*_: Any) -> None:
            begun[:] = [trace.mark()] if trace.enabled else []

        def end(*_: Any) -> None:
            if begun and trace.enabled:
                trace.add("layer", name, begun.pop(), trace.mark())

        self._hooks.append(block.layer_module.register_forward_pre_hook(begin))
        self._hooks.append(block.layer_module.register_forward_hook(end))
