"""Routing rules and router losses against hand-counted cases and naive loops."""

from __future__ import annotations

import math

import pytest
import torch

from pregate.models.expert_math import group_by_expert, grouped_experts, reference_experts
from pregate.models.families.switch_router import apply_capacity
from pregate.models.router_losses import balance_loss, z_loss
from pregate.models.routing import DROPPED, ScoreFunction, route


def test_equal_probabilities_choose_the_first_expert() -> None:
    routing = route(torch.zeros(1, 2, 4), torch.float32)
    assert routing.expert_ids_BTK.flatten().tolist() == [0, 0]
    assert routing.weights_BTK.flatten().tolist() == [0.25, 0.25]


def test_capacity_counts_per_sequence_in_token_order() -> None:
    ids = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 0]])[..., None]
    kept = apply_capacity(ids, num_experts=2, capacity=2)[..., 0]
    assert kept.tolist() == [[0, 0, 1, DROPPED], [1, 1, DROPPED, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_capacity_equals_a_naive_count(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (2, 17, 2), generator=generator)
    kept = apply_capacity(ids, 3, 4)
    for row, expected_row in zip(kept, ids, strict=True):
        used = [0, 0, 0]
        for choice, expert in zip(row.flatten().tolist(), expected_row.flatten().tolist(), strict=True):
            used[expert] += 1
            assert choice == (expert if used[expert] <= 4 else DROPPED)


def test_route_keeps_logits_and_casts_weights() -> None:
    logits = torch.randn(2, 3, 4)
    routing = route(logits, torch.bfloat16)
    assert routing.logits_BTE is logits
    assert routing.weights_BTK.dtype == torch.bfloat16
    assert torch.equal(routing.expert_ids_BTK[..., 0], logits.softmax(-1).bfloat16().argmax(-1))


def test_balance_loss_is_one_when_uniform_and_num_experts_when_collapsed() -> None:
    uniform = 100 * torch.eye(4)
    assert balance_loss(uniform).item() == pytest.approx(1.0, abs=1e-5)
    collapsed = torch.zeros(6, 4)
    collapsed[:, 2] = 100
    assert balance_loss(collapsed).item() == pytest.approx(4.0, abs=1e-5)


def test_losses_ignore_padding_and_equal_a_naive_loop() -> None:
    logits = torch.randn(3, 5, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    tokens = [logits[b, t] for b in range(3) for t in range(5) if mask[b, t]]
    share, mean = [0.0] * 4, [0.0] * 4
    square = 0.0
    for token in tokens:
        share[int(token.argmax())] += 1 / len(tokens)
        for expert in range(4):
            mean[expert] = mean[expert] + token.softmax(0)[expert] / len(tokens)
        square = square + torch.logsumexp(token, 0) ** 2 / len(tokens)
    expected = 4 * sum(s * m for s, m in zip(share, mean, strict=True))
    torch.testing.assert_close(balance_loss(logits, mask), expected)
    torch.testing.assert_close(z_loss(logits, mask), square)
    gradient = torch.autograd.grad(balance_loss(logits, mask) + z_loss(logits, mask), logits)[0]
    assert gradient[mask == 0].abs().max() == 0
    assert gradient[mask == 1].abs().max() > 0


@pytest.mark.parametrize("scores", ScoreFunction)
def test_every_choice_of_a_token_counts_in_the_balance_loss(scores: ScoreFunction) -> None:
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 0, 1, 0, 1]])
    ids = logits.topk(2).indices
    tokens = [(b, t) for b in range(2) for t in range(5) if mask[b, t]]
    share, mean = [0.0] * 4, torch.zeros(4)
    for place in tokens:
        each = logits[place].exp() if scores is ScoreFunction.softmax else 1 / (1 + (-logits[place]).exp())
        mean += each / each.sum() / len(tokens)
        for expert in ids[place].tolist():
            share[expert] += 0.5 / len(tokens)
    expected = 4 * sum(s * m for s, m in zip(share, mean, strict=True))
    torch.testing.assert_close(balance_loss(logits, mask, ids, scores), expected)
    assert balance_loss(logits, mask, scores=scores).item() != pytest.approx(float(expected), rel=1e-3)
    first = ids[..., :1]
    assert balance_loss(logits, mask, first, scores).item() == balance_loss(logits, mask, scores=scores).item()


def test_losses_of_an_empty_mask_are_zero() -> None:
    logits = torch.randn(2, 3, 4)
    mask = torch.zeros(2, 3)
    assert balance_loss(logits, mask).item() == 0
    assert z_loss(logits, mask).item() == 0


def test_z_loss_by_hand() -> None:
    assert z_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(4) ** 2)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_grouped_experts_equal_a_loop_over_tokens(top_k: int, seed: int) -> None:
    """Outputs and gradients, dropped tokens and absent experts included."""
    torch.manual_seed(seed)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(11, top_k, dtype=torch.float64, requires_grad=True)
    matrices = [torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(7)]
    ids = torch.stack([torch.randperm(5)[:top_k] for _ in range(11)])
    ids[torch.rand(ids.shape) < 0.2] = DROPPED
    rows = []
    for token in range(11):
        row = torch.zeros(6, dtype=torch.float64)
        for choice in range(top_k):
            expert = int(ids[token, choice])
            if expert != DROPPED:
                row = row + weights[token, choice] * torch.tanh(hidden[token] @ matrices[expert])
        rows.append(row)
    leaves = [hidden, weights, *matrices]
    expected = torch.stack(rows)
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    for run in (grouped_experts, reference_experts):
        output = run(hidden, ids, weights, 7, lambda e, x: torch.tanh(x @ matrices[e]))
        torch.testing.assert_close(output, expected)
        actual = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
        for want, got in zip(expected_gradients, actual, strict=True):
            assert (want is None) == (got is None)
            if want is not None:
                torch.testing.assert_close(got, want)


def test_all_dropped_gives_zeros() -> None:
    hidden = torch.randn(4, 3)
    ids = torch.full((4, 1), DROPPED)
    for run in (grouped_experts, reference_experts):
        output = run(hidden, ids, torch.ones(4, 1), 2, lambda e, x: pytest.fail("an expert ran"))
        assert torch.equal(output, torch.zeros(4, 3))


def test_grouping_is_stable_and_skips_dropped_choices() -> None:
    grouping = group_by_expert(torch.tensor([[2], [DROPPED], [0], [2], [0]]))
    assert grouping.order.tolist() == [2, 4, 0, 3]
    assert grouping.groups == [(0, 0, 2), (2, 2, 4)]
