"""Floors: what follows from probes taken beside each request, and what is left out where nothing was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pregate.measure.bench.floors import Decoding, Probes, floors
from pregate.system.memory import PeakMemory


def probes(links: list[float], steps: list[float], compute_ms: float | None = None) -> Probes:
    return Probes(None, None, compute_ms, links, steps)


def test_floors_are_the_larger_of_link_and_computation() -> None:
    found = floors([Decoding(33.0, 60e6)], probes([1.5, 2.5], [], compute_ms=20.0), batch=4)
    assert found.pop("link_gb_per_s_probes") == [1.5, 2.5]
    assert found == pytest.approx(
        {
            "link_gb_per_s": 2.0,
            "link_ms": 30.0,  # 60 MB at 2 GB/s
            "compute_ms": 20.0,
            "floor_ms": 30.0,
            "serial_ms": 50.0,
            "over_floor": 1.1,
            "over_floor_min": 1.1,
            "over_floor_max": 1.1,
            "possible_gain": 5 / 3,
            "roofline_tokens_per_s": 4 * 1000 / 30.0,
        }
    )
    bound_by_computation = floors([Decoding(44.0, 60e6)], probes([2.0, 2.0], [30.0, 50.0]), batch=1)
    assert bound_by_computation["floor_ms"] == bound_by_computation["compute_ms"] == 40.0
    assert bound_by_computation["compute_ms_probes"] == [30.0, 50.0]
    assert bound_by_computation["possible_gain"] == pytest.approx(1.75)


def test_each_request_is_compared_with_what_stood_beside_it() -> None:
    """A machine that becomes half as fast while a row is measured: each request is at 1.1 of its own floor."""
    requests = [Decoding(11.0, 10e6), Decoding(16.5, 10e6), Decoding(22.0, 10e6)]
    found = floors(requests, probes([1.0, 1.0, 0.5, 0.5], [1.0] * 4), batch=1)
    assert found["link_ms"] == pytest.approx(10 / 0.75)
    assert found["over_floor_min"] == pytest.approx(1.1)
    assert found["over_floor"] == pytest.approx(1.1)
    assert found["over_floor_max"] == pytest.approx(1.2375), "the mean of two bandwidths is not that of two times"
    slower = floors(requests, probes([9.0] * 4, [10.0, 10.0, 20.0, 20.0]), batch=1)
    assert (slower["over_floor_min"], slower["over_floor_max"]) == pytest.approx((1.1, 1.1))


def test_a_floor_is_the_median_of_the_requests_own_floors() -> None:
    """A link that is faster than the computation beside one request and slower beside the other: the floor is neither
    of the two medians."""
    found = floors(
        [Decoding(24.0, 10e6), Decoding(44.0, 10e6)], probes([1.0, 1.0, 1 / 3], [], compute_ms=12.0), batch=2
    )
    link_ms = [10.0, 15.0]  # 10 MB at 1 GB/s, and at the mean of 1 and 1/3
    assert found["link_ms"] == pytest.approx(sum(link_ms) / 2)
    assert found["floor_ms"] == pytest.approx((12.0 + 15.0) / 2) and found["floor_ms"] > max(found["link_ms"], 12.0)
    assert found["serial_ms"] == pytest.approx((22.0 + 27.0) / 2)
    assert found["over_floor_min"] == pytest.approx(2.0) and found["over_floor_max"] == pytest.approx(44 / 15)
    assert found["over_floor"] == pytest.approx((2.0 + 44 / 15) / 2)
    assert found["possible_gain"] == pytest.approx((22 / 12 + 27 / 15) / 2)
    assert found["roofline_tokens_per_s"] == pytest.approx(2e3 / 13.5)


def test_what_was_not_measured_has_no_floor() -> None:
    moving, still = [Decoding(33.0, 60e6)], [Decoding(22.0, 0.0)]
    found = floors(moving, probes([2.0, 2.0], []), 1)
    assert found == {"link_gb_per_s": 2.0, "link_gb_per_s_probes": [2.0, 2.0], "link_ms": 30.0}
    assert floors(moving, probes([], [], compute_ms=20.0), 1) == {"compute_ms": 20.0}
    found = floors(still, probes([], [], compute_ms=20.0), 1)
    assert (found["link_ms"], found["floor_ms"], found["over_floor"]) == pytest.approx((0.0, 20.0, 1.1))
    assert "link_gb_per_s" not in found


def test_probes_taken_otherwise_count_for_all_requests() -> None:
    found = floors([Decoding(30.0, 10e6)] * 3, probes([0.5, 1.5], [10.0, 30.0]), 1)
    assert (found["link_ms"], found["compute_ms"], found["over_floor"]) == pytest.approx((10.0, 20.0, 1.5))


def test_only_what_can_be_probed_is_probed() -> None:
    calls: list[Any] = []
    both = Probes(lambda number: calls.append(number) or 2.0, lambda: calls.append("step") or 3.0)
    peak = PeakMemory(torch.device("cpu"))
    with peak:
        both.take(peak)
        both.take(peak)
    assert (both.links_gb_per_s, both.steps_ms) == ([2.0, 2.0], [3.0, 3.0])
    assert calls == ["step", 0, "step", 1]
    neither = Probes(None, None, 5.0)
    with peak:
        neither.take(peak)
    assert (neither.links_gb_per_s, neither.steps_ms) == ([], [])
