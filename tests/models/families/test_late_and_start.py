"""Combine weights of a block's own router, and blocks that stay conventional, in every decoder-only family: against a
naive hand-over in which each family's rule is written out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pregate.config import PreGateConfig, UsageError
from pregate.conversion.tensor_plan import plan_moves
from pregate.conversion.write import convert
from pregate.models.loading import load_resident
from pregate.models.pregating import PreGating
from pregate.models.upstream_routers import weights_by
from tests.models.families.late import NAIVE, choosing_gates, chosen_ahead, hand_over, moe_layers, with_gates
from tests.models.families.test_decoder_only import (
    FAMILIES,
    LEFT,
    RIGHT,
    STACK,
    Row,
    assert_equal_states,
    assert_same,
    batch,
    every_family,
    generated,
    gradients,
    pregated,
    upstream_model,
)

MAIN = ("olmoe", "qwen3_moe", "deepseek_v3")
SETTINGS = {
    "late_1": (PreGating(1, weights="late"), LEFT, True),
    "late_2": (PreGating(2, weights="late"), RIGHT, False),
    "late_embedding": (PreGating(2, entry="embedding", weights="late"), LEFT, False),
    "start_1": (PreGating(1, start=1), RIGHT, False),
    "start_2": (PreGating(1, start=2, entry="embedding"), LEFT, True),
    "both": (PreGating(2, start=1, weights="late"), LEFT, True),
    "both_embedding": (PreGating(1, start=2, entry="embedding", weights="late"), RIGHT, False),
}


def names_of(row: Row, upstream: Any, gating: PreGating) -> dict[str, tuple[int, str]]:
    """Of the gates that choose ahead: parameter -> (block, the parameter of a router)."""
    moves = plan_moves(row.family, {STACK: row.family.moe_layers(upstream.config, STACK)}, gating)
    return {name: (move.block, name.rpartition(".")[2]) for move in moves for name in move.renamed}


def assert_is_the_hand_over(name: str, gating: PreGating, padding: str, recompute: bool) -> None:
    row = FAMILIES[name]
    upstream = upstream_model(row, 60)
    gates = choosing_gates(row, upstream, gating)
    ours = with_gates(row, pregated(row, upstream, gating), gates)
    conventional = upstream(**batch(padding)).logits
    if recompute:
        ours.gradient_checkpointing_enable()
    logits, slopes = gradients(ours, batch(padding))
    naive = hand_over(row, upstream, gates, gating)
    expected, theirs = gradients(naive, batch(padding))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, conventional, atol=1e-2)
    ahead = names_of(row, upstream, gating)
    for parameter, slope in slopes.items():
        if parameter in ahead:
            block, part = ahead[parameter]
            other = gates[block].get_parameter(part).grad
        elif ".entry_gates." in parameter:
            continue  # the norm of an entry gate, which the naive one shares with its block
        else:
            other = theirs[parameter]
        if slope is None:
            assert other is None or not other.any(), parameter
        elif gating.entry == "own" or "layernorm" not in parameter:
            assert (slope - other).abs().max() <= 1e-3 * other.abs().max() + 1e-6, parameter
    routers = [gate.linear.weight for gate in ours.gates()]
    blocks = len(moe_layers(row, upstream))
    weighing = len(chosen_ahead(blocks, gating)) if gating.weights == "late" else 0
    assert len(routers) == blocks + weighing
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in routers)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAIN)
def test_equals_the_naive_hand_over(name: str, setting: str) -> None:
    assert_is_the_hand_over(name, *SETTINGS[setting])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in MAIN])
def test_every_other_family_weighs_by_its_rule(name: str) -> None:
    assert_is_the_hand_over(name, *SETTINGS["both"])


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_routers_own_choice_gets_its_own_weights(row: Row, dtype: torch.dtype) -> None:
    """Bit for bit; and another choice gets other weights, without a NaN."""
    upstream = upstream_model(row, 61).to(dtype)
    for layer in moe_layers(row, upstream):
        router = layer.get_submodule(row.family.router)
        hidden = torch.randn(17, upstream.config.hidden_size, dtype=dtype)
        _, weights, ids = router(hidden)
        assert torch.equal(weights_by(router, type(router), hidden, ids), weights)
        other = weights_by(router, type(router), hidden, ids.roll(1, 0))
        assert other.dtype == weights.dtype and other.isfinite().all() and not torch.equal(other, weights)


@pytest.mark.parametrize("setting", ["late_1", "both"])
@pytest.mark.parametrize("name", MAIN)
def test_generation_with_a_cache(name: str, setting: str) -> None:
    row, (gating, padding, _) = FAMILIES[name], SETTINGS[setting]
    upstream = upstream_model(row, 62)
    gates = choosing_gates(row, upstream, gating)
    ours = with_gates(row, pregated(row, upstream, gating), gates)
    naive = hand_over(row, copy.deepcopy(upstream), gates, gating)
    for ask in ("greedy", "beams"):
        one, other = generated(ours, padding, ask), generated(naive, padding, ask)
        assert torch.equal(one.sequences, other.sequences) and len(one.sequences.unique()) > 2
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(one.scores, other.scores, strict=True))
    assert not torch.equal(generated(upstream, padding, "greedy").scores[0], one.scores[0])


@every_family
def test_lookahead_0_is_still_the_source(row: Row, tmp_path: Path) -> None:
    upstream = upstream_model(row, 63)
    upstream.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "converted", PreGateConfig(lookahead=0, weights="late", start=3))  # type: ignore[arg-type]
    ours = load_resident(tmp_path / "converted")
    ours.set_expert_path("reference")
    upstream = type(upstream).from_pretrained(tmp_path / "source")
    upstream.set_experts_implementation("eager")
    assert_same(generated(ours, LEFT, "greedy"), generated(upstream, LEFT, "greedy"))
    assert set(ours.state_dict()) == set(upstream.state_dict())


@every_family
@pytest.mark.parametrize("setting", ["late_embedding", "both"])
def test_a_conversion_is_bit_exact(row: Row, setting: str, tmp_path: Path) -> None:
    """What is written, opened by transformers' Auto class, and saved again."""
    gating = SETTINGS[setting][0]
    upstream = upstream_model(row, 64).to(torch.bfloat16)
    source, converted, again = (tmp_path / name for name in ("source", "converted", "again"))
    upstream.save_pretrained(source)
    asked = {"weights": gating.weights, "start": gating.start, "entry": gating.entry}
    report = convert(str(source), converted, PreGateConfig(lookahead=2, **asked))
    expected = pregated(row, upstream, gating)
    assert expected.config.pregating == report.gating == load_resident(converted).config.pregating
    for opened in (load_resident(converted), AutoModelForCausalLM.from_pretrained(converted)):
        assert_equal_states(opened, expected)
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(again)
    assert_equal_states(AutoModelForCausalLM.from_pretrained(again), expected)


def test_random_gates_leave_the_weighing_routers_alone(tmp_path: Path) -> None:
    row = FAMILIES["deepseek_v3"]
    upstream = upstream_model(row, 65)
    upstream.save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "out", PreGateConfig(1, init="random", weights="late"))  # type: ignore[arg-type]
    model, state = load_resident(tmp_path / "out"), upstream.state_dict()
    moved = names_of(row, upstream, PreGating(1, weights="late"))
    for name, tensor in model.state_dict().items():
        if name in moved:
            assert tensor.any() or name.endswith("bias")
        else:
            assert torch.equal(tensor, state[name]), name
    for block in model.moe_blocks():
        gates = block.gates
        if gates.pre_gate is not None:
            later = next(other.gates for other in model.moe_blocks() if other.index == gates.target)
            assert not torch.equal(gates.pre_gate.router.weight, later.weight)


@pytest.mark.parametrize(
    ("gating", "words"),
    [
        ({"start": 3}, "start=3 with pregate.lookahead=1 needs at least 5 MoE blocks in the decoder, which has 4"),
        ({"start": -1}, "cannot be used"),
        ({"weights": "never"}, "cannot be used"),
    ],
)
def test_what_cannot_be_is_refused(gating: dict[str, Any], words: str) -> None:
    row = FAMILIES["olmoe"]
    config = {**upstream_model(row, 0).config.to_dict(), "num_hidden_layers": 4, "model_type": row.family.model_type}
    with pytest.raises(UsageError, match=words):
        row.family.config({**config, "pregate": {"lookahead": 1, **gating}})


def test_a_router_that_chooses_otherwise_is_refused() -> None:
    class ByArgmax(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 8))

        def forward(self, hidden_TD: torch.Tensor) -> Any:
            logits_TE = hidden_TD @ self.weight.T
            found = logits_TE.max(-1, keepdim=True)
            return logits_TE, found.values, found.indices

    with pytest.raises(UsageError, match=r"ByArgmax does not: set pregate\.weights=early"):
        weights_by(ByArgmax(), ByArgmax, torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64))


def test_every_family_has_a_naive_rule() -> None:
    assert NAIVE.keys() == FAMILIES.keys()
