"""The timeline of the README: measured on a small model, and drawn from the spans that are committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studies.overlap import FILE, POLICIES, STEPS, draw, measure

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_committed_spans_are_drawn(tmp_path: Path, suffix: str) -> None:
    [folder] = (ROOT / "results").glob("overlap_*")
    draw(folder, tmp_path / f"overlap.{suffix}")
    assert (tmp_path / f"overlap.{suffix}").stat().st_size > 10_000


def test_both_policies_are_measured_over_the_same_steps(tmp_path: Path) -> None:
    measure("nano_switch", tmp_path)
    policies = json.loads((tmp_path / FILE).read_text())["policies"]
    assert [*policies] == [*POLICIES]
    for steps in policies.values():
        times = steps["tokens_ms"]
        assert len(times) == STEPS and times == sorted(times)
        spans = [span for span in steps["spans"] if span["lane"] == "transfer"]
        # one expert of each of the three blocks in each step; a neighbour's may reach into the window
        assert len(spans) >= 3 * STEPS
        assert all(0 <= span["start_ms"] <= span["end_ms"] <= times[-1] for span in steps["spans"])
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    draw(tmp_path, tmp_path / "overlap.svg")
