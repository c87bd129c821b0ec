"""Cross-entropy of a language-modelling head without its logits: a few rows of them at a time.

With a vocabulary of 32,000 the logits of a training batch, their softmax and their gradient are each larger than the
rest of a small model's memory traffic, and on a CPU they leave every cache. Here a block of rows is projected, its
loss taken and its gradient multiplied back before the next block takes its place. Knows nothing about models.

Letters: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pregate.models.linear import ROWS, is_plain

IGNORED = -100
"""Label of a position that carries no target token."""
BLOCK_NUMBERS = {"cpu": 2**22, "cuda": 2**27}
"""Logits that are in memory together. On a CPU 16 MB, which stay in its cache."""


def head_cross_entropy(head: nn.Module, states_ND: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of the logits `head(states)` in fp32, summed over the positions whose label is not `IGNORED`.

    A plain linear layer makes no logits, see `linear_cross_entropy`; anything else is called.
    """
    if is_plain(head) and head.bias is None:
        return linear_cross_entropy(states_ND, head.weight, labels_N)
    kept = labels_N != IGNORED
    return F.cross_entropy(head(states_ND[kept]).float(), labels_N[kept], reduction="sum")


def linear_cross_entropy(states_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy of `states @ weight.T` in fp32, summed over the positions whose label is not `IGNORED`.

    Equal within rounding to `F.cross_entropy` on the whole logits, in value and gradients. Under autocast the products
    are in its dtype, the softmax and the gradient of the weight in fp32.
    """
    kept = (labels_N != IGNORED).nonzero()[:, 0]
    if kept.numel() < labels_N.numel():
        states_ND, labels_N = states_ND[kept], labels_N[kept]
    if not torch.is_grad_enabled():
        # an autograd function sees which inputs could have a gradient, and not that gradients are off
        states_ND, weight_VD = states_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(states_ND, weight_VD, labels_N)  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        kind = states_ND.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states_ND.dtype
        need_states, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), device=states_ND.device)
        grad_ND = torch.empty_like(states_ND) if need_states else None
        grad_VD: Tensor | None = None
        block = max(1, BLOCK_NUMBERS.get(kind, BLOCK_NUMBERS["cuda"]) // weight_VD.shape[0])
        block = block // ROWS * ROWS or block
        with torch.autocast(kind, enabled=False):
            factor_VD = weight_VD.to(dtype)
            for first in range(0, len(states_ND), block):
                part = slice(first, first + block)
                states_BD, labels_B1 = _filled_up(states_ND[part].to(dtype)), labels_N[part, None]
                count = len(labels_B1)
                logits_BV = F.linear(states_BD, factor_VD)[:count].float()
                chosen_B1 = logits_BV.gather(1, labels_B1)
                most_B1 = logits_BV.amax(1, keepdim=True)
                logits_BV.sub_(most_B1).exp_()
                sum_B1 = logits_BV.sum(1, keepdim=True)
                total += (sum_B1.log() + most_B1 - chosen_B1).sum()
                if not (need_states or need_weight):
                    continue
                logits_BV.div_(sum_B1).scatter_add_(1, labels_B1, -torch.ones_like(sum_B1))
                slope_BV = _filled_up(logits_BV.to(dtype))
                if grad_ND is not None:
                    grad_ND[part] = (slope_BV @ factor_VD)[:count].to(grad_ND.dtype)
                if need_weight and grad_VD is None:
                    grad_VD = (slope_BV.t() @ states_BD).float()
                elif grad_VD is not None and dtype == torch.float32:
                    grad_VD.addmm_(slope_BV.t(), states_BD)
                elif grad_VD is not None:
                    grad_VD += slope_BV.t() @ states_BD
        if need_weight and grad_VD is None:
            grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        (scale,) = grads
        return (
            None if grad_ND is None else grad_ND * scale.to(grad_ND.dtype),
            # in place: of the size of the weight, and nobody else has it
            None if grad_VD is None else grad_VD.mul_(scale).to(ctx.weight_dtype),
            None,
        )


def _filled_up(rows_BC: Tensor) -> Tensor:
    """On a CPU and in a short dtype, with rows of zeros up to a multiple of `ROWS`, which makes products faster."""
    missing = -len(rows_BC) % ROWS if rows_BC.device.type == "cpu" and rows_BC.element_size() < 4 else 0
    return F.pad(rows_BC, (0, 0, 0, missing)) if missing else rows_BC
