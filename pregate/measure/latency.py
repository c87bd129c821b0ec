"""How long generation takes under each policy, what moves, and whether the tokens are the resident model's.

Batch 1, greedy, a fixed number of new tokens, as in the paper. Figures are medians over prompts and repeats after
a warm-up. Knows engines and token ids; knows nothing about tasks or reports.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from pregate.engine.engine import OffloadEngine
from pregate.engine.trace import Span, Trace
from pregate.measure.logits import check_moved, compare_logits, tolerance, watched
from pregate.system.memory import PeakMemory

TIMELINE_TOKENS = 2


class TokenClock(BaseStreamer):
    """Notes the moment each token is known. The first call of `generate` brings the decoder's start token.

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
    """One request: its tokens, the seconds until each was known, what the clock read then, and what a trace saw
    (None without one)."""

    tokens: Tensor
    seconds: list[float]
    readings: list[int]
    spans: list[Span] | None

    @property
    def ttft_ms(self) -> float:
        return self.seconds[0] * 1e3

    @property
    def tpot_ms(self) -> float | None:
        steps = len(self.seconds) - 1
        return (self.seconds[-1] - self.seconds[0]) / steps * 1e3 if steps else None

    @property
    def decoding(self) -> list[Span]:
        """What happened after the first token."""
        return [span for span in self.spans or () if span.start_ms >= self.seconds[0] * 1e3]

    @property
    def block_ms(self) -> list[float]:
        """Each pass through a whole decoder layer with an MoE block, while decoding."""
        return [s.end_ms - s.start_ms for s in self.decoding if s.lane == "layer" and s.name.startswith("decoder")]

    @property
    def exposed_ms_per_token(self) -> float | None:
        steps = len(self.seconds) - 1
        if self.spans is None or not steps:
            return None
        return sum(s.end_ms - s.start_ms for s in self.decoding if s.lane == "wait") / steps


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


@dataclass(frozen=True)
class BenchRequest:
    """Prompts as rows of ids (1, S) each, the number of new tokens, and how often each prompt is repeated."""

    prompts: Sequence[Tensor]
    new_tokens: int
    repeats: int

    def options(self, prompt: Tensor) -> dict[str, Any]:
        return {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "do_sample": False,
            "num_beams": 1,
            "min_new_tokens": self.new_tokens,
            "max_new_tokens": self.new_tokens,
        }


@dataclass(frozen=True)
class Expected:
    """What the whole model in memory gives, prompt by prompt: tokens (1, T), and logits (1, T - 1, V) with those as
    input.

    `most`: how far logits of the same weights may be off, see `logits.TOLERANCE`; None where other weights are served.
    """

    tokens: Sequence[Tensor]
    logits: Sequence[Tensor]
    most: float | None = None


def resident_answers(model: Any, request: BenchRequest, same_weights: bool = True) -> Expected:
    """Through Hugging Face `generate` and a forward call; `same_weights`: whether these are also what is served."""
    prompts = [prompt.to(model.device) for prompt in request.prompts]
    with torch.inference_mode():
        tokens = [model.generate(**request.options(prompt)).cpu() for prompt in prompts]
        logits = [forced_logits(model, prompt, each) for prompt, each in zip(prompts, tokens, strict=True)]
    return Expected(tokens, logits, tolerance({p.dtype for p in model.parameters()}) if same_weights else None)


def forced_logits(forward: Callable[..., Any], prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits (1, T - 1, V) of each place of `tokens` (1, T), given those before it."""
    targets = tokens[:, :-1].to(prompt.device)
    return forward(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), decoder_input_ids=targets, use_cache=False
    ).logits.cpu()


def measure_policy(
    open_engine: Callable[[], OffloadEngine],
    request: BenchRequest,
    device: torch.device,
    expected: Expected | None,
    keep_trace: Callable[[list[Span]], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One engine record (see `eval.json`) and a short window of its trace.

    Times and counts are per prompt: `ttft_ms` to the first token, `tpot_ms` per token after it, `block_ms` per whole
    decoder layer with an MoE block and `exposed_ms_per_token` both while decoding. Bytes, hits and misses are those
    of one pass over all prompts. `peak_device_bytes` covers opening and serving. Without `expected` nothing is said
    about equality. `keep_trace` is given the whole trace of one request.
    """
    with PeakMemory(device) as peak, open_engine() as engine, watched(engine) as rows_not_finite:
        prompts = [prompt.to(device) for prompt in request.prompts]
        engine.generate(**request.options(prompts[0]))
        clock, timed = TokenClock(device), []
        equal, timeline, ever_moved = True, [], 0
        for repeat in range(request.repeats):
            ever_moved += engine.counters.bytes_moved
            engine.reset_counters()
            for number, prompt in enumerate(prompts):
                served = time_request(engine.generate, request.options(prompt), clock, engine.trace)
                equal = equal and expected is not None and torch.equal(served.tokens, expected.tokens[number])
                timed.append(served)
                if repeat == request.repeats - 1 and number == 0:
                    timeline = _window(served.spans or [], served.seconds)
                    if keep_trace is not None:
                        keep_trace(served.spans or [])
        peak_bytes = peak.read()
        counted = engine.counters.to_dict()
        check_moved(engine.policy, ever_moved + counted["bytes_moved"])
        wanted = expected.tokens if expected is not None else [served.tokens for served in timed]
        logits = [forced_logits(engine.forward, *pair) for pair in zip(prompts, wanted, strict=False)]
        logits_record = judged(logits, expected, bool(rows_not_finite()))
    figures = medians(timed)
    record: dict[str, Any] = {
        "ttft_ms": figures.pop("ttft_ms"),
        "tokens_per_s": request.new_tokens / statistics.median(served.seconds[-1] for served in timed),
        "bytes_moved": counted["bytes_moved"],
        "hits": counted["hits"],
        "misses": counted["misses"],
    }
    if expected is not None:
        record["tokens_equal_resident"] = equal and logits_record["logits_finite"]
    record |= logits_record | figures
    if peak_bytes is not None:
        record["peak_device_bytes"] = peak_bytes
    return record, timeline


def judged(logits: Sequence[Tensor], expected: Expected | None, broke: bool) -> dict[str, Any]:
    """`compare_logits` with what is expected; `broke`: a step that was timed had logits that were not finite."""
    found = compare_logits(logits, expected.logits if expected else None, expected.most if expected else None)
    return found | ({"logits_finite": False} if broke else {})


def _window(spans: Sequence[Span], seconds: Sequence[float]) -> list[dict[str, Any]]:
    """The spans of a few decoding steps in the middle, for the timeline."""
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
