"""Which neurons of a dense feed-forward layer every token uses, and which of the others form an expert together.

Knows how much each neuron adds for each token; knows nothing about models.

Letters: T tokens, F neurons, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 6
"""Most rounds of each of the two searches. Both end where nothing changes."""
EXCHANGES = 8
"""Most times that the neurons of all pairs of experts are compared."""
ACTIVE = 0.1
"""A neuron is active for a token if it belongs to this share of the layer's neurons that add most for it."""
SHARED_BY = ("strength", "frequency")


def shared_neurons(adds_TF: Tensor, count: int, by: str) -> Tensor:
    """The indices of `count` neurons, in rising order: those with the largest mean square of what they add
    (`strength`), or those that are active for most tokens (`frequency`)."""
    if by == "strength":
        score_F = adds_TF.square().mean(0)
    else:
        active = adds_TF.topk(max(1, round(ACTIVE * adds_TF.shape[1])), dim=1).indices
        score_F = torch.bincount(active.flatten(), minlength=adds_TF.shape[1]).double()
    return score_F.topk(count).indices.sort().values


def experts_of_neurons(adds_TF: Tensor, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """The expert (F,) of each neuron; all experts have F / E neurons.

    First neurons that are active for the same tokens come together (k-means with clusters of equal size, on the shares
    of what they add). Then neurons move to the expert that is chosen where they add most, as long as the chosen experts
    of the tokens gain by that: for each token the K experts with the largest sum of squares are chosen.
    """
    squares_TF = adds_TF.square()
    shares_FT = torch.nn.functional.normalize(adds_TF, dim=0).T.contiguous()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(shares_FT), generator=generator)[:num_experts]
    centres_ET, owner_F = shares_FT[start], None
    for _ in range(ROUNDS):
        moved_F = balanced(shares_FT @ centres_ET.T)
        if owner_F is not None and torch.equal(moved_F, owner_F):
            break
        owner_F = moved_F
        sums_ET = torch.zeros_like(centres_ET).index_add_(0, owner_F, shares_FT)
        centres_ET = torch.nn.functional.normalize(sums_ET, dim=1)
    assert owner_F is not None
    best_F, sums_TE = owner_F, sums_by_expert(squares_TF, owner_F, num_experts)
    best = chosen_share(sums_TE, top_k)
    for _ in range(ROUNDS):
        owner_F = balanced(squares_TF.T @ chosen_experts(sums_TE, top_k))
        sums_TE = sums_by_expert(squares_TF, owner_F, num_experts)
        share = chosen_share(sums_TE, top_k)
        if share <= best:
            break
        best_F, best = owner_F, share
    return best_F


def balanced(gain_FE: Tensor) -> Tensor:
    """An expert (F,) for each neuron with a large sum of gains, F / E neurons each.

    Neurons choose one after the other, first those that would lose most by the second best expert; then pairs of
    neurons are exchanged where both together gain.
    """
    F, E = gain_FE.shape
    gain_FE = gain_FE.double()
    room, owner_F = [F // E] * E, torch.full((F,), -1, dtype=torch.int64)
    best_F2 = gain_FE.topk(min(2, E), dim=1).values
    order = (best_F2[:, 0] - best_F2[:, -1]).argsort(descending=True, stable=True)
    wishes = gain_FE.argsort(dim=1, descending=True, stable=True).tolist()
    for neuron in order.tolist():
        expert = next(expert for expert in wishes[neuron] if room[expert])
        owner_F[neuron] = expert
        room[expert] -= 1
    return _exchanged(gain_FE, owner_F)


def _exchanged(gain_FE: Tensor, owner_F: Tensor) -> Tensor:
    """`owner_F` after the exchanges between each pair of experts that gain something, a few times over."""
    E = gain_FE.shape[1]
    least = 1e-9 * float(gain_FE.abs().max())
    for _ in range(EXCHANGES):
        changed = False
        for one in range(E):
            for other in range(one + 1, E):
                ours, theirs = (owner_F == one).nonzero()[:, 0], (owner_F == other).nonzero()[:, 0]
                goes = (gain_FE[ours, other] - gain_FE[ours, one]).sort(descending=True)
                comes = (gain_FE[theirs, one] - gain_FE[theirs, other]).sort(descending=True)
                # an exchange gains the sum of what its two neurons gain: the best of both sides go first
                count = int((goes.values + comes.values > least).sum())
                owner_F[ours[goes.indices[:count]]] = other
                owner_F[theirs[comes.indices[:count]]] = one
                changed |= count > 0
        if not changed:
            break
    return owner_F


def sums_by_expert(squares_TF: Tensor, owner_F: Tensor, num_experts: int) -> Tensor:
    """(T, E): what the neurons of each expert add for each token, in squares."""
    return squares_TF.new_zeros(len(squares_TF), num_experts).index_add_(1, owner_F, squares_TF)


def chosen_experts(sums_TE: Tensor, top_k: int) -> Tensor:
    """(T, E): 1 for the K experts of a token whose neurons add most, else 0."""
    return torch.zeros_like(sums_TE).scatter_(1, sums_TE.topk(top_k, dim=1).indices, 1.0)


def chosen_share(sums_TE: Tensor, top_k: int) -> float:
    """The share of all squares that belongs to the chosen experts of their tokens."""
    return (sums_TE.topk(top_k, dim=1).values.sum() / sums_TE.sum()).item()
