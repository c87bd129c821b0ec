"""The module in the place of a block's resident experts: same call, same arithmetic, slabs from slots.

Knows nothing about model families beyond `ExpertSpec`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pregate.engine.fetching import Fetcher
from pregate.engine.scheduler import Scheduler
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.trace import Trace
from pregate.models.expert_math import Factor, combine, group_by_expert
from pregate.models.family import ExpertKey, ExpertSpec
from pregate.models.routing import DROPPED, Routing


class SlotMatrices:
    """The matrices of the expert in a slot, in the compute dtype. Those of quantised slabs pass through one scratch
    place and are valid until the next call."""

    def __init__(self, slots_NB: Tensor, layout: SlabLayout) -> None:
        self._slots_NB, self._layout = slots_NB, layout
        self._views: list[list[Tensor]] | None = None
        self._scratch = layout.scratch(slots_NB.device)
        if not layout.is_quantised:
            self._views = [layout.views(slab_B) for slab_B in slots_NB]

    @property
    def scratch_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self._scratch)

    def forget_slots(self) -> None:
        """For an engine that is closed, so that its memory is free though the engine is still referred to."""
        self._slots_NB, self._views, self._scratch = self._slots_NB[:0].clone(), [], []

    def __getitem__(self, slot: int) -> Sequence[Factor]:
        if self._views is not None:
            return self._views[slot]
        return self._layout.factors(self._slots_NB[slot], self._scratch)


class OffloadedExperts(nn.Module):
    """One block's experts. Fetches what the policy has not fetched already, and computes in the order of arrival."""

    def __init__(
        self,
        family: ExpertSpec,
        stack: str,
        block: int,
        matrices: SlotMatrices,
        scheduler: Scheduler,
        fetcher: Fetcher,
        trace: Trace,
    ) -> None:
        super().__init__()
        self._family, self._matrices, self._trace = family, matrices, trace
        self._scheduler, self._fetcher = scheduler, fetcher
        self._stack, self._block = stack, block

    def forward(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if expert_ids_TK.numel() == 1:
            return self._one_choice(hidden_TD, int(expert_ids_TK), weights_TK)
        grouping = group_by_expert(expert_ids_TK)
        runs = {ExpertKey(self._stack, self._block, e): (first, last) for e, first, last in grouping.groups}
        by_use = sorted(runs, key=lambda key: runs[key][0] - runs[key][1])
        self._fetcher.on_enter(self._stack, self._block, by_use)
        results: dict[ExpertKey, Tensor] = {}
        if runs:
            gathered_ND = hidden_TD[grouping.order // weights_TK.shape[1]]
            for key in self._scheduler.in_order_of_arrival(by_use):
                first, last = runs[key]
                results[key] = self._apply(key, gathered_ND[first:last])
        self._scheduler.finish_block(self._stack, self._block)
        if not runs:
            return torch.zeros_like(hidden_TD)
        return combine(torch.cat([results[key] for key in runs]), grouping, weights_TK, hidden_TD)

    def _one_choice(self, hidden_1D: Tensor, expert: int, weight_11: Tensor) -> Tensor:
        """One token, one expert: nothing to sort, gather or put back."""
        key = ExpertKey(self._stack, self._block, expert)
        self._fetcher.on_enter(self._stack, self._block, [key] if expert != DROPPED else [])
        output_1D = torch.zeros_like(hidden_1D)
        if expert != DROPPED:
            output_1D = (self._apply(key, hidden_1D) * weight_11).to(hidden_1D.dtype)
        self._scheduler.finish_block(self._stack, self._block)
        return output_1D

    def _apply(self, key: ExpertKey, hidden_ND: Tensor) -> Tensor:
        slot = self._scheduler.acquire(key)
        with self._trace.span("compute", key.label):
            result_ND = self._family.apply(self._matrices[slot], hidden_ND)
        self._scheduler.release(key)
        return result_ND


def routed_experts(routing: Routing) -> Sequence[int]:
    """The ids a route uses, by how many tokens they serve, most first."""
    if routing.expert_ids_BTK.numel() == 1:
        only = int(routing.expert_ids_BTK)
        return [only] if only != DROPPED else []
    ids, counts = routing.expert_ids_BTK[routing.expert_ids_BTK != DROPPED].unique(return_counts=True)
    return ids[counts.argsort(descending=True, stable=True)].tolist()
