"""Normalisation a few rows at a time against the formula, value and gradients."""

from __future__ import annotations

import pytest
import torch

from pregate.models import rms_norm


@pytest.mark.parametrize("rows_a_block", [1, 4, 100])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, rows_a_block: int) -> None:
    monkeypatch.setattr(rms_norm, "BLOCK_NUMBERS", rows_a_block * 7)
    torch.manual_seed(0)
    values = torch.randn(3, 5, 7), torch.rand(7) + 0.5
    slope, found = torch.randn(3, 5, 7), []
    for function in (
        lambda x, w: w * (x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()),
        lambda x, w: rms_norm.rms_norm(x, w, 0.1),
    ):
        x, weight = (value.clone().requires_grad_() for value in values)
        result = function(x.transpose(0, 1), weight)
        result.backward(slope.transpose(0, 1))
        found.append((result.detach(), x.grad, weight.grad))
    assert found[0][1].any()
    torch.testing.assert_close(found[1], found[0])
