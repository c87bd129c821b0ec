"""Residual and norm of a decoding step in one pass: what a part of a layer adds, and the normed input of the next one.

Knows numbers only. Letters: B rows, D model width; a place axis of size 1 may stand between them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm(
    hidden_B1D: Tensor, added_B1D: Tensor | None, weight_D: Tensor, eps: float, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`hidden + added` (or `hidden` itself), and that divided by its root mean square and scaled by `weight_D`, then by
    `factor`.

    Both in the dtype of `hidden_B1D`, rounded where the family's own norm rounds; the mean is taken in float32
    (T5's layer norm: no mean subtracted, no bias).
    """
    if hidden_B1D.device.type == "cuda" and weight_D.dtype == hidden_B1D.dtype:
        from pregate.engine.device.ops.kernels_norms import launch_add_norm

        return launch_add_norm(hidden_B1D, added_B1D, weight_D, eps, factor)
    return add_norm_twin(hidden_B1D, added_B1D, weight_D, eps, factor)


def add_norm_twin(
    hidden_B1D: Tensor, added_B1D: Tensor | None, weight_D: Tensor, eps: float, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`add_norm` in plain torch, in the order of the family's own operations."""
    if added_B1D is not None:
        hidden_B1D = hidden_B1D + added_B1D
    variance_B11 = hidden_B1D.float().pow(2).mean(-1, keepdim=True)
    normed_B1D = hidden_B1D * torch.rsqrt(variance_B11 + eps)
    if weight_D.dtype in (torch.float16, torch.bfloat16):
        normed_B1D = normed_B1D.to(weight_D.dtype)
    normed_B1D = weight_D * normed_B1D
    return hidden_B1D, normed_B1D if factor == 1.0 else normed_B1D * factor
