"""The spans of the timeline: what counts as computing."""

from __future__ import annotations

from pregate.engine.trace import Span
from pregate.measure.timeline import _without


def test_waiting_is_not_computing() -> None:
    layer = Span("layer", "decoder block 0", 10.0, 20.0)
    waits = [Span("wait", "w", 12.0, 15.0), Span("wait", "w", 30.0, 31.0)]
    assert [(s.start_ms, s.end_ms) for s in _without(layer, waits)] == [(10.0, 12.0), (15.0, 20.0)]
