"""The part of a request's trace that an evaluation shows as a timeline: computing, transfers and waiting.

Knows spans; `report.evaluation_plots` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pregate.engine.trace import Span

TIMELINE_TOKENS = 2


def middle_of(spans: Sequence[Span], seconds: Sequence[float]) -> list[dict[str, Any]]:
    """The spans of `TIMELINE_TOKENS` decoding steps in the middle of a request whose tokens came at `seconds`."""
    middle = max(0, (len(seconds) - TIMELINE_TOKENS) // 2)
    begin = seconds[middle] * 1e3
    end = seconds[min(len(seconds) - 1, middle + TIMELINE_TOKENS)] * 1e3
    waits = [s for s in spans if s.lane == "wait"]
    shown = [s for s in spans if s.lane in ("transfer", "wait")]
    shown += [piece for s in spans if s.lane == "layer" for piece in _without(s, waits)]
    shown = [s for s in shown if s.end_ms > begin and s.start_ms < end]
    return [s.to_dict() for s in sorted(shown, key=lambda s: s.start_ms)]


def _without(layer: Span, waits: Sequence[Span]) -> list[Span]:
    """The parts of a layer's span in which it computed rather than waited, as spans of lane `compute`."""
    pieces, start = [], layer.start_ms
    for wait in waits:
        if layer.start_ms <= wait.start_ms and wait.end_ms <= layer.end_ms:
            pieces.append(Span("compute", layer.name, start, wait.start_ms))
            start = wait.end_ms
    return [*pieces, Span("compute", layer.name, start, layer.end_ms)]
