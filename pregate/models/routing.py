"""Routing as pure functions: from router logits to expert ids and combine weights.

Training, evaluation and the offloading engine all call these; that is what makes their routes identical.
Knows nothing about modules, devices or where an expert's weights live.

Letters: B batch, T tokens of a sequence, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn

DROPPED = -1
"""Expert id of a token that its expert had no capacity left for."""


class ScoreFunction(StrEnum):
    """From a router's logits to the scores of experts. softmax: of all experts together. sigmoid: of each expert by
    itself, so that the scores of a token need not add up to one."""

    softmax = "softmax"
    sigmoid = "sigmoid"

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """The scores as shares of one, in the logits' dtype. Sigmoid scores are divided by their sum (DeepSeek-V3,
        arXiv:2412.19437, equation 19)."""
        if self is ScoreFunction.softmax:
            return logits_TE.softmax(-1)
        return nn.functional.logsigmoid(logits_TE).softmax(-1)  # the exponential of it is the score


class Routing(NamedTuple):
    """Which experts serve which token.

    expert_ids_BTK: int64, `DROPPED` where capacity ran out. weights_BTK: combine weights in the dtype of the
    hidden states. logits_BTE: raw router logits in the router's dtype, for losses and analysis.
    """

    expert_ids_BTK: Tensor
    weights_BTK: Tensor
    logits_BTE: Tensor


def router_logits(hidden_BTD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Expert logits (B, T, E) computed in `dtype` whatever autocast says ("selective precision",
    Switch Transformers, section 2.4)."""
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        bias = None if bias_E is None else bias_E.to(dtype)
        return torch.nn.functional.linear(hidden_BTD.to(dtype), weight_ED.to(dtype), bias)


def jitter(hidden_BTD: Tensor, noise: float, in_place: bool = False) -> Tensor:
    """Multiply by uniform noise in [1 - noise, 1 + noise] (the Switch exploration policy)."""
    factor_BTD = torch.empty_like(hidden_BTD).uniform_(1.0 - noise, 1.0 + noise)
    return hidden_BTD.mul_(factor_BTD) if in_place else hidden_BTD * factor_BTD


def weights_of(logits_BTE: Tensor, expert_ids_BTK: Tensor, dtype: torch.dtype) -> Tensor:
    """The combine weights (B, T, K) that `route` gives to experts that were chosen elsewhere. Those of `DROPPED` are
    arbitrary."""
    return logits_BTE.softmax(-1).to(dtype).gather(-1, expert_ids_BTK.clamp_min(0))


def straight_through(weights_BTK: Tensor, early_BTK: Tensor) -> Tensor:
    """`weights_BTK`, bit for bit, whose gradient also reaches the gate that has chosen the experts, as if its own
    weights `early_BTK` were used. A choice has no gradient: without this the gate would learn nothing from the task."""
    return weights_BTK + (early_BTK - early_BTK.detach()) if early_BTK.requires_grad else weights_BTK


def slots_in_common(expert_ids_TK: Tensor, reference_TK: Tensor) -> Tensor:
    """For each token the share (T,) of its chosen experts that `reference_TK` has chosen too; with K = 1 it is 1 or
    0."""
    same_TKK = expert_ids_TK[:, :, None] == reference_TK[:, None, :]
    return same_TKK.any(-1).double().mean(-1)


def slot_agreement(expert_ids_TK: Tensor, reference_TK: Tensor) -> float:
    """Mean of `slots_in_common`: with K = 1 the share of tokens that both routers send to the same expert."""
    return slots_in_common(expert_ids_TK, reference_TK).mean().item()


Choose = Callable[[Tensor], Tensor]
"""From logits_TE to expert_ids_TK: what a router chooses, whatever its weights are."""


def first_choice(logits_TE: Tensor) -> Tensor:
    """The expert (T, 1) with the largest logit or probability, the first of equal ones."""
    # not topk, which may give any of equal ones
    return logits_TE.argmax(-1, keepdim=True)


def logits_agreement(logits_TE: Tensor, reference_TE: Tensor, choose: Choose) -> float:
    """The slot agreement of what `choose` chooses by both logits."""
    return slot_agreement(choose(logits_TE), choose(reference_TE))


def route(logits_BTE: Tensor, dtype: torch.dtype) -> Routing:
    """The most probable expert of each token, weighed by its probability: softmax in the logits' dtype, then cast to
    `dtype`, that of the hidden states. On equal probabilities the first expert wins, as in the Switch family."""
    probabilities_BTE = torch.softmax(logits_BTE, dim=-1).to(dtype)
    weights_BT1 = probabilities_BTE.max(-1, keepdim=True).values
    return Routing(first_choice(probabilities_BTE), weights_BT1, logits_BTE)
