"""Which neurons are shared and which form an expert, against hand-made layers and every possible assignment."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from studies.dense_to_moe.clusters import (
    balanced,
    chosen_experts,
    chosen_share,
    experts_of_neurons,
    shared_neurons,
    sums_by_expert,
)


def test_the_shared_neurons_add_most_or_most_often() -> None:
    adds_TF = torch.full((20, 20), 0.01)
    adds_TF[:, 3] = 1.0  # always a little
    adds_TF[::2, 5] = 2.0  # for every other token
    adds_TF[0, 7] = 90.0  # once very much
    assert shared_neurons(adds_TF, 2, "strength").tolist() == [5, 7]
    assert shared_neurons(adds_TF, 1, "frequency").tolist() == [3]
    assert shared_neurons(adds_TF, 0, "strength").tolist() == []


def test_neurons_that_are_active_together_form_an_expert() -> None:
    """Four planted groups of six, in a random order, two of which are active for each token."""
    generator = torch.Generator().manual_seed(0)
    group_F = torch.arange(24)[torch.randperm(24, generator=generator)] % 4
    pairs_T2 = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(200)])
    active_TF = (group_F == pairs_T2[:, :1]) | (group_F == pairs_T2[:, 1:])
    adds_TF = torch.where(active_TF, 1.0, 0.1) * (0.8 + 0.4 * torch.rand(200, 24, generator=generator))
    owner_F = experts_of_neurons(adds_TF, num_experts=4, top_k=2)
    assert owner_F.bincount().tolist() == [6, 6, 6, 6]
    assert all(len(owner_F[group_F == group].unique()) == 1 for group in range(4))
    planted = chosen_share(sums_by_expert(adds_TF.square(), group_F, 4), 2)
    assert chosen_share(sums_by_expert(adds_TF.square(), owner_F, 4), 2) == pytest.approx(planted)
    assert planted > 0.95 > chosen_share(sums_by_expert(adds_TF.square(), torch.arange(24) % 4, 4), 2)


@pytest.mark.parametrize("seed", range(5))
def test_two_experts_are_balanced_as_well_as_can_be(seed: int) -> None:
    gain_FE = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
    owner_F = balanced(gain_FE)
    assert owner_F.bincount().tolist() == [4, 4]
    found = gain_FE.gather(1, owner_F[:, None]).sum().item()
    best = max(gain_FE[range(8), list(order)].sum().item() for order in set(permutations([0] * 4 + [1] * 4)))
    assert found == pytest.approx(best)


def test_no_exchange_of_two_neurons_gains() -> None:
    gain_FE = torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    owner_F = balanced(gain_FE)
    assert owner_F.bincount().tolist() == [6] * 5
    more_FE = gain_FE - gain_FE.gather(1, owner_F[:, None])
    gains_FF = more_FE[:, owner_F] + more_FE[:, owner_F].T
    assert gains_FF.max() <= 1e-6


def test_the_chosen_experts_have_the_largest_sums() -> None:
    squares_TF = torch.tensor([[4.0, 0.0, 1.0, 2.0, 0.0, 2.5]])
    owner_F = torch.tensor([0, 0, 1, 1, 2, 2])
    sums_TE = sums_by_expert(squares_TF, owner_F, 3)
    assert chosen_experts(sums_TE, 2).tolist() == [[1.0, 1.0, 0.0]]
    assert chosen_share(sums_TE, 2) == pytest.approx(7 / 9.5)
