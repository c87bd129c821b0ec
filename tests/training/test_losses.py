"""Losses against naive loops over single tokens, and micro batches against one big batch."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.training.losses import loss_share
from tests.tiny import SEQ2SEQ, pregated_model, upstream_model
from tests.tiny import batch as random_batch


def outputs_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Any:
    return model(**batch, output_router_logits=True, use_cache=False)


def learnt(outputs: Any, labels_BT: Tensor) -> SimpleNamespace:
    """Outputs with all logits as those of a model that gives its losses alone."""
    loss = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")
    routers = {f"{stack}_router_logits": getattr(outputs, f"{stack}_router_logits") for stack in ("encoder", "decoder")}
    return SimpleNamespace(loss=loss, terms=torch.stack([loss, 0 * loss]).detach(), **routers)


def naive_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> float:
    total = 0.0
    for row, labels in zip(logits_BTV.tolist(), labels_BT.tolist(), strict=True):
        for logits, label in zip(row, labels, strict=True):
            if label != -100:
                total += math.log(sum(math.exp(x) for x in logits)) - logits[label]
    return total


def naive_router_losses(logits_BTE: Tensor, mask_BT: Tensor) -> tuple[float, float]:
    rows = [logits_BTE[b, t] for b in range(mask_BT.shape[0]) for t in range(mask_BT.shape[1]) if mask_BT[b, t]]
    experts = logits_BTE.shape[-1]
    chosen, probability, z = [0.0] * experts, [0.0] * experts, 0.0
    for row in rows:
        chosen[int(row.argmax())] += 1 / len(rows)
        for expert, p in enumerate(row.softmax(-1).tolist()):
            probability[expert] += p / len(rows)
        z += row.exp().sum().log().item() ** 2 / len(rows)
    return experts * sum(f * p for f, p in zip(chosen, probability, strict=True)), z


@pytest.mark.parametrize("make", [pregated_model, upstream_model])
def test_one_batch_equals_naive_loops_over_real_tokens(make) -> None:
    batch = random_batch()
    assert (batch["labels"] == -100).any() and (batch["attention_mask"] == 0).any()
    outputs = outputs_of(make(), batch)
    tokens = SEQ2SEQ.count(batch)
    given = learnt(outputs, batch["labels"])
    share = loss_share(given, batch, tokens, objective=SEQ2SEQ, balance_weight=0.3, z_weight=0.2)
    blocks = [(x, batch["attention_mask"]) for x in outputs.encoder_router_logits]
    blocks += [(x, batch["labels"] != -100) for x in outputs.decoder_router_logits]
    losses = [naive_router_losses(logits, mask) for logits, mask in blocks]
    cross_entropy = naive_cross_entropy(outputs.logits, batch["labels"]) / tokens.target
    balance, z = (sum(column) / len(losses) for column in zip(*losses, strict=True))
    assert share.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-5)
    assert share.balance.item() == pytest.approx(balance, rel=1e-5)
    assert share.z.item() == pytest.approx(z, rel=1e-5)
    assert share.total.item() == pytest.approx(cross_entropy + 0.3 * balance + 0.2 * z, rel=1e-5)


def test_what_padding_positions_hold_does_not_matter() -> None:
    batch = random_batch()
    outputs = outputs_of(pregated_model(), batch)
    padded_BS, padded_BT = batch["attention_mask"] == 0, batch["labels"] == -100
    scrambled = SimpleNamespace(
        logits=outputs.logits.masked_fill(padded_BT[..., None], 9.0),
        encoder_router_logits=[x.masked_fill(padded_BS[..., None], 7.0) for x in outputs.encoder_router_logits],
        decoder_router_logits=[x.masked_fill(padded_BT[..., None], 5.0) for x in outputs.decoder_router_logits],
    )
    tokens = SEQ2SEQ.count(batch)
    honest, other = (
        loss_share(
            learnt(found, batch["labels"]), batch, tokens, objective=SEQ2SEQ, balance_weight=1.0, z_weight=1.0
        ).parts()
        for found in (outputs, scrambled)
    )
    torch.testing.assert_close(honest, other, rtol=0, atol=0)
    assert torch.isfinite(honest).all() and honest.min() > 0


def test_the_losses_alone_are_those_of_all_logits() -> None:
    batch, model = random_batch(), pregated_model()
    tokens, results = SEQ2SEQ.count(batch), []
    for alone in (False, True):
        model.zero_grad(set_to_none=True)
        outputs = model(**batch, loss_only=True, output_router_logits=True) if alone else outputs_of(model, batch)
        assert (outputs.logits is None) == alone
        given = outputs if alone else learnt(outputs, batch["labels"])
        share = loss_share(given, batch, tokens, objective=SEQ2SEQ, balance_weight=0.3, z_weight=0.2)
        share.total.backward()
        results.append((share.parts(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (expected_parts, expected), (parts, found) = results
    torch.testing.assert_close(parts, expected_parts)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ValueError, match="not both"):
        model(**batch, logits_at=batch["labels"] != -100)


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 1, 1), (3, 1)])
def test_gradients_of_micro_batches_equal_those_of_one_big_batch(sizes: tuple[int, ...]) -> None:
    batch = random_batch(size=4, seed=3)
    tokens = SEQ2SEQ.count(batch)
    model = pregated_model()
    gradients = []
    for cut in ((4,), sizes):
        model.zero_grad(set_to_none=True)
        parts, start = torch.zeros(3), 0
        for size in cut:
            micro = {key: value[start : start + size] for key, value in batch.items()}
            start += size
            outputs = learnt(outputs_of(model, micro), micro["labels"])
            share = loss_share(outputs, micro, tokens, objective=SEQ2SEQ, balance_weight=0.0, z_weight=0.1)
            share.total.backward()
            parts += share.parts()
        gradients.append(({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, parts))
    (whole, whole_parts), (summed, summed_parts) = gradients
    torch.testing.assert_close(summed_parts, whole_parts)
    assert whole.keys() == summed.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_balance_loss_is_weighted_by_the_micro_batch_share_of_tokens() -> None:
    batch = random_batch(size=2, seed=1)
    model, tokens = pregated_model(), SEQ2SEQ.count(batch)
    expected = found = 0.0
    for row in range(2):
        micro = {key: value[row : row + 1] for key, value in batch.items()}
        own = SEQ2SEQ.count(micro)
        outputs = outputs_of(model, micro)
        given = learnt(outputs, micro["labels"])
        found += loss_share(given, micro, tokens, objective=SEQ2SEQ, balance_weight=1.0, z_weight=0.0).balance.item()
        encoder = [naive_router_losses(x, micro["attention_mask"])[0] for x in outputs.encoder_router_logits]
        decoder = [naive_router_losses(x, micro["labels"] != -100)[0] for x in outputs.decoder_router_logits]
        weighted = sum(encoder) * own.source / tokens.source + sum(decoder) * own.target / tokens.target
        expected += weighted / len(encoder + decoder)
    assert found == pytest.approx(expected, rel=1e-5)


def test_router_logits_are_not_needed_when_their_losses_have_no_weight() -> None:
    batch = random_batch()
    model = pregated_model()
    outputs, mean = model(**batch, loss_only=True, use_cache=False), model(**batch, use_cache=False).loss.item()
    share = loss_share(outputs, batch, SEQ2SEQ.count(batch), objective=SEQ2SEQ, balance_weight=0.0, z_weight=0.0)
    assert share.total.item() == share.cross_entropy.item() == pytest.approx(mean, rel=1e-5)
