"""The engine for training: a model whose experts live elsewhere and stay as they are, and of which all else can learn.

    with TrainingEngine.open("checkpoint", device_budget="25%") as engine:
        with engine.step():
            engine.model(**batch).loss.backward()

Knows models, stores and budgets; knows nothing about losses, optimizers or files of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pregate.config import CacheRule, Policy, SlabDtype, Tier
from pregate.engine.base import Engine
from pregate.engine.budget import host_buffers_within, slabs_within
from pregate.engine.offloaded_backward import BackwardOrder, DifferentiableExperts
from pregate.engine.opening import Opened
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.storage.store import Store
from pregate.engine.trace import Counters
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.experts import ExpertSpec


def training_slots(budget: str | None, family: ExpertSpec, slab_bytes: int) -> int:
    """How many slots `engine.device_budget` buys for training: by default two blocks of experts, because a micro batch
    uses nearly all of a block's. Raises `UsageError` for a budget that holds no expert."""
    total = len(family.keys())
    if budget is None:
        return min(total, 2 * family.num_experts)
    return slabs_within("engine.device_budget", budget, total, slab_bytes)


class TrainingEngine(Engine):
    """A checkpoint to train without its experts. Use `open`; close it, or use it as a context manager.

    `model`: its parameters are in float32 and have gradients; the experts are none of them.
    """

    def __init__(self, opened: Opened, store: Store, *served: Any, order: BackwardOrder) -> None:
        super().__init__(opened, store, *served)
        self._opened, self._store, self._order = opened, store, order
        self._moved = 0
        self.model.requires_grad_(True)
        for expert in (block.module.experts for block in self.model.moe_blocks()):
            expert.requires_grad_(False)

    @classmethod
    def open(
        cls,
        checkpoint: str | Path | SourceCheckpoint,
        *,
        tier: Tier = Tier.auto,
        device: torch.device | str = "cpu",
        device_budget: str | None = None,
        host_budget: str | None = None,
        pack_dir: Path | None = None,
        io_threads: int = 2,
        io_uring: bool = True,
        slab_dtype: SlabDtype = SlabDtype.source,
        dtype: torch.dtype = torch.float32,
    ) -> TrainingEngine:
        """Open a pre-gated or conventional directory. The settings are those of `OffloadEngine.open`. `dtype`: of
        everything but the experts.

        Routes start fetches as soon as they are known, and slots keep what was used last: a backward pass begins where
        the forward pass ended. Raises `UsageError` for a checkpoint or a budget that does not do.
        """
        place, opened, order = torch.device(device), Opened(checkpoint), BackwardOrder()
        layout = opened.layout(slab_dtype)
        return cls._assemble(
            opened,
            layout,
            training_slots(device_budget, opened.family, layout.slab_bytes),
            lambda: opened.store(layout, tier, place, pack_dir),
            policy=Policy.pre_gated,
            cache=CacheRule.lru,
            device=place,
            io_threads=io_threads,
            host_buffers=host_buffers_within(host_budget, opened.family, layout.slab_bytes),
            io_uring=io_uring,
            experts=partial(DifferentiableExperts, order=order),
            dtype=dtype,
            order=order,
        )

    @contextmanager
    def step(self) -> Iterator[None]:
        """For a forward pass and its backward pass, or for passes without gradients. After an error or an interrupt the
        next one begins anew."""
        with self._served(), self.host.serving():
            self._order.clear()
            yield
        self._order.clear()

    def teacher(self, checkpoint: str | Path | SourceCheckpoint, dtype: torch.dtype) -> Any | None:
        """A frozen model in `dtype` that computes with the same slots, if `checkpoint` has the same experts as this
        model, else None. Its experts are read until one differs."""
        opened = Opened(checkpoint)
        family, layout = opened.family, self._store.layout
        own = SlabLayout.of(family, opened.dtype, layout.stored)
        if own != layout or family.keys() != self.family.keys() or not self._store.holds(opened.source, family):
            return None
        model = opened.model(self.host.matrices.device, dtype)
        self.host.put_into(model)
        return model

    @property
    def source(self) -> SourceCheckpoint:
        """What the engine was opened with: the experts are there."""
        return self._opened.source

    @property
    def layout(self) -> SlabLayout:
        return self._store.layout

    @property
    def counters(self) -> Counters:
        return self.host.counters

    def start_clock(self) -> None:
        """Begin to measure how long the computation waits for slabs."""
        self._moved = self.counters.bytes_moved
        self.host.trace.start(lanes=("wait",))

    def stop_clock(self) -> tuple[float, int]:
        """Since `start_clock`: milliseconds that the computation has waited, and bytes that were moved into slots."""
        waited_ms = sum(span.end_ms - span.start_ms for span in self.host.trace.stop())
        return waited_ms, self.counters.bytes_moved - self._moved
