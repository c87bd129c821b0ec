"""The training loss of one micro batch, normalised so that micro batches and processes add up to one big batch.

Knows logits, labels, masks and the router losses of `pregate.models.router_losses`; knows nothing about optimizers,
devices or where batches come from.

Letters: B batch, S source length, T target length, V vocabulary, E experts, N target tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pregate.models.objectives import Objective, TokenCounts
from pregate.models.router_losses import balance_loss, z_loss
from pregate.models.routing import ScoreFunction


@dataclass(frozen=True)
class LossShare:
    """What one micro batch contributes to the loss of its step; shares of a step add up to the step's value.

    `total` is what to differentiate, with a teacher's lesson for the targets if there is one; the others are its
    unweighted parts. Scalars in fp32.
    """

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor
    z: Tensor

    def parts(self) -> Tensor:
        """(cross_entropy, balance, z), detached, as one tensor of shape (3,)."""
        return torch.stack([self.cross_entropy, self.balance, self.z]).detach()


def loss_share(
    outputs: Any,
    batch: Mapping[str, Tensor],
    step: TokenCounts,
    *,
    objective: Objective,
    balance_weight: float,
    z_weight: float,
    scores: ScoreFunction = ScoreFunction.softmax,
) -> LossShare:
    """The share of one micro batch in the loss of a step whose whole global batch has `step` tokens.

    `outputs` are those of a model asked with `loss_only`: `.loss` and `.terms` of `head_losses`, and where a router
    weight is not zero, the router logits that `objective` finds there, one (B, S or T, E) a block. Cross-entropy and z
    loss are means over tokens, so their shares add up to the value of one big batch exactly. The balance loss is not
    linear in its tokens: it is evaluated per micro batch and weighted by that micro batch's share of the step's tokens.
    Router losses are means over the blocks of all stacks. `scores`: of the routers.
    """
    of_targets = outputs.loss / step.target
    cross_entropy = outputs.terms[0] / step.target
    balance = z = cross_entropy.new_zeros(())
    if balance_weight or z_weight:
        blocks = _blocks_with_masks(outputs, batch, step, objective)
        if balance_weight:
            shares = [balance_loss(logits, mask, ids, scores) * share for logits, ids, mask, share in blocks]
            balance = torch.stack(shares).mean()
        if z_weight:
            z = torch.stack([z_loss(logits, mask) * share for logits, _, mask, share in blocks]).mean()
    total = of_targets + balance_weight * balance + z_weight * z
    return LossShare(total, cross_entropy, balance, z)


def _blocks_with_masks(
    outputs: Any, batch: Mapping[str, Tensor], step: TokenCounts, objective: Objective
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each MoE block: its logits, the chosen experts, the mask of its real tokens, and the micro batch's share of
    such tokens."""
    masks, counts = objective.real_tokens(batch), objective.tokens_by_stack(step)
    chosen = objective.expert_ids(outputs)
    blocks = [
        (logits, ids, masks[stack], masks[stack].sum() / counts[stack])
        for stack, found in objective.router_logits(outputs).items()
        for logits, ids in zip(found, chosen[stack], strict=True)
    ]
    assert blocks, "router losses are weighted but the model returned no router logits"
    return blocks
