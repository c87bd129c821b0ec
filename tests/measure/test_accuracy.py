"""Intervals, batching and agreement against values that can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pregate.engine.decode import OffloadEngine
from pregate.measure.accuracy import agreement, bootstrap_interval, first_choices, length_sorted_batches
from pregate.tasks.base import Example
from tests.tiny import batch, pregated_model


def test_bootstrap_interval_of_a_constant_is_a_point() -> None:
    assert bootstrap_interval([3.0] * 10, 500, 0) == [3.0, 3.0]


def test_bootstrap_interval_matches_the_normal_one() -> None:
    """For many independent values the percentile interval is mean ± 1.96 standard errors."""
    values = np.random.default_rng(1).normal(50.0, 10.0, 2000)
    low, high = bootstrap_interval(values.tolist(), 4000, 0)
    error = values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_bootstrap_is_seeded() -> None:
    values = np.random.default_rng(0).normal(size=40).tolist()
    assert bootstrap_interval(values, 100, 7) == bootstrap_interval(values, 100, 7)
    assert bootstrap_interval(values, 100, 7) != bootstrap_interval(values, 100, 8)


def test_batches_hold_every_example_once_by_length() -> None:
    examples = [Example(str(i), "x" * length, "", ("",)) for i, length in enumerate([5, 1, 9, 3, 7])]
    assert length_sorted_batches(examples, 2) == [[1, 3], [0, 4], [2]]


def test_agreement_is_the_share_of_equal_choices() -> None:
    one = {"encoder": [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 0, 0])]}
    other = {"encoder": [torch.tensor([0, 1, 3, 2]), torch.tensor([0, 0, 0, 1])]}
    assert agreement(one, other) == {"encoder": [0.5, 0.75]}


def test_first_choices_are_those_of_real_tokens(tmp_path: Path) -> None:
    """Through the engine, over padded batches of any size, the choices equal one resident pass with a mask."""
    model = pregated_model(6, 1)
    model.save_pretrained(tmp_path)
    inputs = batch(8, size=3)
    examples = [Example(str(row), "x" * row, "", ("",)) for row in range(3)]

    def collate(chosen: list[Example]) -> dict[str, torch.Tensor]:
        rows = [int(example.id) for example in chosen]
        return {name: tensor[rows] for name, tensor in inputs.items()}

    with torch.inference_mode():
        output = model(**inputs, output_router_logits=True)
    with OffloadEngine.open(tmp_path) as engine:
        for size in (3, 1):
            found = first_choices(engine, examples, collate, size)  # type: ignore[arg-type]
            mask = inputs["attention_mask"].bool()
            for block, logits in enumerate(output.encoder_router_logits):
                assert torch.equal(found["encoder"][block], logits.argmax(-1)[mask])
            mask = inputs["labels"] != -100
            for block, logits in enumerate(output.decoder_router_logits):
                assert torch.equal(found["decoder"][block], logits.argmax(-1)[mask])
