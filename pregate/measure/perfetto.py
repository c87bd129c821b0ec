"""Spans of a trace as a file that https://ui.perfetto.dev opens. Knows spans; knows nothing about who recorded them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pregate.engine.trace import Span

COMPUTE_TRACK, FIRST_TRANSFER_TRACK = 1, 2


def write_perfetto(path: Path, spans: Sequence[Span], title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_perfetto(spans, title)), encoding="utf-8")


def to_perfetto(spans: Sequence[Span], title: str) -> dict[str, Any]:
    """`spans` in the Chrome trace event format, which https://ui.perfetto.dev opens as it is.

    Layers, experts and waits share the compute track, where they nest. Transfers that overlap lie on tracks of their
    own, because slices of one track must not cross.
    """
    events: list[dict[str, Any]] = []
    free_from: list[float] = []
    for span in sorted(spans, key=lambda span: (span.start_ms, -span.end_ms)):
        track = COMPUTE_TRACK
        if span.lane == "transfer":
            lane = next((n for n, end in enumerate(free_from) if end <= span.start_ms), len(free_from))
            free_from[lane : lane + 1] = [span.end_ms]
            track = FIRST_TRANSFER_TRACK + lane
        events.append(
            {
                "name": span.name if span.lane in ("layer", "transfer") else f"{span.lane} {span.name}",
                "cat": span.lane,
                "ph": "X",
                "ts": round(span.start_ms * 1e3, 3),
                "dur": round(max(0.0, span.end_ms - span.start_ms) * 1e3, 3),
                "pid": 1,
                "tid": track,
            }
        )
    names = {COMPUTE_TRACK: "compute"}
    names |= {FIRST_TRANSFER_TRACK + n: f"transfer {n + 1}" for n in range(len(free_from))}
    header = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": title}}]
    header += [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": track, "args": {"name": name}}
        for track, name in names.items()
    ]
    header += [
        {"name": "thread_sort_index", "ph": "M", "pid": 1, "tid": track, "args": {"sort_index": track}}
        for track in names
    ]
    return {"displayTimeUnit": "ms", "traceEvents": [*header, *events]}
