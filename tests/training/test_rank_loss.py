"""A teacher's routes as ranks: against loops over single tokens, and where they are refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pregate.cli import compose_run
from pregate.config import RoutingLoss, TrainConfig, UsageError
from pregate.models.family import family_named
from pregate.models.router_losses import rank_sum
from pregate.training.distill import check_routing_loss, routing_share
from tests.tiny import SEQ2SEQ, pregated_model, upstream_model
from tests.tiny import batch as random_batch
from tests.training.copying import SHALLOW, train_tiny
from tests.training.test_distill import gradients, outputs_of


def naive_rank(student_E: Tensor, chosen: list[int]) -> Tensor:
    rest = [s for e, s in enumerate(student_E) if e not in chosen]
    terms = [-(student_E[c].exp() / (student_E[c].exp() + sum(r.exp() for r in rest))).log() for c in chosen]
    return sum(terms) / len(terms)  # type: ignore[return-value]


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_a_rank_loss_tells_each_chosen_expert_from_the_rest(top_k: int) -> None:
    draw = torch.Generator().manual_seed(top_k)
    student = torch.randn(11, 7, generator=draw, requires_grad=True)
    teacher = torch.randn(11, 7, generator=draw)
    chosen = teacher.topk(top_k).indices
    naive = sum(naive_rank(row, ids) for row, ids in zip(student, chosen.tolist(), strict=True))
    (expected,) = torch.autograd.grad(naive, student)  # type: ignore[arg-type]
    found = rank_sum(student, chosen)
    torch.testing.assert_close(found, naive)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], expected)
    if top_k == 1:
        torch.testing.assert_close(found, torch.nn.functional.cross_entropy(student, chosen[:, 0], reduction="sum"))
    # another order among the chosen costs nothing; the right order of all costs less than another
    swapped = student.detach().clone().scatter(1, chosen, student.detach().gather(1, chosen.roll(1, 1)))
    torch.testing.assert_close(rank_sum(swapped, chosen), found.detach())
    assert rank_sum(10 * teacher, chosen) < rank_sum(-10 * teacher, chosen) or top_k == 7


def test_a_ranked_lesson_is_that_of_the_teachers_choices() -> None:
    """Of a late model, whose choosing gates learn it, and whose weighing routers have no part in it."""
    batch = random_batch()
    student, tokens = pregated_model(seed=1, weights="late"), SEQ2SEQ.count(batch)
    with torch.no_grad():
        taught = outputs_of(upstream_model(seed=2), batch)
    outputs = outputs_of(student, batch)
    masks = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != -100}
    means = [
        torch.nn.functional.cross_entropy(mine[mask], theirs[mask].argmax(-1))
        for stack, mask in masks.items()
        for mine, theirs in zip(
            getattr(outputs, f"{stack}_router_logits"), getattr(taught, f"{stack}_router_logits"), strict=True
        )
    ]
    found = routing_share(outputs, taught, batch, tokens, SEQ2SEQ, loss=RoutingLoss.rank)
    torch.testing.assert_close(found, torch.stack(means).mean())
    slopes = gradients(found, student)
    assert slopes["encoder.block.1.layer.1.mlp.pre_gate.classifier.weight"].any()
    last = [block for block in student.moe_blocks() if block.stack == "decoder"][-1]
    assert last.gates.weighs and last.gates.router.classifier.weight.grad is None


def test_ranks_are_refused_where_they_mean_nothing() -> None:
    with pytest.raises(UsageError, match=r"train\.distill_routing_loss=rank has no weight"):
        compose_run(["train.teacher=x", "train.distill_logits=1", "train.distill_routing_loss=rank"])
    train = TrainConfig(teacher="x", distill_routing=1.0, distill_routing_loss=RoutingLoss.rank)
    check_routing_loss(train, family_named("olmoe"))
    with pytest.raises(UsageError, match="a glm4_moe model choose by scores with a correction bias"):
        check_routing_loss(train, family_named("glm4_moe"))


def test_a_student_learns_to_choose_as_its_teacher(tmp_path: Path) -> None:
    """By ranks beside the labels, with the gates of a late model."""
    upstream_model(seed=2, **SHALLOW).save_pretrained(tmp_path / "teacher")
    lesson = {"teacher": str(tmp_path / "teacher"), "distill_routing": 5.0, "distill_routing_loss": RoutingLoss.rank}
    changes = {"weights": "late"}
    _, told, _ = train_tiny(
        tmp_path / "run", steps=12, trainable="gates", model_changes=changes, balance_loss=0.0, **lesson
    )
    losses = [told.at["tiny/routing", step] for step in (1, 12)]
    assert all(map(math.isfinite, losses)) and losses[1] < losses[0]
