"""Means, intervals and routes of a study against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from studies.accuracy.statistics import (
    bootstrap_means,
    by_block,
    difference,
    mean_curve,
    overall,
    paired_bootstrap,
    recovery,
    summaries,
    tasks_of,
    verdict,
)
from tests.studies.synthetic import synthetic_records


def record(seed: int, scores: list[float], **more: object) -> dict[str, object]:
    return {"task": "t", "seed": seed, "example_scores": scores, **more}


def test_a_difference_pairs_examples_and_seeds() -> None:
    ours = [record(1, [1.0, 2.0]), record(2, [5.0, 5.0]), record(3, [9.0, 9.0])]
    base = [record(2, [3.0, 5.0]), record(1, [0.0, 1.0])]
    found = difference(ours, base)
    assert found is not None
    assert found.by_seed == {1: 1.0, 2: 1.0} and found.mean == 1.0
    assert difference(ours[2:], base) is None
    with pytest.raises(ValueError, match=r"scored on \[1, 2\] examples"):
        difference([record(1, [1.0])], base)


def test_constant_differences_have_no_interval_and_seeds_widen_it() -> None:
    assert paired_bootstrap(np.full((3, 50), 2.5), 500) == pytest.approx((2.5, 2.5))
    between = np.repeat([[-1.0], [0.0], [1.0]], 400, axis=1)
    assert paired_bootstrap(between, 4000) == pytest.approx((-1.0, 1.0)), "all three draws of one seed: 1 in 27"


def test_one_seed_leaves_the_interval_over_examples() -> None:
    values = np.random.default_rng(0).normal(3, 10, (1, 400))
    low, high = paired_bootstrap(values)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_independent_seeds_and_examples_give_the_normal_interval() -> None:
    """With many seeds of the same examples: variance of examples' means plus that of seeds' means."""
    generator = np.random.default_rng(1)
    table = generator.normal(0, 1, (1, 300)) + generator.normal(0, 0.1, (40, 1))
    low, high = paired_bootstrap(table)
    error = np.sqrt(table.mean(0).var() / 300 + table.mean(1).var() / 40)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


@pytest.mark.parametrize("num_seeds", [2, 3, 6])
def test_the_luck_of_single_predictions_is_counted_more_than_once(num_seeds: int) -> None:
    """Owen 2007: (3S-2)/S times, the variance between examples once and that between seeds (S-1)/S times."""
    generator = np.random.default_rng(2)

    def counted(*shape: int) -> float:
        """The variance that the bootstrap sees in the mean of values which vary like so, over the true one."""
        tables = [np.broadcast_to(generator.normal(0, 1, shape), (num_seeds, 100)) for _ in range(300)]
        return float(np.mean([bootstrap_means(table, 300).var() for table in tables])) * shape[0] * shape[1]

    assert counted(num_seeds, 100) == pytest.approx((3 * num_seeds - 2) / num_seeds, rel=0.06)
    assert counted(1, 100) == pytest.approx(1, rel=0.06)
    assert counted(num_seeds, 1) == pytest.approx((num_seeds - 1) / num_seeds, rel=0.2)


def test_verdicts_say_what_the_interval_says() -> None:
    arms = {(arm.arm, arm.variant): arm for arm in summaries(synthetic_records(), "sst2")}
    assert list(arms)[:3] == [("conventional", ""), ("shifted", ""), ("calibrated", "")]
    assert arms["conventional", ""].difference is None
    assert verdict(arms["shifted", ""]).startswith("worse by 24.6 points [−25.6")
    assert verdict(arms["pre_gated", ""]).startswith("not worse than conventional beyond its interval [−1.")
    assert len(arms["pre_gated", "n3"].by_seed) == 3 and arms["pre_gated", "n3"].lookahead == 3


def test_tasks_are_those_with_scores() -> None:
    assert tasks_of(synthetic_records()) == ["sst2", "web_questions"]


def test_figures_of_blocks_are_means_over_records() -> None:
    one = {"routing": {"agreement": {"encoder": [1.0, 0.5]}, "switch_rate": {"pre_gated": {"encoder": [None, 0.2]}}}}
    two = {"routing": {"agreement": {"encoder": [0.0, 0.5]}, "switch_rate": {"pre_gated": {"encoder": [None, 0.4]}}}}
    assert by_block([one, two, {}], "agreement") == {"encoder": [0.5, 0.5]}
    switches = by_block([one, two], "switch_rate", "pre_gated")
    assert switches["encoder"][0] is None and switches["encoder"][1] == pytest.approx(0.3)
    assert overall(switches) == pytest.approx(0.3) and by_block([one], "switch_rate", "reference") == {}
    assert overall({}) is None


def test_recovery_is_the_share_of_what_the_shift_lost() -> None:
    found = recovery(summaries(synthetic_records(), "sst2"))
    assert found is not None
    assert (found.shifted, found.calibrated) == pytest.approx((0.51, 0.7875))
    assert found.share == pytest.approx((0.7875 - 0.51) / 0.49)
    assert found.time_share == pytest.approx(3.1 / 80)
    assert recovery([arm for arm in summaries(synthetic_records(), "sst2") if arm.arm != "shifted"]) is None


def test_curves_are_means_at_shared_steps() -> None:
    arm = next(a for a in summaries(synthetic_records(), "sst2") if a.arm == "pre_gated")
    arm.records[0]["curve"] = arm.records[0]["curve"][1:]  # type: ignore[index]
    points = mean_curve(arm)
    assert [point[0] for point in points] == [200, 300, 400]
    assert all(low <= mean <= high for _, mean, low, high in points)
