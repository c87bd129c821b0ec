"""Traces as Perfetto reads them: every span once, in microseconds, and no two slices of a track that cross."""

from __future__ import annotations

import json
import random
from itertools import combinations

import pytest

from pregate.engine.trace import Span
from pregate.measure.perfetto import to_perfetto


def crossing(first: dict[str, float], second: dict[str, float]) -> bool:
    """Overlap without one containing the other, which the format does not allow on one track."""
    a, b = sorted(((e["ts"], e["ts"] + e["dur"]) for e in (first, second)), key=lambda i: (i[0], -i[1]))
    return a[0] < b[0] < a[1] < b[1]


def test_every_span_is_an_event_in_microseconds() -> None:
    spans = [Span("layer", "decoder block 0", 1.0, 4.0), Span("wait", "decoder block 0 expert 3", 1.5, 2.5)]
    trace = json.loads(json.dumps(to_perfetto(spans, "pre_gated")))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(e["name"], e["cat"], e["ts"], e["dur"]) for e in events] == [
        ("decoder block 0", "layer", 1000.0, 3000.0),
        ("wait decoder block 0 expert 3", "wait", 1500.0, 1000.0),
    ]
    named = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert named == {1: "compute"}
    assert {e["tid"] for e in events} == {1}


@pytest.mark.parametrize("seed", range(5))
def test_transfers_in_flight_together_do_not_cross(seed: int) -> None:
    draw = random.Random(seed)
    spans = []
    for number in range(60):
        start = draw.uniform(0, 50)
        spans.append(Span("transfer", str(number), start, start + draw.uniform(0.1, 9)))
    trace = to_perfetto(spans, "x")
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert sorted(e["name"] for e in events) == sorted(s.name for s in spans)
    for first, second in combinations(events, 2):
        assert first["tid"] != second["tid"] or not crossing(first, second), (first, second)
    named = {e["tid"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {e["tid"] for e in events} <= named


def test_a_crossing_would_be_noticed() -> None:
    assert crossing({"ts": 0, "dur": 5}, {"ts": 3, "dur": 5})
    assert not crossing({"ts": 0, "dur": 5}, {"ts": 1, "dur": 2})
    assert not crossing({"ts": 0, "dur": 5}, {"ts": 5, "dur": 2})
