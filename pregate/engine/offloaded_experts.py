"""The module in the place of a block's resident experts: same call, same arithmetic, slabs from slots.

Knows nothing about model families beyond `ExpertSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pregate.engine.fetch_order import by_use
from pregate.engine.fetching import Fetcher
from pregate.engine.scheduler import Scheduler
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.trace import Trace
from pregate.models.expert_math import Factor, Grouping, combine, group_by_expert, in_dtype
from pregate.models.experts import ExpertKey, ExpertSpec
from pregate.models.routing import DROPPED

Arithmetic = Callable[[ExpertKey, Sequence[Factor], Tensor], Tensor]
"""An expert, its matrices and its tokens (N, D) to its results (N, D)."""
FEW_ROWS = 16
"""Up to so many rows an expert computes as many as it has."""
HALVES = (torch.bfloat16, torch.float16)
"""The dtypes in which a CPU compiles a kernel for each shape of a product."""


def run_of(first: int, last: int, num_rows: int) -> tuple[int, int]:
    """The rows that an expert on a CPU computes for its own, `first` to `last` of `num_rows`: these and neighbours,
    whose results nobody reads, so that their number is one of eight between two powers of two.

    In half precision oneDNN compiles a kernel for each number of rows and keeps it, about 1 MB, and compiling takes
    longer than computing.
    """
    length = last - first
    if length <= FEW_ROWS:
        return first, last
    step = max(FEW_ROWS, 1 << (length - 1).bit_length() - 4)
    length = min(-(-length // step) * step, num_rows)
    first = min(first, num_rows - length)
    return first, first + length


class SlotMatrices:
    """What the expert in a slot multiplies with, in the compute dtype. Matrices of quantised slabs pass through one
    scratch place and are valid until the next call."""

    def __init__(self, slots_NB: Tensor, layout: SlabLayout) -> None:
        self._slots_NB, self._layout = slots_NB, layout
        self._views: list[list[Tensor]] | None = None
        self._scratch = layout.scratch(slots_NB.device)
        if not layout.is_quantised:
            self._views = [layout.views(slab_B, layout.products) for slab_B in slots_NB]

    @property
    def device(self) -> torch.device:
        return self._slots_NB.device

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
    """One block's experts. Fetches what the policy has not fetched already, and computes in the order of arrival.

    few_sizes: in half precision on a CPU, let experts compute one of few numbers of rows (`run_of`). It saves memory
    and rounds otherwise than the resident model.
    """

    few_sizes = False

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
        if len(hidden_TD) == 1:
            return self._one_token(hidden_TD, expert_ids_TK[0].tolist(), weights_TK)
        return self._all_tokens(hidden_TD, group_by_expert(expert_ids_TK), weights_TK, self._arithmetic())

    def _arithmetic(self) -> Arithmetic:
        """What an expert computes in this call."""

        def apply(_: ExpertKey, matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
            return self._family.apply([in_dtype(matrix, hidden_ND.dtype) for matrix in matrices], hidden_ND)

        return apply

    def _run(self, first: int, last: int, gathered_ND: Tensor) -> tuple[int, int]:
        """The rows of `gathered_ND` that an expert computes for its own, `first` to `last`."""
        halves_on_cpu = gathered_ND.device.type == "cpu" and gathered_ND.dtype in HALVES
        return run_of(first, last, len(gathered_ND)) if self.few_sizes and halves_on_cpu else (first, last)

    def _all_tokens(self, hidden_TD: Tensor, grouping: Grouping, weights_TK: Tensor, arithmetic: Arithmetic) -> Tensor:
        gathered_ND = hidden_TD[grouping.order // weights_TK.shape[1]]
        runs = {expert: self._run(first, last, gathered_ND) for expert, first, last in by_use(grouping)}
        tokens = {expert: gathered_ND[first:last] for expert, (first, last) in runs.items()}
        results = self._compute(tokens, arithmetic)
        if not results:
            return torch.zeros_like(hidden_TD)
        own = [results[expert][first - runs[expert][0] :][: last - first] for expert, first, last in grouping]
        return combine(torch.cat(own), grouping, weights_TK, hidden_TD)

    def _one_token(self, hidden_1D: Tensor, experts: list[int], weights_1K: Tensor) -> Tensor:
        """Nothing to sort, gather or put back."""
        results = self._compute({expert: hidden_1D for expert in experts if expert != DROPPED}, self._arithmetic())
        if not results:
            return torch.zeros_like(hidden_1D)
        if len(experts) == 1:
            return (results[experts[0]] * weights_1K).to(hidden_1D.dtype)
        nothing = torch.zeros_like(hidden_1D) if DROPPED in experts else hidden_1D
        result_KD = torch.cat([results.get(expert, nothing) for expert in experts])
        return (result_KD * weights_1K.T).sum(0, keepdim=True).to(hidden_1D.dtype)

    def _compute(self, tokens: dict[int, Tensor], arithmetic: Arithmetic) -> dict[int, Tensor]:
        """The output of each expert for its tokens. Experts are asked for in the order of `tokens`."""
        stack, block = self._stack, self._block
        wanted = [ExpertKey(stack, block, expert) for expert in tokens]
        self._fetcher.on_enter(stack, block, wanted)
        results = {
            key.expert: self._one_expert(key, tokens[key.expert], arithmetic)
            for key in self._scheduler.in_order_of_arrival(wanted)
        }
        self._scheduler.finish_block(stack, block)
        return results

    def _one_expert(self, key: ExpertKey, hidden_ND: Tensor, arithmetic: Arithmetic) -> Tensor:
        slot = self._scheduler.acquire(key)
        with self._trace.span("compute", key.label):
            result_ND = arithmetic(key, self._matrices[slot], hidden_ND)
        self._scheduler.release(key)
        return result_ND
