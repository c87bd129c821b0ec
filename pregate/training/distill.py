"""Learning from a teacher: a frozen model of the same family whose output logits and routes the student imitates.

Knows two models' outputs on one batch and how to load and refuse a teacher; knows nothing about optimizers, files that
a run leaves, or what else is in the loss.

Letters: B batch, S source length, T target length, V vocabulary, E experts, N tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pregate.config import RoutingLoss, TrainConfig, UsageError
from pregate.models.family import Family, family_named, family_of, family_of_model
from pregate.models.loading import load_resident, open_model
from pregate.models.objectives import Objective, TokenCounts
from pregate.models.router_losses import binary_kl_sum, rank_sum
from pregate.models.routing import ScoreFunction
from pregate.models.vocabulary_losses import Lesson, kl_sum
from pregate.training.sharding import shard


@dataclass(frozen=True)
class DistillShare:
    """What one micro batch contributes to the distillation loss of its step; shares of a step add up.

    `total` is what to differentiate beside the loss of the targets, which holds the lesson of the logits; `parts` are
    the unweighted terms of both by name, those of no weight left out. Scalars in fp32.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Distillation:
    """A teacher and how much weight its two lessons have. scores: of both models' routers. routing_loss: how routes are
    compared."""

    teacher: Any
    objective: Objective
    logits_weight: float
    routing_weight: float
    temperature: float
    scores: ScoreFunction = ScoreFunction.softmax
    routing_loss: RoutingLoss = RoutingLoss.kl

    def parts(self) -> list[str]:
        """The names of the terms that have weight, in their order."""
        return ["kl"] * (self.logits_weight > 0) + ["routing"] * (self.routing_weight > 0)

    @torch.no_grad()
    def answer(self, batch: Mapping[str, Tensor]) -> Any:
        """The teacher's outputs on `batch`: logits of target tokens and router logits, as far as they have weight."""
        asked = self.objective.target_rows(self.teacher, batch)
        if not self.logits_weight:
            asked["logits_at"] = torch.zeros_like(asked["logits_at"])
        return self.teacher(
            **self.objective.inputs(batch),
            **asked,
            output_router_logits=self.routing_weight > 0,
            use_cache=False,
        )

    def lesson(self, answer: Any) -> Lesson | None:
        """Of the teacher's `answer`, what the student's head learns; None where it has no weight."""
        return Lesson(answer.logits, self.logits_weight, self.temperature) if self.logits_weight else None

    def share(self, student: Any, teacher: Any, batch: Mapping[str, Tensor], step: TokenCounts) -> DistillShare:
        """The share of one micro batch in the distillation loss of a step whose global batch has `step` tokens.

        `student` and `teacher` are the outputs of both on `batch`, the student's with the `lesson`.
        """
        parts: dict[str, Tensor] = {}
        if self.logits_weight:
            parts["kl"] = student.terms[1] / step.target
        if not self.routing_weight:
            return DistillShare(torch.zeros_like(parts["kl"]), parts)
        how = self.scores, self.routing_loss
        parts["routing"] = routing_share(student, teacher, batch, step, self.objective, *how)
        return DistillShare(self.routing_weight * parts["routing"], parts)


def routing_share(
    student: Any,
    teacher: Any,
    batch: Mapping[str, Tensor],
    step: TokenCounts,
    objective: Objective,
    scores: ScoreFunction = ScoreFunction.softmax,
    loss: RoutingLoss = RoutingLoss.kl,
) -> Tensor:
    """The micro batch's part of KL(teacher's router || student's gate), or with `rank` of `rank_sum` for the teacher's
    choices, mean over tokens, then over all MoE blocks.

    For block i the teacher's distribution is that of its router on x_i, the student's that of whichever gate decides
    for block i, wherever it sits. It is `kl_sum` at temperature 1 whatever softens the output, or `binary_kl_sum` where
    `scores` are sigmoids: the score of the chosen expert is also its combine weight, so it has to be met and not only
    its rank. A mean over tokens, as of any other loss here, makes micro batches add up; a mean over blocks keeps the
    weight's meaning when models get deeper.
    """
    masks, counts = objective.real_tokens(batch), objective.tokens_by_stack(step)
    mine, theirs = objective.router_logits(student), objective.router_logits(teacher)
    divergence = kl_sum if scores is ScoreFunction.softmax else binary_kl_sum
    if loss is RoutingLoss.rank:
        divergence, theirs = rank_sum, objective.expert_ids(teacher)
    losses = []
    for stack, mask in masks.items():
        pairs = zip(mine[stack], theirs[stack], strict=True)
        losses += [divergence(one[mask], other[mask]) / counts[stack] for one, other in pairs]
    return torch.stack(losses).mean()


def load_distillation(
    train: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    num_processes: int = 1,
    teacher: Any | None = None,
) -> Distillation | None:
    """The teacher of `train` on `device`, frozen and in evaluation mode, with the weights of its lessons; or None.

    `dtype` is what the forward pass is autocast to, in which the teacher's weights are kept; None is fp32. The teacher
    is split over the `num_processes` as the model is. `teacher`: the model, if it is there already.
    """
    if train.teacher is None:
        return None
    if teacher is None:
        loaded: Any = load_resident(train.teacher, dtype=dtype or torch.float32)
        loaded.requires_grad_(False)
        loaded.set_expert_path(train.expert_path)
        if shard(loaded, train.sharding, device, num_processes) is None:
            loaded.to(device)
        teacher = loaded
    family = family_of_model(teacher)
    weights = (train.distill_logits, train.distill_routing, train.distill_temperature)
    return Distillation(teacher, family.objective, *weights, family.scores, train.distill_routing_loss)


def check_routing_loss(train: TrainConfig, family: Family) -> None:
    """Refuse to rank logits where routers choose by something else. Raises `UsageError`."""
    if train.distill_routing_loss is RoutingLoss.rank and family.scores is ScoreFunction.sigmoid:
        raise UsageError(
            f"train.distill_routing_loss=rank compares logits, and routers of a {family.source_type} model choose by "
            "scores with a correction bias: set train.distill_routing_loss=kl."
        )


def check_teacher(teacher: str, student: Any) -> None:
    """Refuse a teacher whose weights are not whole, or whose answers cannot be compared with the student's, from its
    headers alone. Raises `UsageError`.

    The family, vocabulary, MoE blocks of each stack and experts of a block must be the same; widths and dense layers
    need not.
    """
    opened = open_model(teacher).config
    family = family_of(opened)
    if family is not family_named(student.model_type):
        raise UsageError(
            f"The teacher {teacher} is a {family.source_type} model and the model to train is not: choose a teacher "
            "made from the same source."
        )

    def comparable(config: Any) -> dict[str, int]:
        blocks = {f"MoE blocks in the {stack}": number for stack, number in family.num_blocks(config).items()}
        experts = family.experts(config).num_experts
        return {"ids in the vocabulary": config.vocab_size, **blocks, "experts a block": experts}

    mine, theirs = comparable(student), comparable(family.config(opened))
    for what, count in mine.items():
        if theirs[what] != count:
            raise UsageError(
                f"The teacher {teacher} has {theirs[what]} {what} but the model to train has {count}: choose a teacher "
                "made from the same source."
            )
