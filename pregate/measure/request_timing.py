"""Timing one request: when each token was known, what moved by then, and what a trace saw.

Knows clocks, traces and token ids; knows nothing about who serves or why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from pregate.engine.trace import Span, Trace


class TokenClock(BaseStreamer):
    """Notes the moment each token is known. The first call of `generate` brings the prompt, or the start token.

    `read`: a count to note at the same moments. `between`: work to do before every step, whose time does not count.
    """

    def __init__(
        self,
        device: torch.device,
        read: Callable[[], int] | None = None,
        between: Callable[[], None] | None = None,
    ) -> None:
        self._device, self._read, self._between = device, read, between
        self._start_over()

    def begin(self) -> None:
        if self._between is not None:
            self._between()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._start_over()

    def _start_over(self) -> None:
        self._prompt_seen = False
        self.seconds: list[float] = []
        self.readings: list[int] = []
        self._start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        now = time.perf_counter()
        if self._prompt_seen:
            self.seconds.append(now - self._start)
            if self._read is not None:
                self.readings.append(self._read())
        self._prompt_seen = True
        if self._between is not None:
            self._between()
            self._start += time.perf_counter() - now

    def end(self) -> None:
        return None


@dataclass(frozen=True)
class Timed:
    """One request. seconds: until each token was known, or where `steps` is given, until the first and the last.
    readings: what the clock read at those moments. spans: what a trace saw, None without one. steps: decoding steps
    after the first token, where not every one was timed. counted: an engine's counters. distinct: experts a block and
    step, where the engine knows. finite: whether all logits were, as far as the engine knows."""

    tokens: Tensor
    seconds: list[float]
    readings: list[int]
    spans: list[Span] | None
    steps: int | None = None
    counted: dict[str, int] = field(default_factory=dict)
    distinct: float | None = None
    finite: bool = True

    @property
    def num_steps(self) -> int:
        return len(self.seconds) - 1 if self.steps is None else self.steps

    @property
    def ttft_ms(self) -> float:
        return self.seconds[0] * 1e3

    @property
    def tpot_ms(self) -> float | None:
        return (self.seconds[-1] - self.seconds[0]) / self.num_steps * 1e3 if self.num_steps else None

    @property
    def read_per_step(self) -> float:
        """What the clock read after the first token, for each step."""
        return (self.readings[-1] - self.readings[0]) / self.num_steps

    @property
    def decoding(self) -> list[Span]:
        """What happened after the first token."""
        return [span for span in self.spans or () if span.start_ms >= self.seconds[0] * 1e3]

    @property
    def block_ms(self) -> list[float]:
        """Each pass through a whole layer with an MoE block, while decoding."""
        return [s.end_ms - s.start_ms for s in self.decoding if s.lane == "layer"]

    @property
    def exposed_ms_per_token(self) -> float | None:
        if self.spans is None or not self.num_steps:
            return None
        return sum(s.end_ms - s.start_ms for s in self.decoding if s.lane == "wait") / self.num_steps


def time_request(
    generate: Callable[..., Tensor], options: dict[str, Any], clock: TokenClock, trace: Trace | None = None
) -> Timed:
    """Serve one request and note when its tokens came."""
    if trace is not None:
        trace.start()
    clock.begin()
    tokens = generate(**options, streamer=clock)
    spans = trace.stop() if trace is not None else None
    return Timed(tokens.cpu(), clock.seconds, clock.readings, spans)


def medians(requests: Sequence[Timed]) -> dict[str, float]:
    """`ttft_ms`, and of what was measured `tpot_ms`, `exposed_ms_per_token` and `block_ms`: medians over requests,
    of `block_ms` over all passes."""
    figures = {"ttft_ms": statistics.median(request.ttft_ms for request in requests)}
    for name in ("tpot_ms", "exposed_ms_per_token"):
        known = [value for request in requests if (value := getattr(request, name)) is not None]
        if known:
            figures[name] = statistics.median(known)
    passes = [value for request in requests for value in request.block_ms]
    if passes:
        figures["block_ms"] = statistics.median(passes)
    return figures
