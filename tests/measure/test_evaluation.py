"""The comparison of two models' scores against values that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pregate.config import Run
from pregate.measure.evaluation import Subject, compare
from pregate.measure.routing_figures import BlockRoutes
from pregate.tasks.base import Scores

WIDE = [0.0, 100.0, 30.0, 70.0, 10.0, 90.0]
"""Scores of one model that differ much from example to example."""


def subject(routes: Any = None, **per_example: list[float]) -> Subject:
    """A model whose overall score is the mean of those of its examples."""
    overall = {metric: sum(values) / len(values) for metric, values in per_example.items()}
    return Subject("some/checkpoint", [], Scores(overall, per_example), routes or {})


def test_the_difference_is_the_subject_minus_the_reference() -> None:
    """For each metric with its own values: here one rises and the other falls."""
    ours, other = subject(em=[100.0, 100.0], f1=[40.0, 20.0]), subject(em=[100.0, 0.0], f1=[60.0, 60.0])
    section = compare(Run(), ours, other)
    assert section["scores"] == {"pre_gated": {"em": 100.0, "f1": 30.0}, "reference": {"em": 50.0, "f1": 60.0}}
    assert section["parity"]["em_delta"] == 50.0 and section["parity"]["f1_delta"] == -30.0
    # of two examples a quarter of the samples holds the first alone, and a quarter the second alone
    assert section["parity"]["em_delta_interval"] == [0.0, 100.0]
    assert section["parity"]["f1_delta_interval"] == [-40.0, -20.0]
    assert section["intervals"]["pre_gated"] == {"em": [100.0, 100.0], "f1": [20.0, 40.0]}
    assert section["intervals"]["reference"] == {"em": [0.0, 100.0], "f1": [60.0, 60.0]}


def test_the_interval_is_of_differences_of_the_same_example() -> None:
    """Each example gains two points. The scores themselves spread over a hundred, and so do differences of others."""
    ours, other = subject(em=[value + 2 for value in WIDE]), subject(em=WIDE)
    section = compare(Run(), ours, other)
    assert section["parity"] == {"em_delta": pytest.approx(2.0), "em_delta_interval": [2.0, 2.0]}
    low, high = section["intervals"]["reference"]["em"]
    assert high - low > 40
    low, high = compare(Run(), subject(em=WIDE[::-1]), other)["parity"]["em_delta_interval"]
    assert low < -40 and high > 40
    with pytest.raises(ValueError, match="longer"):
        compare(Run(), subject(em=WIDE[1:]), other)


def test_settings_of_the_evaluation_reach_the_interval() -> None:
    """With one sample both ends are its mean. Another seed draws another sample."""
    run, ours, other = Run(), subject(em=WIDE), subject(em=[0.0] * len(WIDE))
    run.eval.bootstrap_samples = 1
    drawn = set()
    for run.seed in range(5):
        low, high = compare(run, ours, other)["parity"]["em_delta_interval"]
        assert low == high
        drawn.add(low)
    assert len(drawn) > 1


def test_without_a_reference_nothing_is_compared() -> None:
    def routes(*ids: int) -> dict[str, list[BlockRoutes]]:
        chosen_T = torch.tensor(ids)
        probabilities_TE = torch.nn.functional.one_hot(chosen_T, 3).float()
        return {"decoder": [BlockRoutes(probabilities_TE, chosen_T[:, None], torch.zeros(len(ids)))]}

    alone = compare(Run(), subject(routes(0, 1), em=WIDE), None)
    assert set(alone["scores"]) == set(alone["intervals"]) == {"pre_gated"} and "parity" not in alone
    assert "agreement" not in alone["routing"]
    both = compare(Run(), subject(routes(0, 1), em=WIDE), subject(routes(0, 2), em=WIDE))
    assert both["routing"]["agreement"] == {"decoder": [0.5]}
    assert "routing" not in compare(Run(), subject(em=WIDE), subject(em=WIDE))
