"""The losses on router logits: balance and z, each of one MoE block.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.models.routing import ScoreFunction


def _masked(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    logits_TE = logits.reshape(-1, logits.shape[-1]).float()
    if mask is None:
        return logits_TE, logits_TE.new_ones(logits_TE.shape[0])
    return logits_TE, mask.reshape(-1).to(logits_TE.dtype)


def balance_loss(
    logits: Tensor,
    mask: Tensor | None = None,
    expert_ids: Tensor | None = None,
    scores: ScoreFunction = ScoreFunction.softmax,
) -> Tensor:
    """Load-balancing loss of one block: E * sum_e f_e P_e over the tokens where `mask` is true.

    f_e is the share of the choices that fall on e, P_e the mean router probability of e (Switch Transformers, equation
    4). It is 1 when both are uniform. `logits` (..., E), `mask` (...): padding never counts. `expert_ids` (..., K): the
    choices; None where they are the most probable expert of each token. `scores`: the router's, see `probabilities`.
    """
    logits_TE, mask_T = _masked(logits, mask)
    num_experts = logits_TE.shape[-1]
    count = mask_T.sum().clamp_min(1.0)
    probabilities_TE = scores.probabilities(logits_TE)
    ids_TK = logits_TE.argmax(-1, keepdim=True) if expert_ids is None else expert_ids.flatten(0, -2)
    chosen_TE = torch.nn.functional.one_hot(ids_TK, num_experts).to(logits_TE.dtype).mean(1)
    share_E = (chosen_TE * mask_T[:, None]).sum(0) / count
    mean_E = (probabilities_TE * mask_T[:, None]).sum(0) / count
    return num_experts * (share_E * mean_E).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Router z-loss of one block: mean over unmasked tokens of logsumexp(logits)^2 (ST-MoE, equation 5)."""
    logits_TE, mask_T = _masked(logits, mask)
    return (logits_TE.logsumexp(-1).square() * mask_T).sum() / mask_T.sum().clamp_min(1.0)
