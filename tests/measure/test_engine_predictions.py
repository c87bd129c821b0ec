"""Intervals and batching against values that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pregate.measure.engine_predictions import length_sorted_batches
from pregate.measure.intervals import bootstrap_interval
from pregate.tasks.base import Example


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
