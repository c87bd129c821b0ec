"""The analysis of routes against values that can be worked out by hand, and their recording against one plain pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pregate.config import UsageError
from pregate.engine.engine import OffloadEngine
from pregate.measure.routing_figures import (
    BlockRoutes,
    compare_routes,
    gate_mass,
    load_balance,
    record_routes,
    switch_rate,
)
from pregate.models.routing import slot_agreement
from pregate.tasks.base import Example
from tests.tiny import batch, pregated_model

REFERENCE_TE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4], [0.0, 0.0, 1.0]])


def chosen(*ids: int | tuple[int, ...]) -> torch.Tensor:
    """(T, K)"""
    return torch.tensor([(each,) if isinstance(each, int) else each for each in ids])


def reference(top_k: int) -> BlockRoutes:
    return BlockRoutes(REFERENCE_TE, REFERENCE_TE.topk(top_k).indices, torch.zeros(4))


def test_agreement_is_the_share_of_equal_choices_in_any_order() -> None:
    assert slot_agreement(chosen(0, 1, 2, 3), chosen(0, 1, 3, 2)) == 0.5
    assert slot_agreement(chosen((0, 1), (2, 3), (4, 5)), chosen((1, 0), (3, 4), (0, 1))) == 0.5


def test_gate_mass_counts_a_near_miss_for_what_it_is_worth() -> None:
    assert gate_mass(chosen(0, 1, 2, 2), reference(1)) == 1.0
    assert gate_mass(chosen(0, 2, 0, 2), reference(1)) == pytest.approx((0.7 + 0.4 + 0.3 + 1.0) / 2.6)
    assert gate_mass(chosen(1, 0, 0, 0), reference(1)) == pytest.approx((0.2 + 0.1 + 0.3) / 2.6)
    own = 0.9 + 0.9 + 0.7 + 1.0
    found = gate_mass(chosen((2, 0), (0, 1), (1, 0), (0, 2)), reference(2))
    assert found == pytest.approx((0.8 + 0.6 + 0.6 + 1.0) / own)


def test_load_balance_is_one_for_equal_loads_and_zero_for_one_expert() -> None:
    assert load_balance(chosen(0, 1, 2, 3), 4) == pytest.approx(1.0)
    assert load_balance(chosen((0, 1), (0, 1)), 4) == pytest.approx(0.5)
    assert load_balance(chosen(2, 2, 2), 4) == 0.0
    assert load_balance(chosen(0, 0), 1) == 1.0


def test_switch_rate_looks_at_neighbours_in_one_sequence_only() -> None:
    choices, sequences = chosen(0, 0, 1, 2, 2, 2), torch.tensor([0, 0, 0, 1, 1, 2])
    assert switch_rate(choices, sequences) == pytest.approx(1 / 3)
    assert switch_rate(chosen((0, 1), (1, 2), (2, 1)), torch.zeros(3)) == pytest.approx(1 / 4)
    assert switch_rate(chosen(0, 1), torch.tensor([0, 1])) is None


def routes(*choices: list[int], num_experts: int = 3) -> dict[str, list[BlockRoutes]]:
    sequences = torch.zeros(len(choices[0]), dtype=torch.long)

    def block(numbers: list[int]) -> BlockRoutes:
        ids = torch.tensor(numbers)
        return BlockRoutes(torch.nn.functional.one_hot(ids, num_experts).float(), ids[:, None], sequences)

    return {"encoder": [block(numbers) for numbers in choices]}


def test_the_section_has_one_value_a_block() -> None:
    section = compare_routes(routes([0, 1], [0, 0]), routes([0, 1], [0, 1]))
    assert section["agreement"] == {"encoder": [1.0, 0.5]}
    assert section["gate_mass"] == {"encoder": [1.0, 0.5]}
    assert section["switch_rate"] == {"pre_gated": {"encoder": [1.0, 0.0]}, "reference": {"encoder": [1.0, 1.0]}}
    assert section["load_balance"]["pre_gated"]["encoder"] == pytest.approx([0.6309, 0.0], abs=1e-4)


def test_what_cannot_be_compared_is_absent() -> None:
    alone = compare_routes(routes([0, 1]), None)
    assert set(alone) == {"load_balance", "switch_rate"} and set(alone["switch_rate"]) == {"pre_gated"}
    assert "agreement" not in compare_routes(routes([0, 1]), routes([0, 1], [0, 1]))
    other_experts = compare_routes(routes([0, 1]), routes([0, 1], num_experts=4))
    assert "agreement" in other_experts and "gate_mass" not in other_experts


EXAMPLES = [Example(str(row), "x" * row, "", ("",)) for row in range(3)]
INPUTS = batch(8, size=3)


def collate(chosen: list[Example]) -> dict[str, torch.Tensor]:
    rows = [int(example.id) for example in chosen]
    return {name: tensor[rows] for name, tensor in INPUTS.items()}


def test_recorded_routes_are_those_of_real_tokens(tmp_path: Path) -> None:
    """Through the engine, over padded batches of any size, the routes equal one resident pass with a mask. The head
    computes for target tokens alone."""
    model = pregated_model(6, 1)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        output = model(**INPUTS, output_router_logits=True)
    masks = {"encoder": INPUTS["attention_mask"].bool(), "decoder": INPUTS["labels"] != -100}
    with OffloadEngine.open(tmp_path) as engine:
        heads: list[int] = []
        engine.model.lm_head.register_forward_pre_hook(lambda _, states: heads.append(states[0].shape[:-1].numel()))
        for size in (3, 1):
            found = record_routes(engine, EXAMPLES, collate, size)  # type: ignore[arg-type]
            for stack, mask in masks.items():
                for block, logits in zip(found[stack], getattr(output, f"{stack}_router_logits"), strict=True):
                    assert torch.equal(block.choices_TK[:, 0], logits.argmax(-1)[mask])
                    assert torch.allclose(block.probabilities_TE, logits.softmax(-1)[mask], atol=1e-5)
                    assert torch.equal(block.sequences_T, mask.nonzero()[:, 0])
        targets = masks["decoder"].sum(1).tolist()
        assert heads == [sum(targets), *targets] and sum(targets) < masks["decoder"].numel()


@pytest.mark.parametrize("size", [1, 3])
def test_logits_that_are_not_finite_name_their_example(size: int, tmp_path: Path) -> None:
    """A token that only one example has gives it NaN; in a batch the others stay finite."""
    model = pregated_model(6, 1, tie_word_embeddings=False)
    rows = [set(row.tolist()) for row in INPUTS["input_ids"]]
    only = min(rows[1] - rows[0] - rows[2] - set(INPUTS["labels"].flatten().tolist()))
    with torch.no_grad():
        model.encoder.embed_tokens.weight[only] = torch.nan
    model.save_pretrained(tmp_path)
    with OffloadEngine.open(tmp_path) as engine, pytest.raises(UsageError, match=r"its logits for example '1' are NaN"):
        record_routes(engine, EXAMPLES, collate, size)  # type: ignore[arg-type]
