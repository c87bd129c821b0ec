"""Dropout on a CPU from fewer random numbers: one 64-bit draw of torch's generator decides for four elements.

A probability is rounded to a multiple of 2^-16, and what is kept is scaled by the inverse of the rounded probability,
so that the expectation is exact. A saved and restored state of torch's generator gives the same numbers again. Knows
nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 2**16
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as a number of so many bytes."""


def dropped_levels(probability: float) -> int:
    """How many of the `LEVELS` values of a draw mean that an element is dropped."""
    return min(round(probability * LEVELS), LEVELS)


def draw_dropped(shape: Sequence[int], levels: int) -> Tensor:
    """int16, 1 where an element is dropped and 0 elsewhere: each with probability `levels` / `LEVELS`, at least one
    level and not all."""
    count = prod(shape)
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return drawn.view(torch.int16)[:count].view(shape).lt_(levels - LEVELS // 2)


def dropout(x: Tensor, probability: float) -> Tensor:
    """`x`, on a CPU and of any floating dtype, with elements dropped and the others scaled up."""
    levels = dropped_levels(probability)
    if levels == 0:
        return x
    return x * 0.0 if levels == LEVELS else _Dropout.apply(x, levels)  # type: ignore[no-any-return]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        kept = draw_dropped(x.shape, levels).sub_(1)  # all bits set where kept
        ctx.save_for_backward(kept)
        ctx.scale = LEVELS / (LEVELS - levels)
        return _masked(x, kept).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _masked(grad, kept).mul_(ctx.scale), None


def _masked(x: Tensor, kept: Tensor) -> Tensor:
    bits = BITS[x.element_size()]
    return (x.view(bits) & kept.to(bits)).view(x.dtype)


class FastDropout(nn.Dropout):
    """`nn.Dropout` that draws as `dropout` does where it trains on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.device.type != "cpu" or not input.is_floating_point():
            return super().forward(input)
        return dropout(input, self.p)


def use_fast_dropout(model: nn.Module) -> None:
    """Put a `FastDropout` in the place of every `nn.Dropout` of `model`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, FastDropout(child.p, child.inplace).train(child.training))
