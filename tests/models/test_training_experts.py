"""All experts of a block together, in training, against one token after the other: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.models.routing import DROPPED
from pregate.models.training_experts import learn_grouped, learn_sorted
from tests.tiny import batch, pregated_model

T, D, F, E = 9, 8, 16, 4


def naive(hidden: Tensor, ids: Tensor, weights: Tensor, up: list[Tensor], down: list[Tensor], between: Any) -> Tensor:
    rows = []
    for token, experts, shares in zip(hidden, ids.tolist(), weights, strict=True):
        results = [
            share * (down[expert] @ between(up[expert] @ token))
            for expert, share in zip(experts, shares, strict=True)
            if expert != DROPPED
        ]
        rows.append(torch.stack(results).sum(0) if results else token * 0)
    return torch.stack(rows)


def stacked(*arguments: Any) -> Tensor:
    hidden, ids, weights, up, down, between = arguments
    return learn_sorted(hidden, ids, weights, torch.stack(up), torch.stack(down), between)


@pytest.mark.parametrize("learn", [learn_sorted, stacked, learn_grouped])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(learn: Callable[..., Tensor], top_k: int, dtype: torch.dtype) -> None:
    """Expert 2 has no tokens, some choices are dropped, and one token has none left."""
    torch.manual_seed(0)
    ids = torch.tensor([0, 1, 3])[torch.randint(3, (T, top_k))]
    ids[4], ids[6, 0] = DROPPED, DROPPED
    values = [torch.randn(T, D), torch.rand(T, top_k), *torch.randn(E, F, D) / 4, *torch.randn(E, D, F) / 4]
    slope = torch.randn(T, D)
    found = []
    for function in (naive, learn):
        leaves = [value.clone().requires_grad_() for value in values]
        hidden, weights, up, down = leaves[0], leaves[1], leaves[2 : 2 + E], leaves[2 + E :]
        with torch.autocast("cpu", dtype, enabled=function is learn and dtype == torch.bfloat16):
            output = function(hidden, ids, weights, up, down, torch.relu)
        assert output.dtype == torch.float32
        output.backward(slope)
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for position, (want, have) in enumerate(zip(*found, strict=True)):
        if want is None:  # the matrices of expert 2
            assert position in (3 + 2, 3 + E + 2)
            assert have is None if learn is learn_sorted else not have.any()
        else:
            assert have is not None and want.any()
            error = (have - want).norm() / want.norm()
            assert error < (1e-6 if dtype == torch.float32 else 2e-2), (position, error)


def test_no_tokens_at_all() -> None:
    matrices = [[torch.randn(F, D)] * E, [torch.randn(D, F)] * E]
    output = learn_sorted(torch.randn(3, D), torch.full((3, 1), DROPPED), torch.ones(3, 1), *matrices, torch.relu)
    assert torch.equal(output, torch.zeros(3, D))


def test_experts_that_do_more_when_they_are_called_are_called() -> None:
    model = pregated_model().train()
    expert = next(iter(model.moe_blocks())).module.experts["expert_1"]
    calls: list[Any] = []
    expert.wi.register_forward_hook(lambda *call: calls.append(call))
    model(**batch()).loss.backward()
    assert calls


@pytest.mark.gpu
def test_a_block_does_not_wait_for_the_device() -> None:
    model = pregated_model(dropout_rate=0.1, d_model=32, d_ff=64, d_kv=8, expert_capacity=2).train().to("cuda")
    block = next(iter(model.moe_blocks())).module
    hidden = torch.randn(2, 7, 32, device="cuda", requires_grad=True)
    ids, weights = torch.randint(-1, 5, (14, 1), device="cuda"), torch.rand(14, 1, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        block.experts(hidden.flatten(0, 1), ids, weights).sum().backward()  # the first call sets things up
        torch.cuda.set_sync_debug_mode("error")
        try:
            routing = block.router(hidden)
            block.experts(hidden.flatten(0, 1), ids, weights).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(hidden.grad).all() and hidden.grad.any() and (routing.expert_ids_BTK >= -1).all()
