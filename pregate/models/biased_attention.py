"""Attention with a learned position bias and dropout, in training on a CPU: one sequence at a time.

The scores of a whole batch are larger than any cache, and each of a dozen operations reads and writes all of them. The
scores of one sequence stay in the cache. Of them only the probabilities are kept for the gradients, in the dtype of the
products, and their sign says which were dropped. Knows nothing about models.

Letters: B batch, H heads, T queries, S keys, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pregate.models.dropout import LEVELS, draw_dropped, dropped_levels
from pregate.models.linear import active_autocast_dtype

SIGN_SHIFT = 15
"""From the lowest to the highest of 16 bits."""


def biased_attention(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    bias_1HTS: Tensor | None,
    mask: Tensor | None,
    probability: float,
) -> Tensor:
    """softmax(query key^T + bias + mask) value, with dropout of `probability` on the softmax: (B, T, H, D).

    All on a CPU. `mask` is added, (B, 1, 1 or T, S), and has no gradient. Under autocast the products are in its
    dtype; softmax and the gradient of the bias are in fp32.
    """
    dtype = active_autocast_dtype("cpu") or query_BHTD.dtype
    if bias_1HTS is not None and not bias_1HTS.requires_grad and not bias_1HTS.any():
        bias_1HTS = None
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(  # type: ignore[no-any-return]
            query_BHTD.to(dtype),
            key_BHSD.to(dtype),
            value_BHSD.to(dtype),
            bias_1HTS,
            mask,
            dropped_levels(probability),
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, levels: int
    ) -> Tensor:
        B, H, T, D = query.shape
        signed_BHTS = query.new_empty(B, H, T, key.shape[2])
        output_BTHD = query.new_empty(B, T, H, D)
        masked = [False] * B if mask is None else mask.expand(B, *mask.shape[1:]).flatten(1).any(1).tolist()
        scale = 1.0 if levels == 0 else LEVELS / (LEVELS - levels)
        for b in range(B):
            scores_HTS = torch.bmm(query[b], key[b].mT).float()
            if bias is not None:
                scores_HTS += bias[0]
            if masked[b]:
                assert mask is not None
                scores_HTS += mask[b if len(mask) > 1 else 0]
            signed_HTS = signed_BHTS[b].copy_(torch.softmax(scores_HTS, -1))
            kept_HTS = signed_HTS
            if levels:
                _negate(signed_HTS, draw_dropped(signed_HTS.shape, levels))
                kept_HTS = signed_HTS.relu()
            output_BTHD[b] = torch.bmm(kept_HTS, value[b]).mul_(scale).transpose(0, 1)
        ctx.save_for_backward(query, key, value, signed_BHTS, output_BTHD)
        ctx.scale = scale
        return output_BTHD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed_BHTS, output_BTHD = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        grad_query, grad_key, grad_value = grads
        grad_bias = torch.zeros(signed_BHTS.shape[1:]) if ctx.needs_input_grad[3] else None
        # the gradient of a softmax needs sum_s p dp, which is the sum over the width of output times its gradient
        shift_BHT1 = (grad_BTHD * output_BTHD).sum(-1, dtype=torch.float32).to(query.dtype).transpose(1, 2)[..., None]
        for b in range(len(query)):
            grad_HTD = grad_BTHD[b].transpose(0, 1) * ctx.scale
            kept_HTS = signed_BHTS[b].relu()
            grad_value[b] = torch.bmm(kept_HTS.mT, grad_HTD)
            slope_HTS = torch.bmm(grad_HTD, value[b].mT).mul_(kept_HTS)
            slope_HTS.addcmul_(signed_BHTS[b].abs(), shift_BHT1[b], value=-1)
            if grad_bias is not None:
                grad_bias += slope_HTS
            grad_query[b] = torch.bmm(slope_HTS, key[b])
            grad_key[b] = torch.bmm(slope_HTS.mT, query[b])
        return *grads, None if grad_bias is None else grad_bias[None], None, None


def _negate(numbers: Tensor, where: Tensor) -> None:
    """Turn the sign of what is positive where an int16 is 1."""
    if numbers.element_size() == where.element_size():
        numbers.view(torch.int16).bitwise_or_(where.bitwise_left_shift_(SIGN_SHIFT))
    else:
        numbers.mul_(where.mul_(-2).add_(1))
