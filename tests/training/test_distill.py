"""Distillation against naive loops over single tokens, its sums over micro batches, refusals, and runs with it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from pregate.config import PreGateConfig, TrainConfig, UsageError
from pregate.conversion.write import convert
from pregate.models.loading import load_resident
from pregate.models.router_losses import binary_kl_sum
from pregate.models.routing import ScoreFunction
from pregate.models.vocabulary_losses import Lesson, kl_sum
from pregate.training.distill import (
    Distillation,
    check_teacher,
    load_distillation,
    routing_share,
)
from tests.tiny import SEQ2SEQ, layer_passes, pregated_model, upstream_model
from tests.tiny import batch as random_batch
from tests.training.copying import SHALLOW, Recorder, train_tiny

LESSONS: dict[str, Any] = {"distill_logits": 0.7, "distill_routing": 0.4, "distill_temperature": 2.0}


def outputs_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**batch, output_router_logits=True, use_cache=False)


def learning(student: Any, batch: dict[str, Tensor], lesson: Lesson | None) -> Any:
    """The outputs of a student as a training step asks for them."""
    inputs = SEQ2SEQ.inputs(batch) | {"labels": batch["labels"], "loss_only": True, "lesson": lesson}
    return student(**inputs, output_router_logits=True, use_cache=False)


def naive_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T² sum_v p_v (log p_v - log q_v), with sums written out."""
    p = (teacher / temperature).exp() / (teacher / temperature).exp().sum()
    q = (student / temperature).exp() / (student / temperature).exp().sum()
    return sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p))) * temperature**2  # type: ignore[return-value]


def naive_mean(teacher_BTX: Tensor, student_BTX: Tensor, mask_BT: Tensor, temperature: float) -> Tensor:
    terms = [
        naive_kl(teacher_BTX[b, t].detach(), student_BTX[b, t], temperature)
        for b in range(mask_BT.shape[0])
        for t in range(mask_BT.shape[1])
        if mask_BT[b, t]
    ]
    return sum(terms) / len(terms)  # type: ignore[return-value]


def gradients(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("temperature", "gates"), [(1.0, {}), (3.0, {}), (1.0, {"weights": "late", "start": 1, "gate": "mlp"})]
)
def test_both_terms_and_their_gradients_equal_naive_loops_over_real_tokens(
    temperature: float, gates: dict[str, Any]
) -> None:
    batch = random_batch()
    source_BS, target_BT = batch["attention_mask"].bool(), batch["labels"] != -100
    assert not source_BS.all() and not target_BT.all()
    student, tokens = pregated_model(seed=1, **gates), SEQ2SEQ.count(batch)
    with torch.no_grad():
        taught = outputs_of(upstream_model(seed=2), batch)

    logits_BTV = outputs_of(student, batch).logits
    kl = naive_mean(taught.logits, logits_BTV, target_BT, temperature)
    cross_entropy = torch.nn.functional.cross_entropy(logits_BTV[target_BT], batch["labels"][target_BT])
    expected_gradients = gradients(cross_entropy + 0.7 * kl, student)
    outputs = learning(student, batch, Lesson(taught.logits[target_BT], 0.7, temperature))
    found = Distillation(None, SEQ2SEQ, 0.7, 0.0, temperature).share(outputs, taught, batch, tokens)
    assert found.parts["kl"].item() == pytest.approx(kl.item(), rel=1e-4) and kl > 0.01
    assert outputs.terms[0].item() / tokens.target == pytest.approx(cross_entropy.item(), rel=1e-4)
    assert_same(gradients(outputs.loss / tokens.target, student), expected_gradients)

    def naive_routing(outputs: Any) -> Tensor:
        blocks = [
            naive_mean(t, s, mask, 1.0)
            for stack, mask in (("encoder", source_BS), ("decoder", target_BT))
            for t, s in zip(
                getattr(taught, f"{stack}_router_logits"), getattr(outputs, f"{stack}_router_logits"), strict=True
            )
        ]
        assert len(blocks) == 6
        return sum(blocks) / len(blocks)  # type: ignore[return-value]

    expected = naive_routing(outputs_of(student, batch))
    expected_gradients = gradients(expected, student)
    found = routing_share(outputs_of(student, batch), taught, batch, tokens, SEQ2SEQ)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same(gradients(found, student), expected_gradients)


def test_kl_differs_from_the_cross_entropy_of_soft_targets_by_the_teachers_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(4, 9, generator=generator) for _ in range(2))
    p = teacher.softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy(student, p, reduction="sum")
    entropy = -(p * p.log()).sum()
    assert kl_sum(student, teacher).item() == pytest.approx((cross_entropy - entropy).item(), rel=1e-5)
    assert kl_sum(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_sigmoid_scores_are_met_expert_by_expert(tmp_path: Path) -> None:
    """A model whose routers score by sigmoid against one with other gates: the loss and its gradients equal those of a
    loop over real tokens and experts."""
    settings = {
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
    }
    narrow = {"hidden_size": 16, "intermediate_size": 20, "moe_intermediate_size": 12, "num_attention_heads": 2}
    small = {"vocab_size": 67, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0}
    torch.manual_seed(0)
    config = Glm4MoeConfig(**settings, **narrow, **small, num_experts_per_tok=2)
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path / "teacher")
    lessons = TrainConfig(teacher=str(tmp_path / "teacher"), distill_routing=1.0)
    distillation = load_distillation(lessons, torch.device("cpu"), None)
    assert distillation is not None and distillation.scores is ScoreFunction.sigmoid
    convert(str(tmp_path / "teacher"), tmp_path / "student", PreGateConfig())
    student, objective = load_resident(tmp_path / "student"), distillation.objective
    student.requires_grad_(True)
    ids_BT = torch.randint(2, 67, (2, 5))
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": ids_BT.masked_fill(mask_BT == 0, -100)}
    taught = distillation.answer(batch)

    def naive(outputs: Any) -> Tensor:
        blocks = []
        for mine, theirs in zip(outputs.router_logits, taught.router_logits, strict=True):
            terms = []
            for b, t in mask_BT.nonzero().tolist():
                for z, other in zip(mine[b, t], theirs[b, t], strict=True):
                    p, q = 1 / (1 + (-other).exp()), 1 / (1 + (-z).exp())
                    terms.append(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
            blocks.append(torch.stack(terms).sum() / 8)
        return torch.stack(blocks).mean()

    def answered() -> Any:
        return student(**objective.inputs(batch), output_router_logits=True, use_cache=False)

    expected = naive(answered())
    expected_gradients = gradients(expected, student)
    found = distillation.share(answered(), taught, batch, objective.count(batch)).parts["routing"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and found > 0.01
    assert_same(gradients(found, student), expected_gradients)
    assert any(slope.abs().max() > 1e-3 for name, slope in expected_gradients.items() if "pre_gate" in name)


def test_sigmoid_scores_of_large_logits_stay_finite() -> None:
    student = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    loss = binary_kl_sum(student, torch.tensor([[-200.0, -200.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(200.0) and student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, 0.0, 0.0]]))


def test_t_squared_keeps_the_size_of_gradients() -> None:
    """At a high temperature the gradient is that of half the squared distance of centred logits over V (Hinton)."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(1, 8, generator=generator) for _ in range(2))
    student.requires_grad_()
    kl_sum(student, teacher, temperature=1e3).backward()
    assert student.grad is not None
    difference = (student - student.mean()) - (teacher - teacher.mean())
    torch.testing.assert_close(student.grad, (difference / 8).detach(), rtol=2e-2, atol=1e-4)


def test_terms_are_computed_in_fp32() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert kl_sum(logits, -logits).dtype == torch.float32
    assert kl_sum(logits, -logits).item() == pytest.approx(kl_sum(logits.float(), -logits.float()).item(), rel=1e-6)


def test_what_padding_positions_hold_does_not_matter() -> None:
    batch = random_batch()
    tokens = SEQ2SEQ.count(batch)
    outputs, taught = outputs_of(pregated_model(), batch), outputs_of(upstream_model(), batch)
    masks = {"encoder": batch["attention_mask"] == 0, "decoder": batch["labels"] == -100}

    def scrambled(honest: Any, value: float) -> SimpleNamespace:
        routers = {
            f"{stack}_router_logits": [
                x.masked_fill(mask[..., None], value) for x in getattr(honest, f"{stack}_router_logits")
            ]
            for stack, mask in masks.items()
        }
        return SimpleNamespace(loss=honest.loss, **routers)

    distillation = Distillation(None, SEQ2SEQ, 0.0, 1.0, 1.5)
    honest = distillation.share(outputs, taught, batch, tokens)
    other = distillation.share(scrambled(outputs, math.inf), scrambled(taught, 3.0), batch, tokens)
    assert honest.total.item() == other.total.item() and 0 < honest.total.item() < math.inf


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
def test_shares_and_gradients_of_micro_batches_add_up_to_one_big_batch(sizes: tuple[int, ...]) -> None:
    batch = random_batch(size=4, seed=3)
    tokens, student = SEQ2SEQ.count(batch), pregated_model(seed=1)
    distillation = Distillation(pregated_model(seed=2, lookahead=0), SEQ2SEQ, 0.7, 0.4, 2.0)
    results = []
    for cut in ((4,), sizes):
        student.zero_grad(set_to_none=True)
        sums, start = dict.fromkeys(distillation.parts(), 0.0), 0
        for size in cut:
            micro = {key: value[start : start + size] for key, value in batch.items()}
            start += size
            answer = distillation.answer(micro)
            outputs = learning(student, micro, distillation.lesson(answer))
            share = distillation.share(outputs, answer, micro, tokens)
            (share.total + outputs.loss / tokens.target).backward()
            sums = {name: sums[name] + part.item() for name, part in share.parts.items()}
        results.append((sums, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}))
    (whole, whole_gradients), (summed, summed_gradients) = results
    assert summed == pytest.approx(whole, rel=1e-5)
    assert_same(summed_gradients, whole_gradients)


def test_terms_without_weight_are_neither_asked_for_nor_computed() -> None:
    batch = random_batch()
    tokens = SEQ2SEQ.count(batch)
    student, teacher = pregated_model(seed=1), pregated_model(seed=2, lookahead=0)
    logits_only = Distillation(teacher, SEQ2SEQ, 1.0, 0.0, 1.0)
    answer = logits_only.answer(batch)
    assert not answer.encoder_router_logits
    assert answer.logits.shape == (int((batch["labels"] != -100).sum()), 67)
    share = logits_only.share(learning(student, batch, logits_only.lesson(answer)), answer, batch, tokens)
    assert share.total.item() == 0, "the loss of the targets holds it"
    assert list(share.parts) == logits_only.parts() == ["kl"]
    routing_only = Distillation(teacher, SEQ2SEQ, 0.0, 0.5, 1.0)
    answer = routing_only.answer(batch)
    assert answer.logits.shape == (0, 67) and routing_only.lesson(answer) is None
    outputs = learning(student, batch, None)
    share = routing_only.share(outputs, answer, batch, tokens)
    assert list(share.parts) == routing_only.parts() == ["routing"]
    assert share.total.item() == pytest.approx(0.5 * share.parts["routing"].item())


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A conventional model of the geometry that `train_tiny` trains."""
    upstream_model(seed=7, **SHALLOW).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_the_teacher_is_frozen_in_evaluation_and_in_the_dtype_of_the_forward_pass(teacher: str) -> None:
    for dtype in (None, torch.bfloat16):
        loaded = load_distillation(TrainConfig(teacher=teacher, **LESSONS), torch.device("cpu"), dtype)
        assert loaded is not None
        assert {p.dtype for p in loaded.teacher.parameters()} == {dtype or torch.float32}
        assert not loaded.teacher.training
        assert not any(p.requires_grad for p in loaded.teacher.parameters())
        assert not loaded.answer(random_batch()).logits.requires_grad
    assert load_distillation(TrainConfig(), torch.device("cpu"), None) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 71}, "has 71 ids in the vocabulary but the model to train has 67"),
        ({"num_experts": 4}, "has 4 experts a block but the model to train has 5"),
        ({"num_sparse_decoder_layers": 2}, "MoE blocks in the decoder but the model to train has 3"),
    ],
)
def test_a_teacher_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, int], said: str) -> None:
    upstream_model(**changes).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=said):
        check_teacher(str(tmp_path), pregated_model().config)


def test_a_teacher_may_be_wider_than_its_student_but_not_of_another_family(tmp_path: Path) -> None:
    upstream_model(d_ff=12, d_kv=4).save_pretrained(tmp_path)
    check_teacher(str(tmp_path), pregated_model().config)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(UsageError, match="is a 't5' model"):
        check_teacher(str(tmp_path), pregated_model().config)
    with pytest.raises(UsageError, match="There is no directory"):
        check_teacher(str(tmp_path / "nowhere"), pregated_model().config)


def test_a_student_comes_closer_to_its_teacher_and_its_lessons_are_logged(tmp_path: Path, teacher: str) -> None:
    settings: dict[str, Any] = {"teacher": teacher, "distill_logits": 5.0, "distill_routing": 5.0}
    before = {name: p.clone() for name, p in upstream_model(seed=7, **SHALLOW).named_parameters()}
    _, tracker, summary = train_tiny(tmp_path / "run", steps=25, batch_sequences=16, micro_batch_tokens=80, **settings)
    for term in ("kl", "routing"):
        first, last = tracker.at[f"tiny/{term}", 1], tracker.at[f"tiny/{term}", 25]
        assert 0 < last < 0.7 * first, (term, first, last)
    assert summary.metrics["tiny/routing"] == tracker.at["tiny/routing", 25]
    after = type(upstream_model()).from_pretrained(teacher)
    assert all(torch.equal(before[name], p) for name, p in after.named_parameters())
    _, plain, _ = train_tiny(tmp_path / "plain", steps=1)
    assert not {"tiny/kl", "tiny/routing"} & {name for name, _ in plain.at}


def test_a_model_taught_by_itself_has_nothing_to_learn_from_it(tmp_path: Path) -> None:
    pregated_model(**SHALLOW).save_pretrained(tmp_path / "itself")
    _, tracker, _ = train_tiny(
        tmp_path / "run", steps=1, teacher=str(tmp_path / "itself"), distill_logits=1.0, distill_routing=1.0
    )
    for term in ("kl", "routing"):
        assert tracker.at[f"tiny/{term}", 1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("trainable", ["all", "gates"])
def test_a_resumed_distillation_equals_one_that_never_stopped(tmp_path: Path, teacher: str, trainable: str) -> None:
    settings: dict[str, Any] = {"teacher": teacher, **LESSONS, "dropout": 0.1, "steps": 4, "trainable": trainable}
    straight, _, _ = train_tiny(tmp_path / "straight", **settings)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "halves", tracker=Recorder(interrupt_at=2), **settings)
    resumed, _, _ = train_tiny(tmp_path / "halves", resume=True, **settings)
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not list((tmp_path / "straight").rglob("teacher*"))


def test_gradient_checkpointing_does_not_change_a_distillation(tmp_path: Path, teacher: str) -> None:
    settings: dict[str, Any] = {"teacher": teacher, **LESSONS, "steps": 1}
    models = [pregated_model(**SHALLOW) for _ in range(2)]
    once, twice = map(layer_passes, models)
    _, plain, _ = train_tiny(tmp_path / "plain", model=models[0], **settings)
    _, saving, _ = train_tiny(tmp_path / "saving", model=models[1], gradient_checkpointing=True, **settings)
    for term in ("loss", "kl", "routing", "grad_norm"):
        assert saving.at[f"tiny/{term}", 1] == pytest.approx(plain.at[f"tiny/{term}", 1], rel=1e-4), term
    assert min(once.values()) > 0 and twice == {layer: 2 * count for layer, count in once.items()}


def test_a_distillation_in_bf16_is_near_that_in_fp32(tmp_path: Path, teacher: str) -> None:
    settings: dict[str, Any] = {"teacher": teacher, **LESSONS, "steps": 1}
    _, full, _ = train_tiny(tmp_path / "full", **settings)
    _, half, _ = train_tiny(tmp_path / "half", precision="bf16", **settings)
    for term in ("loss", "kl", "routing"):
        assert half.at[f"tiny/{term}", 1] == pytest.approx(full.at[f"tiny/{term}", 1], rel=0.1), term
        assert half.at[f"tiny/{term}", 1] != pytest.approx(full.at[f"tiny/{term}", 1], rel=1e-5), term
