"""The loss of a head without its logits equals the plain one, in value and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pregate.models import vocabulary_losses
from tests.tiny import batch, pregated_model


@pytest.mark.parametrize("rows_a_block", [1, 5, 100])
@pytest.mark.parametrize("ignored", [0, 4, 11])
def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch, rows_a_block: int, ignored: int) -> None:
    torch.manual_seed(0)
    monkeypatch.setitem(vocabulary_losses.BLOCK_NUMBERS, "cpu", rows_a_block * 37)
    labels = torch.randint(37, (11,))
    labels[torch.randperm(11)[:ignored]] = vocabulary_losses.IGNORED
    found = []
    for function in (
        lambda s, w: F.cross_entropy(F.linear(s, w), labels, ignore_index=-100, reduction="sum"),
        lambda s, w: vocabulary_losses.linear_losses(s, w, labels)[0],
    ):
        torch.manual_seed(1)
        states, weight = torch.randn(11, 6, requires_grad=True), torch.randn(37, 6, requires_grad=True)
        loss = function(states * 2, weight)
        (loss / 3).backward()
        found.append((loss.detach(), states.grad, weight.grad))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("num_rows", [7, 8, 21])
def test_gradients_in_a_short_dtype(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """There several blocks make one product: less than one product here, just one, two and a part."""
    torch.manual_seed(0)
    monkeypatch.setitem(vocabulary_losses.BLOCK_NUMBERS, "cpu", 37)
    monkeypatch.setattr(vocabulary_losses, "BLOCKS_A_PRODUCT", 8)
    labels = torch.randint(37, (num_rows,))
    states, weight = torch.randn(num_rows, 6, requires_grad=True), torch.randn(37, 6, requires_grad=True)
    F.cross_entropy(F.linear(states, weight), labels, reduction="sum").backward()
    expected = [states.grad, weight.grad]
    states.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        vocabulary_losses.linear_losses(states, weight, labels)[0].backward()
    for found, exact in zip((states.grad, weight.grad), expected, strict=True):
        error = ((found - exact).norm() / exact.norm()).item()
        assert 0 < error < 0.01, error


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("rows_a_block", [1, 5, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_a_teachers_lesson(
    monkeypatch: pytest.MonkeyPatch, rows_a_block: int, temperature: float, biased: bool
) -> None:
    """Against the losses of all logits. A head with a bias is called."""
    torch.manual_seed(0)
    monkeypatch.setitem(vocabulary_losses.BLOCK_NUMBERS, "cpu", rows_a_block * 37)
    labels, taught_NV = torch.randint(37, (11,)), 3 * torch.randn(11, 37)
    labels[torch.randperm(11)[:4]] = vocabulary_losses.IGNORED
    kept = labels != vocabulary_losses.IGNORED
    found = []
    for alone in (False, True):
        torch.manual_seed(1)
        states, linear = torch.randn(11, 6, requires_grad=True), torch.nn.Linear(6, 37, bias=biased)
        if alone:
            lesson = vocabulary_losses.Lesson(taught_NV[kept], 0.3, temperature)
            loss, terms = vocabulary_losses.head_losses(linear, states * 2, labels, lesson)
        else:
            logits_NV = linear(states * 2)[kept]
            q, p = (logits_NV / temperature).softmax(-1), (taught_NV[kept] / temperature).softmax(-1)
            kl = temperature**2 * (p * (p / q).log()).sum()
            terms = torch.stack([F.cross_entropy(logits_NV, labels[kept], reduction="sum"), kl])
            loss = terms[0] + 0.3 * terms[1]
        (loss / 3).backward()
        found.append((loss.detach(), terms.detach(), states.grad, *(p.grad for p in linear.parameters())))
    torch.testing.assert_close(found[1], found[0])
    assert found[0][1].min() > 1 and not terms.requires_grad


def test_nothing_is_computed_for_gradients_that_nobody_wants() -> None:
    states, weight = torch.randn(5, 6), torch.randn(37, 6, requires_grad=True)
    vocabulary_losses.linear_losses(states, weight, torch.arange(5))[0].backward()
    assert weight.grad is not None
    expected = F.cross_entropy(states @ weight.T, torch.arange(5), reduction="sum").detach()
    # the weight could have a gradient and nobody will ask for it: nothing of its shape is made
    with torch.no_grad(), Shapes() as made:
        torch.testing.assert_close(vocabulary_losses.linear_losses(states, weight, torch.arange(5))[0], expected)
    assert (5, 37) in made.shapes and (37, 6) not in made.shapes


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operations make; views and casts to the same dtype make none."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and func is not torch.ops.aten.detach.default:
            self.shapes.add(tuple(result.shape))
        return result


def test_under_autocast_it_follows_its_dtype() -> None:
    torch.manual_seed(0)
    labels = torch.arange(9)
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        states, weight = torch.randn(9, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if fused:
                loss = vocabulary_losses.linear_losses(states, weight, labels)[0]
            else:
                loss = F.cross_entropy(F.linear(states, weight).float(), labels, reduction="sum")
        loss.backward()
        assert (loss.dtype, states.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
        found.append((loss.detach(), states.grad, weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)


def test_the_models_loss_alone_is_that_of_its_logits() -> None:
    model, inputs = pregated_model(0), batch(0)
    labels = inputs.pop("labels")
    full = model(**inputs, labels=labels)
    alone = model(**inputs, labels=labels, loss_only=True, output_router_logits=True)
    assert alone.logits is None
    assert alone.encoder_router_logits is not None
    torch.testing.assert_close(alone.loss, full.loss * (labels != -100).sum())
    grads = []
    for loss in (full.loss * (labels != -100).sum(), alone.loss):
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1])
