"""What a row is judged by: the link and a step's computation as they are at the moment, and the floors that follow.

A shared machine changes from second to second. So both are measured before each request and after the last, and each
request is compared with the floor of its own neighbours. Knows durations; knows nothing about stores or engines.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pregate.system.memory import PeakMemory


@dataclass
class Probes:
    """Measured again and again beside one row. `link` (of how often it was asked) and `step_ms`: how, or None where
    nothing moves and where a step cannot be timed beside the row. `compute_ms` then holds for all steps, if it is
    known."""

    link: Callable[[int], float] | None
    step_ms: Callable[[], float] | None
    compute_ms: float | None = None
    links_gb_per_s: list[float] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)

    def take(self, peak: PeakMemory) -> None:
        """Measure both now; what that takes does not count in `peak`."""
        with peak.left_out():
            if self.step_ms is not None:
                self.steps_ms.append(self.step_ms())
            if self.link is not None:
                # other slabs each time: a disk's host may remember what it has read
                self.links_gb_per_s.append(self.link(len(self.links_gb_per_s)))


@dataclass(frozen=True)
class Decoding:
    """The steps of one request: milliseconds and bytes over the link of each, as means."""

    tpot_ms: float
    link_bytes: float


def floors(requests: Sequence[Decoding], probes: Probes, batch: int) -> dict[str, Any]:
    """What a token cannot be faster than: T_link, the bytes of a step over the bandwidth beside it, and T_compute, the
    whole model's time in memory; `serial_ms` adds them, `floor_ms` overlaps them perfectly.

    Medians over requests, `over_floor` of each request's own ratio. Where nothing moves, T_link is 0 whatever the link;
    where a link or a computation was not measured, what would follow from it is absent.
    """
    found: dict[str, Any] = {}
    if probes.links_gb_per_s:
        found |= {
            "link_gb_per_s": statistics.mean(probes.links_gb_per_s),
            "link_gb_per_s_probes": probes.links_gb_per_s,
        }
    if probes.steps_ms:
        found["compute_ms_probes"] = probes.steps_ms
    link_ms = _link_ms(requests, probes)
    compute_ms = _between(probes.steps_ms, len(requests)) or [probes.compute_ms] * len(requests)
    if link_ms is not None:
        found["link_ms"] = statistics.median(link_ms)
    known = [ms for ms in compute_ms if ms is not None]
    if known:
        found["compute_ms"] = statistics.median(known)
    if link_ms is None or not known:
        return found
    each = list(zip(requests, link_ms, known, strict=True))
    ratios = [request.tpot_ms / max(link, compute) for request, link, compute in each]
    floor_ms = statistics.median(max(link, compute) for _, link, compute in each)
    return found | {
        "floor_ms": floor_ms,
        "serial_ms": statistics.median(link + compute for _, link, compute in each),
        "over_floor": statistics.median(ratios),
        "over_floor_min": min(ratios),
        "over_floor_max": max(ratios),
        "possible_gain": statistics.median((link + compute) / max(link, compute) for _, link, compute in each),
        "roofline_tokens_per_s": batch * 1e3 / floor_ms,
    }


def _link_ms(requests: Sequence[Decoding], probes: Probes) -> list[float] | None:
    """T_link of each request, by the mean of the bandwidth before and after it."""
    links = _between(probes.links_gb_per_s, len(requests))
    if links:
        return [request.link_bytes / link / 1e6 for request, link in zip(requests, links, strict=True)]
    return [0.0] * len(requests) if all(request.link_bytes == 0 for request in requests) else None


def _between(probes: Sequence[float], num_requests: int) -> list[float]:
    """For each request the mean of the probes around it, or of all, where they were not taken request by request."""
    if len(probes) == num_requests + 1:
        return [(before + after) / 2 for before, after in pairwise(probes)]
    return [statistics.mean(probes)] * num_requests if probes else []
