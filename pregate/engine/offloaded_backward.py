"""Offloaded experts that gradients flow through: to the hidden states and to the combine weights, not to the experts.

The forward pass saves a block's input and its route, and nothing of single experts. The backward pass fetches the
experts of a block again, computes one after the other again, and differentiates each at once; meanwhile the experts of
the block before it are fetched. Knows nothing about models, losses or optimizers.

Letters: T tokens, K experts per token, N tokens of one expert or of all, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pregate.engine.fetch_order import by_use
from pregate.engine.offloaded_experts import Arithmetic, OffloadedExperts
from pregate.models.expert_math import Factor, Grouping, group_by_expert, in_dtype
from pregate.models.experts import ExpertKey
from pregate.models.linear import active_autocast_dtype


class BackwardOrder:
    """The experts of each block of a forward pass. From these the backward pass knows what it needs next.

    The blocks of a model share one, which begins anew with each pass.
    """

    def __init__(self) -> None:
        self._passed: dict[tuple[str, int], list[ExpertKey]] = {}
        self._order: list[tuple[str, int]] = []

    def clear(self) -> None:
        self._passed.clear()
        self._order.clear()

    def passed(self, stack: str, block: int, experts: list[ExpertKey]) -> None:
        """The forward pass is at a block. A layer that is recomputed for its gradients comes there again, which changes
        nothing."""
        if (stack, block) not in self._passed:
            self._passed[stack, block] = experts
            self._order.append((stack, block))

    def next(self, stack: str, block: int) -> list[ExpertKey]:
        """What the backward pass needs after this block; nothing at its end."""
        place = self._order.index((stack, block))
        return self._passed[self._order[place - 1]] if place else []


class DifferentiableExperts(OffloadedExperts):
    """One block's experts, frozen. They compute in the dtype that resident experts compute in: that of autocast, or
    that of the hidden states."""

    def __init__(self, *args: Any, order: BackwardOrder) -> None:
        super().__init__(*args)
        self._order = order
        # a module, so that what sets the dropout of a model finds it
        self.dropout = None if self._family.dropout is None else nn.Dropout(self._family.dropout)

    def forward(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not (hidden_TD.requires_grad or weights_TK.requires_grad):
            return super().forward(hidden_TD, expert_ids_TK, weights_TK)
        grouping = group_by_expert(expert_ids_TK)
        self._order.passed(self._stack, self._block, self._keys(grouping))
        block = partial(self._all_tokens, grouping=grouping), partial(self._gradients, grouping=grouping)
        return _Block.apply(hidden_TD, weights_TK, *block, self._arithmetic())  # type: ignore[no-any-return]

    def _keys(self, grouping: Grouping) -> list[ExpertKey]:
        return [ExpertKey(self._stack, self._block, expert) for expert, _, _ in by_use(grouping)]

    def _arithmetic(self) -> Arithmetic:
        """Under the autocast that is in force now, also where it is called later. A training step draws a seed from the
        CPU's generator: experts compute in the order of their arrival, which is not the same twice, so that each has a
        generator of its own."""
        rate = self.dropout.p if self.dropout is not None and self.training else 0.0
        seed = int(torch.randint(2**62, ())) if rate else 0
        kind = self._matrices.device.type
        dtype = active_autocast_dtype(kind)

        def result(key: ExpertKey, matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
            factors = [in_dtype(matrix, dtype or hidden_ND.dtype) for matrix in matrices]
            with torch.autocast(kind, dtype, enabled=dtype is not None):
                if not rate:
                    return self._family.apply(factors, hidden_ND)
                return self._family.apply(factors, hidden_ND, partial(_dropped, rate=rate, seed=seed + key.expert))

        return result

    def _gradients(
        self,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        grad_TD: Tensor,
        arithmetic: Arithmetic,
        through_hidden: bool,
        *,
        grouping: Grouping,
    ) -> tuple[Tensor | None, Tensor]:
        """Those of the hidden states, if they are asked for, and of the combine weights."""
        token_N = grouping.order // weights_TK.shape[1]
        hidden_ND, grad_ND = hidden_TD[token_N], grad_TD[token_N]
        weights_N = weights_TK.reshape(-1)[grouping.order]
        grad_weights_N = torch.zeros_like(weights_N)
        runs = {expert: slice(first, last) for expert, first, last in grouping}
        wanted = self._keys(grouping)
        self._scheduler.request(wanted, urgent=True)
        self._scheduler.request(self._order.next(self._stack, self._block))
        for key in self._scheduler.in_order_of_arrival(wanted):
            run, matrices = runs[key.expert], self._matrices[self._scheduler.acquire(key)]
            with self._trace.span("compute", key.label), torch.set_grad_enabled(through_hidden):
                entered_ND = hidden_ND[run].detach().requires_grad_(through_hidden)
                result_ND = arithmetic(key, matrices, entered_ND)
            # weights may be wider than the results, see `combine`
            wide_ND = grad_ND[run].to(torch.result_type(result_ND, weights_N))
            grad_weights_N[run] = (wide_ND * result_ND.detach()).sum(-1).to(weights_N.dtype)
            if through_hidden:
                slope_ND = (wide_ND * weights_N[run, None]).to(result_ND.dtype)
                (slope_ND,) = torch.autograd.grad(result_ND, entered_ND, slope_ND)
                # nothing reads these tokens any more
                hidden_ND[run] = slope_ND
            self._scheduler.release(key)
        self._scheduler.finish_block(self._stack, self._block)
        grad_TK = weights_TK.new_zeros(weights_TK.numel()).index_copy(0, grouping.order, grad_weights_N)
        grad_TK = grad_TK.view_as(weights_TK)
        if not through_hidden:
            return None, grad_TK
        spread = hidden_TD.new_zeros(weights_TK.numel(), hidden_TD.shape[1]).index_copy(0, grouping.order, hidden_ND)
        return spread.view(*weights_TK.shape, -1).sum(1), grad_TK


class _Block(torch.autograd.Function):
    """`forward_pass` and `backward_pass` are `_all_tokens` and `_gradients` of one call."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        forward_pass: Callable[..., Tensor],
        backward_pass: Callable[..., tuple[Tensor | None, Tensor]],
        arithmetic: Arithmetic,
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, weights_TK)
        ctx.backward_pass, ctx.arithmetic = backward_pass, arithmetic
        return forward_pass(hidden_TD, weights_TK=weights_TK, arithmetic=arithmetic)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        hidden_TD, weights_TK = ctx.saved_tensors
        grads = ctx.backward_pass(hidden_TD, weights_TK, grad_TD, ctx.arithmetic, ctx.needs_input_grad[0])
        return (*grads, None, None, None)


def _dropped(active_NF: Tensor, rate: float, seed: int) -> Tensor:
    """Dropout by a generator of its own: the same each time."""
    generator = torch.Generator(active_NF.device).manual_seed(seed)
    kept_NF = torch.empty_like(active_NF).bernoulli_(1 - rate, generator=generator)
    return active_NF * kept_NF.div_(1 - rate)
