"""How examples become the inputs of a decoder-only model: what is learnt, what is counted, and packing."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.models.objectives import Causal, predicting
from pregate.models.packing_and_padding import Row, document_batch
from pregate.training.losses import loss_share
from tests.test_made_up_family import model

CAUSAL = Causal("decoder")


def ids(*tokens: int) -> array[int]:
    return array("i", tokens)


ROWS = [
    Row(ids(5, 6, 7, 8), ids(9, 1)),
    Row(ids(), ids(11, 12, 1)),
    Row(ids(21, 22, 23, 24, 25), ids(26, 1), (range(1, 3),)),
    Row(ids(31), ids(32, 1), (range(1),)),
    Row(ids(41, 42), ids(43, 44, 45, 1)),
]
LEARNT = 2 + 2 + 4 + 2 + 4


def test_the_target_is_learnt_and_the_first_token_of_a_row_never() -> None:
    batch = CAUSAL.batch(ROWS[:4], pad_token_id=0)
    assert batch["input_ids"].tolist()[1] == [11, 12, 1, 0, 0, 0, 0]
    assert batch["attention_mask"].sum(1).tolist() == [6, 3, 7, 3]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, -100, 9, 1, -100],
        [-100, 12, 1, -100, -100, -100, -100],
        [-100, 22, 23, -100, -100, 26, 1],
        [-100, 32, 1, -100, -100, -100, -100],
    ]


def test_what_nobody_predicts_is_not_counted() -> None:
    """Whoever made the labels: a label at the first place is none."""
    labels = torch.tensor([[5, 6, 7], [8, -100, 9]])
    batch = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
    assert predicting(labels).tolist() == [[True, True, False], [False, True, False]]
    assert CAUSAL.count(batch).target == 3 and CAUSAL.count(batch).source == 3


def test_packed_rows_restart_their_positions_and_hold_every_example_once() -> None:
    batch = CAUSAL.packed(ROWS, pad_token_id=0, row_tokens=10)
    assert batch["input_ids"].shape == (3, 10)
    seen = []
    columns = (batch[name].tolist() for name in ("input_ids", "position_ids", "attention_mask"))
    for tokens, places, mask in zip(*columns, strict=True):
        real = sum(mask)
        assert mask == [1] * real + [0] * (len(mask) - real)
        starts = [i for i in range(real) if places[i] == 0]
        for start, stop in zip(starts, [*starts[1:], real], strict=True):
            assert places[start:stop] == list(range(stop - start))
            seen.append(tokens[start:stop])
    assert sorted(seen) == sorted([*row.source, *row.target] for row in ROWS)
    assert CAUSAL.count(batch) == CAUSAL.count(CAUSAL.batch(ROWS, 0)) and CAUSAL.count(batch).target == LEARNT
    assert set(CAUSAL.inputs(batch)) == {"input_ids", "position_ids"}


def test_an_example_longer_than_a_row_has_one_of_its_own() -> None:
    batch = CAUSAL.packed(ROWS, pad_token_id=0, row_tokens=4)
    assert batch["input_ids"].shape == (5, 7)


def step(trained: Any, batch: dict[str, Tensor], whole: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """All terms of the loss of one step, and its gradients."""
    trained.zero_grad(set_to_none=True)
    asked = {"labels": batch["labels"], "loss_only": True, "output_router_logits": True, "use_cache": False}
    outputs = trained(**CAUSAL.inputs(batch), **asked)
    tokens = CAUSAL.count(whole)
    share = loss_share(outputs, batch, tokens, objective=CAUSAL, balance_weight=0.1, z_weight=0.01)
    share.total.backward()
    return share.parts(), {name: parameter.grad for name, parameter in trained.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("lookahead", "entry"), [(0, "own"), (2, "embedding")])
def test_packed_examples_are_learnt_as_apart(lookahead: int, entry: str, attention: str) -> None:
    trained = model(lookahead, entry)
    trained.config._attn_implementation = attention
    trained.train()
    apart, packed = CAUSAL.batch(ROWS, 0), CAUSAL.packed(ROWS, 0, row_tokens=12)
    assert len(packed["input_ids"]) < len(apart["input_ids"])
    parts, gradients = step(trained, apart, apart)
    found, others = step(trained, packed, apart)
    assert parts.isfinite().all() and (parts > 0).all()
    torch.testing.assert_close(found, parts, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 or "experts" in name, name
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    blind = {**packed, "position_ids": torch.arange(packed["input_ids"].shape[1]).expand_as(packed["input_ids"])}
    assert abs(step(trained, blind, apart)[0][0] - parts[0]) > 1e-3, "attention across examples would show"


def test_the_experts_in_the_output_are_those_that_the_blocks_used() -> None:
    trained, used = model(lookahead=1), []
    for block in trained.moe_blocks():
        block.module.experts.register_forward_pre_hook(lambda _, args: used.append(args[1]))
    batch = CAUSAL.batch(ROWS, 0)
    outputs = trained(**CAUSAL.inputs(batch), output_router_logits=True)
    found = CAUSAL.expert_ids(outputs)["decoder"]
    assert len(found) == len(used) == 4
    for ids_BTK, ids_NK in zip(found, used, strict=True):
        assert ids_BTK.shape == (5, 7, 2) and torch.equal(ids_BTK.flatten(0, 1), ids_NK)


def test_a_document_batch_learns_all_but_the_first_tokens() -> None:
    tokens = torch.tensor([[4, 5, 1, 6, 1, 7], [8, 9, 3, 4, 5, 1]])
    starts = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0]]).bool()
    batch = document_batch(tokens, starts)
    assert batch["labels"].tolist() == [[-100, 5, 1, -100, 1, -100], [-100, 9, 3, 4, 5, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert CAUSAL.count(batch).target == 8 and CAUSAL.tokens_by_stack(CAUSAL.count(batch)) == {"decoder": 12}
