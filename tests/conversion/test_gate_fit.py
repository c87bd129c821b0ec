"""One gate: exact where that is possible, the minimum that a naive solver finds, never worse than its start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pregate.conversion.calibrate import gate_fit
from pregate.conversion.calibrate.gate_fit import Regression, Tokens, fit_gate
from pregate.models.routing import first_choice

D, E = 12, 5


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def skewed(seed: int, count: int) -> Tensor:
    """States whose variance lies in a few directions, as that of a residual stream does."""
    return normal(seed, count, D) * torch.logspace(1, -2, D)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steps", [0, 20])
def test_a_linear_target_is_found_exactly(bias: bool, steps: int) -> None:
    true_ED, true_E = normal(0, E, D), normal(1, E) if bias else torch.zeros(E)

    def tokens(seed: int) -> Tokens:
        states_TD = normal(seed, 400, D)
        # a constant for each token changes no route
        return Tokens(states_TD, states_TD @ true_ED.T + true_E + normal(seed + 1, 400, 1))

    found = fit_gate(torch.zeros(E, D), torch.zeros(E) if bias else None, tokens(2), tokens(4), steps)
    assert max(found.ridge, found.refined) >= 0.995 > 0.5 > found.copy
    assert found.weight_ED.shape == (E, D) and (found.bias_E is None) != bias
    ridge_ED = Regression(torch.zeros(E, D).double(), tokens(2).states_TD, tokens(2).logits_TE).ridge(1e-8)
    if not bias:
        centred_ED = true_ED - true_ED.mean(0)
        torch.testing.assert_close(ridge_ED.float(), centred_ED, atol=1e-4, rtol=1e-4)


def test_a_start_that_is_right_already_stays_as_it_is() -> None:
    weight_ED = normal(0, E, D)
    fit, held = (Tokens(states, states @ weight_ED.T) for states in (normal(1, 50, D), normal(2, 50, D)))
    found = fit_gate(weight_ED, None, fit, held, 10)
    assert (found.chosen, found.copy) == ("copy", 1.0)
    assert torch.equal(found.weight_ED, weight_ED)


def test_agreement_counts_all_chosen_experts() -> None:
    """The gate exchanges the first two experts of every token: with K = 1 nothing agrees, with K = 2 all does."""

    def first_two(logits_TE: Tensor) -> Tensor:
        return logits_TE.topk(2).indices

    states_TD = torch.eye(D)
    right_ED, exchanged_ED = torch.zeros(E, D), torch.zeros(E, D)
    for token in range(D):
        first, second = token % E, (token + 1) % E
        right_ED[first, token], right_ED[second, token] = 3.0, 2.0
        exchanged_ED[first, token], exchanged_ED[second, token] = 2.0, 3.0
    told = Tokens(states_TD, states_TD @ right_ED.T)
    assert fit_gate(exchanged_ED, None, told, told, 0, first_choice).copy == 0.0
    found = fit_gate(exchanged_ED, None, told, told, 0, first_two)
    assert (found.copy, found.chosen) == (1.0, "copy")
    assert fit_gate(exchanged_ED.roll(1, 0), None, told, told, 0, first_two).copy == 0.5


@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_the_start_on_held_out_tokens(seed: int, count: int) -> None:
    """Whatever is fitted on tokens that teach nothing, or fewer of them than there are features."""
    start_ED = normal(seed, E, D)
    states_TD = skewed(seed + 10, 60)
    held = Tokens(states_TD, states_TD @ start_ED.T + 0.5 * normal(seed + 20, 60, E))
    found = fit_gate(start_ED, None, Tokens(skewed(seed + 30, count), normal(seed + 40, count, E)), held, 10)

    def agreement(weight_ED: Tensor) -> float:
        return (states_TD @ weight_ED.T).argmax(-1).eq(held.logits_TE.argmax(-1)).double().mean().item()

    assert found.copy == pytest.approx(agreement(start_ED))
    assert agreement(found.weight_ED) == pytest.approx(max(found.copy, found.ridge, found.refined))
    assert found.weight_ED.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_refining_reaches_the_minimum_that_newton_finds(temperature: float) -> None:
    penalty, count = 1e-2, 200
    states_TD, start_ED = skewed(0, count), 0.1 * normal(1, E, D)
    logits_TE = torch.tanh(states_TD @ normal(2, E, D).T) + 0.3 * normal(3, count, E)
    regression = Regression(start_ED.double(), states_TD, logits_TE)
    closed_ED = regression.ridge(penalty)
    found_ED = regression.refine(closed_ED, temperature, penalty, 300)

    states, start, logits = states_TD.double(), start_ED.double(), logits_TE.double()
    logits = logits - logits.mean(-1, keepdim=True)
    scale = temperature * logits.std()
    wanted_TE = (logits / scale).softmax(-1)

    def loss(flat: Tensor) -> Tensor:
        gate_ED = flat.view(E, D)
        entropy = -(wanted_TE * (states @ gate_ED.T / scale).log_softmax(-1)).sum(-1).mean()
        moved = ((gate_ED - start) / scale).square().sum()
        return entropy + penalty * states.square().mean() / (2 * E) * moved

    flat = found_ED.flatten().clone()
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(loss, flat)
        curvature = torch.autograd.functional.hessian(loss, flat)
        flat = flat - torch.linalg.solve(curvature, gradient)
    assert loss(found_ED.flatten()) <= loss(flat) + 1e-5, (loss(found_ED.flatten()), loss(flat))
    assert loss(found_ED.flatten()) < loss(closed_ED.flatten())


def test_states_and_logits_that_say_nothing_are_survived() -> None:
    nothing = Tokens(torch.zeros(9, D), torch.zeros(9, E))
    found = fit_gate(normal(0, E, D), None, nothing, nothing, 5)
    assert found.chosen == "copy"


def test_parts_of_the_tokens_give_what_all_of_them_give(monkeypatch: pytest.MonkeyPatch) -> None:
    states_TD, start_ED = skewed(0, 50), 0.1 * normal(1, E, D)
    logits_TE = torch.tanh(states_TD @ normal(2, E, D).T)
    found = []
    for most in (50, 7):
        monkeypatch.setattr(gate_fit, "CHUNK_TOKENS", most)
        regression = Regression(start_ED.double(), states_TD, logits_TE)
        ridge_ED = regression.ridge(1e-2)
        found.append((ridge_ED, regression.refine(ridge_ED, 0.5, 1e-2, 5)))
    torch.testing.assert_close(*(ridge_ED for ridge_ED, _ in found), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(refined_ED for _, refined_ED in found), rtol=1e-3, atol=1e-4)
    for gate_ED in found[0]:
        assert gate_ED.isfinite().all() and not torch.allclose(gate_ED, start_ED.double(), atol=1e-2)
