"""Root mean square normalisation in training on a CPU, a few rows at a time.

Written as plain operations, value and gradients read and write all states about twenty times. A block of rows stays in
the cache. Knows nothing about models.

Letters: N rows, D model width, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_NUMBERS = 2**17
"""Numbers of a block: 0.5 MB in fp32, of which a few fit into a core's cache."""


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x²) + eps)`, the mean over the last dimension; all in fp32."""
    return _RMSNorm.apply(x, weight_D, eps)  # type: ignore[no-any-return]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        norm_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True)
        scale_N1 = norm_N1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        # no view: callers may change the result in place
        result = torch.empty(x.shape, dtype=x.dtype)
        result_ND = result.view(x_ND.shape)
        for part in _blocks(x_ND):
            torch.mul(x_ND[part], scale_N1[part], out=result_ND[part]).mul_(weight_D)
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        grad_ND = grad.reshape(x_ND.shape)
        grad_x_ND, grad_weight_D = torch.empty_like(x_ND), torch.zeros_like(weight_D)
        for part in _blocks(x_ND):
            normed_BD = x_ND[part] * scale_N1[part]
            grad_weight_D += (grad_ND[part] * normed_BD).sum(0)
            slope_BD = torch.mul(grad_ND[part], weight_D, out=grad_x_ND[part])
            along_B1 = torch.linalg.vecdot(slope_BD, normed_BD)[:, None] / x_ND.shape[1]
            slope_BD.addcmul_(normed_BD, along_B1, value=-1).mul_(scale_N1[part])
        return grad_x_ND.view(grad.shape), grad_weight_D, None


def _blocks(x_ND: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_NUMBERS // x_ND.shape[1])
    return (slice(first, first + rows) for first in range(0, len(x_ND), rows))
