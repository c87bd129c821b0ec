"""The losses of a language-modelling head without its logits, a few rows of them at a time: cross-entropy, and the
divergence from a teacher's logits.

With a vocabulary of 32,000 the logits of a training batch, their softmax and their gradient are each larger than the
rest of a small model's memory traffic, and on a CPU they leave every cache. Here a block of rows is projected, its
loss taken and its gradient multiplied back before the next block takes its place. The weight's gradient may wait for
a few blocks. Knows nothing about models.

Letters: N positions, D model width, V vocabulary, B rows of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pregate.models.linear import ROWS, active_autocast_dtype, is_plain

IGNORED = -100
"""Label of a position that carries no target token."""
BLOCK_NUMBERS = {"cpu": 2**22, "cuda": 2**27}
"""Logits that are in memory together. On a CPU 16 MB, which stay in its cache. In a short dtype the gradients of
`BLOCKS_A_PRODUCT` blocks are held."""
BLOCKS_A_PRODUCT = 8
"""In a short dtype on a CPU, blocks whose part of the weight's gradient is one product. Each product writes a matrix of
the weight's size, which is then added to the sum; in float32 a product adds to the sum by itself."""


class Lesson(NamedTuple):
    """What a teacher says of the target tokens: its logits (N, V), the weight of the divergence from them, and the
    temperature that softens both, see `kl_sum`."""

    logits_NV: Tensor
    weight: float
    temperature: float


def head_losses(
    head: nn.Module, states_ND: Tensor, labels_N: Tensor, lesson: Lesson | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of the logits `head(states)` in fp32, summed over the positions whose label is not `IGNORED`; and its
    terms, detached: the cross-entropy and the KL from the teacher of `lesson`, which the loss holds times its weight.

    `lesson` has a row for each such position. A plain linear layer makes no logits, see `linear_losses`; anything else
    is called.
    """
    if is_plain(head) and head.bias is None:
        return linear_losses(states_ND, head.weight, labels_N, lesson)
    kept = labels_N != IGNORED
    logits_NV = head(states_ND[kept]).float()
    cross_entropy = F.cross_entropy(logits_NV, labels_N[kept], reduction="sum")
    if lesson is None:
        return cross_entropy, torch.stack([cross_entropy, torch.zeros_like(cross_entropy)]).detach()
    divergence = kl_sum(logits_NV, lesson.logits_NV, lesson.temperature)
    terms = torch.stack([cross_entropy, divergence])
    return cross_entropy + lesson.weight * divergence, terms.detach()


def kl_sum(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over rows of T² KL(softmax(teacher / T) || softmax(student / T)), in fp32.

    The soft targets of Hinton et al. (2015, "Distilling the knowledge in a neural network", section 2), whose
    cross-entropy differs from this by the teacher's entropy, a constant; T² keeps the size of the gradients when T
    changes. `student_NV` and `teacher_NV` are logits.
    """
    student = (student_NV.float() / temperature).log_softmax(-1)
    teacher = (teacher_NV.float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") * temperature**2


def linear_losses(
    states_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, lesson: Lesson | None = None
) -> tuple[Tensor, Tensor]:
    """`head_losses` of the logits `states @ weight.T`.

    Equal within rounding to those of the whole logits, in value and gradients. Under autocast the products are in its
    dtype, the softmax and the gradient of the weight in fp32.
    """
    kept = (labels_N != IGNORED).nonzero()[:, 0]
    if kept.numel() < labels_N.numel():
        states_ND, labels_N = states_ND[kept], labels_N[kept]
    if not torch.is_grad_enabled():
        # an autograd function sees which inputs could have a gradient, and not that gradients are off
        states_ND, weight_VD = states_ND.detach(), weight_VD.detach()
    return _LinearLosses.apply(states_ND, weight_VD, labels_N, lesson)  # type: ignore[no-any-return]


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, lesson: Lesson | None
    ) -> tuple[Tensor, Tensor]:
        kind = states_ND.device.type
        dtype = active_autocast_dtype(kind) or states_ND.dtype
        need_states, need_weight = ctx.needs_input_grad[:2]
        terms = torch.zeros(2, device=states_ND.device)
        grad_ND = torch.empty_like(states_ND) if need_states else None
        grad = _WeightGradient(BLOCKS_A_PRODUCT if kind == "cpu" and dtype.itemsize < 4 else 1) if need_weight else None
        block = max(1, BLOCK_NUMBERS.get(kind, BLOCK_NUMBERS["cuda"]) // weight_VD.shape[0])
        block = block // ROWS * ROWS or block
        with torch.autocast(kind, enabled=False):
            factor_VD = weight_VD.to(dtype)
            for first in range(0, len(states_ND), block):
                part = slice(first, first + block)
                states_BD, labels_B1 = _filled_up(states_ND[part].to(dtype)), labels_N[part, None]
                count = len(labels_B1)
                logits_BV = F.linear(states_BD, factor_VD)[:count].float()
                pull_BV = None if lesson is None else _divergence(logits_BV, lesson, part, terms)
                chosen_B1 = logits_BV.gather(1, labels_B1)
                most_B1 = logits_BV.amax(1, keepdim=True)
                logits_BV.sub_(most_B1).exp_()
                sum_B1 = logits_BV.sum(1, keepdim=True)
                terms[0] += (sum_B1.log() + most_B1 - chosen_B1).sum()
                if not (need_states or need_weight):
                    continue
                logits_BV.div_(sum_B1).scatter_add_(1, labels_B1, -torch.ones_like(sum_B1))
                if pull_BV is not None:
                    logits_BV.add_(pull_BV)
                slope_BV = _filled_up(logits_BV.to(dtype))
                if grad_ND is not None:
                    grad_ND[part] = (slope_BV @ factor_VD)[:count].to(grad_ND.dtype)
                if grad is not None:
                    grad.add(slope_BV, states_BD)
            grad_VD = None if grad is None else grad.total(weight_VD)
        ctx.save_for_backward(grad_ND, grad_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(terms)
        return terms[0].clone() if lesson is None else terms[0] + lesson.weight * terms[1], terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_ND, grad_VD = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_ND is None else grad_ND * scale.to(grad_ND.dtype),
            # in place: of the size of the weight, and nobody else has it
            None if grad_VD is None else grad_VD.mul_(scale).to(ctx.weight_dtype),
            None,
            None,
        )


class _WeightGradient:
    """The gradient of the head's weight in fp32, from several blocks of rows at a time."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._held: list[tuple[Tensor, Tensor]] = []
        self._sum_VD: Tensor | None = None

    def add(self, slope_BV: Tensor, states_BD: Tensor) -> None:
        self._held.append((slope_BV, states_BD))
        if len(self._held) == self._blocks:
            self._multiply()

    def total(self, weight_VD: Tensor) -> Tensor:
        if self._held:
            self._multiply()
        return torch.zeros_like(weight_VD, dtype=torch.float32) if self._sum_VD is None else self._sum_VD

    def _multiply(self) -> None:
        slopes, states = zip(*self._held, strict=True)
        self._held.clear()
        slope_NV, states_ND = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (slopes, states))
        if self._sum_VD is None:
            self._sum_VD = (slope_NV.t() @ states_ND).float()
        elif slope_NV.dtype == torch.float32:
            self._sum_VD.addmm_(slope_NV.t(), states_ND)
        else:
            self._sum_VD += slope_NV.t() @ states_ND


def _divergence(logits_BV: Tensor, lesson: Lesson, part: slice, terms: Tensor) -> Tensor:
    """Add the `kl_sum` of the rows `part` to `terms`; its gradient to `logits_BV`, times the weight: w T (q - p)."""
    temperature = lesson.temperature
    teacher_BV = (lesson.logits_NV[part].float() / temperature).log_softmax(-1)
    student_BV = (logits_BV / temperature).log_softmax(-1)
    p_BV = teacher_BV.exp()
    terms[1] += temperature**2 * teacher_BV.sub_(student_BV).mul_(p_BV).sum()
    return student_BV.exp_().sub_(p_BV).mul_(lesson.weight * temperature)


def _filled_up(rows_BC: Tensor) -> Tensor:
    """On a CPU and in a short dtype, with rows of zeros up to a multiple of `ROWS`, which makes products faster."""
    missing = -len(rows_BC) % ROWS if rows_BC.device.type == "cpu" and rows_BC.element_size() < 4 else 0
    return F.pad(rows_BC, (0, 0, 0, missing)) if missing else rows_BC
