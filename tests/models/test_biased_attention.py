"""Attention one sequence at a time against the plain formula, with the same elements dropped, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pregate.models.biased_attention import biased_attention
from pregate.models.dropout import draw_dropped, dropped_levels

B, H, T, S, D = 3, 2, 5, 7, 4


def naive(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, probability: float
) -> Tensor:
    scores = query @ key.mT
    for term in (bias, mask):
        scores = scores if term is None else scores + term
    levels = dropped_levels(probability)
    kept = torch.stack([draw_dropped((H, T, S), levels) == 0 for _ in range(B)]) if levels else 1.0
    return ((scores.softmax(-1) * kept / (1 - levels / 2**16)) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_outputs_and_gradients(probability: float, masked: str | None, biased: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(B, length, H, D).to(dtype).float() for length in (T, S, S)]
    bias = torch.randn(1, H, T, S) if biased else None
    mask = None
    if masked:
        hidden = torch.zeros(B, 1, T if masked == "pairs" else 1, S, dtype=torch.bool)
        hidden[1:, ..., -2:] = True  # the first row has no padding
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    slope = torch.randn(B, T, H, D)
    found = []
    for function in (naive, biased_attention):
        leaves = [x.clone().requires_grad_() for x in (*inputs, *([] if bias is None else [bias]))]
        torch.manual_seed(1)
        heads = [x.transpose(1, 2) for x in leaves[:3]]
        autocast = function is biased_attention and dtype == torch.bfloat16
        with torch.autocast("cpu", dtype, enabled=autocast):
            output = function(*heads, leaves[3] if biased else None, mask, probability)  # type: ignore[operator]
        output.backward(slope.to(output.dtype))
        assert output.dtype == (dtype if function is biased_attention else torch.float32)
        found.append([output.detach().float(), *(leaf.grad for leaf in leaves)])
    for want, have in zip(*found, strict=True):
        assert want is not None and have is not None
        error = (have - want).norm() / want.norm()
        assert error < (1e-6 if dtype == torch.float32 else 3e-2), error
