"""More inputs of a gate: the features against hand-made ones, and that a useful input is seen to be useful."""

from __future__ import annotations

import pytest
import torch

from studies.dense_to_moe.gate_inputs import INPUTS, MOVED, agreements, features_of
from studies.dense_to_moe.moe import Form
from studies.dense_to_moe.split import split
from tests.studies.dense_to_moe.llama import llama, rows


def test_features_are_those_of_the_blocks() -> None:
    model = split(llama(), rows(), Form(experts=4, top_k=2, shared=0.25), 0, lambda *_: None)
    rows_BT = rows()[:3]
    blocks = features_of(model, rows_BT)
    outputs = model(input_ids=rows_BT, output_router_logits=True)
    for block, logits_NE in zip(blocks, outputs.router_logits, strict=True):
        torch.testing.assert_close(block["logits"], logits_NE)
        assert (block["routes"].sum(1) == 2).all() and torch.isfinite(block["shared"]).all()
        length = rows_BT.shape[1]
        assert not block["routes_before"][::length].any()
        assert torch.equal(block["routes_before"][1:length], block["routes"][: length - 1])
        assert block["shared"].abs().max() > 0 and not torch.equal(block["shared"], block["output"])


@pytest.mark.parametrize("name", ["routes", "shared"])
def test_an_input_that_decides_is_seen_to(name: str) -> None:
    """The next block's logits are a linear map of that input, which the states say nothing of."""
    draw = torch.Generator().manual_seed(3)
    number, width, experts, top_k = 600, 12, 6, 2
    ids = torch.rand(number, experts, generator=draw).topk(top_k).indices
    here = {
        "states": torch.randn(number, width, generator=draw),
        "routes": torch.zeros(number, experts).scatter(1, ids, 1.0),
        "routes_before": torch.zeros(number, experts),
        "shared": torch.randn(number, width, generator=draw),
        "output": torch.randn(number, width, generator=draw),
    }
    logits_NE = here[name] @ torch.randn(here[name].shape[1], experts, generator=draw)
    chosen = torch.zeros(number, experts).scatter(1, logits_NE.topk(top_k).indices, 1.0)
    weight = torch.randn(experts, width, generator=draw)
    found = agreements(here, {"logits": logits_NE, "routes": chosen, "weight": weight})
    for label, parts in INPUTS.items():
        assert (found[label] > 0.97) if name in parts else (found[label] < 0.7), (label, found)
    assert 0.1 < found[MOVED] < 0.7
