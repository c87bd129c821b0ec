"""The losses on router logits, each of one MoE block: balance, z, and a student's distance from a teacher's routes.

Letters: T tokens, N tokens that are not padding, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
    chosen_TE = F.one_hot(ids_TK, num_experts).to(logits_TE.dtype).mean(1)
    share_E = (chosen_TE * mask_T[:, None]).sum(0) / count
    mean_E = (probabilities_TE * mask_T[:, None]).sum(0) / count
    return num_experts * (share_E * mean_E).sum()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Router z-loss of one block: mean over unmasked tokens of logsumexp(logits)^2 (ST-MoE, equation 5)."""
    logits_TE, mask_T = _masked(logits, mask)
    return (logits_TE.logsumexp(-1).square() * mask_T).sum() / mask_T.sum().clamp_min(1.0)


def binary_kl_sum(student_NE: Tensor, teacher_NE: Tensor) -> Tensor:
    """Sum over rows and experts of p log(p / q) + (1 - p) log((1 - p) / (1 - q)), in fp32, with p = sigmoid(teacher)
    and q = sigmoid(student); the arguments are logits.

    Where a router scores each expert by itself, the scores of a token are E distributions of two outcomes. This is the
    KL of all of them together. A softmax would not see a constant that is added to a token's logits, but such a router
    gives other scores for it, and with a correction bias other experts. As for the softmax, the gradient to a logit is
    q - p.
    """
    student, teacher = student_NE.float(), teacher_NE.float()
    p = teacher.sigmoid()
    yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return (p * yes + (1 - p) * no).sum()


def rank_sum(student_NE: Tensor, chosen_NK: Tensor) -> Tensor:
    """Sum over rows of the mean over the chosen experts c of log(1 + sum over the rest r of exp(s_r - s_c)), in fp32,
    with s the logits `student_NE`.

    Each chosen expert is told from the rest by a softmax of its own. So the order among the chosen, which changes no
    route, is free. With one chosen expert it is the cross-entropy with the teacher's choice.
    """
    student_NE = student_NE.float()
    if chosen_NK.shape[-1] == student_NE.shape[-1]:
        return student_NE.sum() * 0.0  # there is no rest
    rest_N1 = student_NE.scatter(1, chosen_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return F.softplus(rest_N1 - student_NE.gather(1, chosen_NK)).mean(-1).sum()
