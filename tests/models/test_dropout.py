"""Dropout from few random numbers: how often, how independent, how scaled, and the same again from a saved state."""

from __future__ import annotations

import pytest
import torch

from pregate.models.dropout import FastDropout, draw_dropped, dropout, dropped_levels, use_fast_dropout
from tests.tiny import batch, pregated_model


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.97])
def test_elements_are_dropped_as_often_as_asked_for_and_independently(probability: float) -> None:
    torch.manual_seed(0)
    drawn = draw_dropped((2**19, 4), dropped_levels(probability))
    assert drawn.unique().tolist() == [0, 1]
    share = dropped_levels(probability) / 2**16
    assert share == pytest.approx(probability, abs=2**-17)
    # four elements come from one draw: each has its probability, and no two of them or of neighbouring draws agree more
    # often than by chance
    sure = 5 * (share * (1 - share) / 2**19) ** 0.5
    assert drawn.double().mean(0).tolist() == pytest.approx([share] * 4, abs=sure)
    centred = torch.cat([drawn[:-1], drawn[1:]], 1).double() - share
    correlations = centred.T @ centred / len(centred) / (share * (1 - share))
    assert correlations.fill_diagonal_(0.0).abs().max() < 5 / 2**9.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("probability", [1e-5, 0.1, 0.3])
def test_what_is_kept_is_scaled_so_that_the_expectation_is_exact(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 370, dtype=dtype, requires_grad=True)
    state = torch.get_rng_state()
    y = dropout(x, probability)
    y.backward(torch.ones_like(y))
    torch.set_rng_state(state)
    levels = dropped_levels(probability)
    kept = draw_dropped(x.shape, levels) == 0
    scale = 2**16 / (2**16 - levels)
    assert (~kept).any()
    torch.testing.assert_close(y, torch.where(kept, x * scale, 0.0).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(x.grad, (kept.double() * scale).to(dtype), rtol=0, atol=0)


def test_other_layouts_and_the_ends_of_the_range() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 3).transpose(0, 2)
    y = dropout(x, 0.4)
    assert (y == 0).any() and torch.equal(y[y != 0], (x * (2**16 / (2**16 - dropped_levels(0.4))))[y != 0])
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros_like(x))


def test_every_dropout_of_a_model_is_replaced_and_does_nothing_in_evaluation() -> None:
    model = pregated_model(dropout_rate=0.2)
    before = model(**batch()).logits
    use_fast_dropout(model)
    kinds = [type(module) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(kinds) > 10 and set(kinds) == {FastDropout}
    assert torch.equal(model(**batch()).logits, before)
    model.train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model(**batch()).logits
    second = model(**batch()).logits
    torch.set_rng_state(state)
    assert torch.equal(model(**batch()).logits, first) and not torch.equal(first, second)
