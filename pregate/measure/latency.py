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

from pregate.engine.decode import OffloadEngine
from pregate.engine.trace import Span
from pregate.memory import PeakMemory

TIMELINE_TOKENS = 2


class TokenClock(BaseStreamer):
    """Notes the moment each token is known. The first call of `generate` brings the decoder's start token."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []
        self.begin()

    def begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._start = time.perf_counter()
        self._prompt_seen = False
        self.seconds = []

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self.seconds.append(time.perf_counter() - self._start)
        self._prompt_seen = True

    def end(self) -> None:
        return None


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


def resident_tokens(model: Any, request: BenchRequest) -> list[Tensor]:
    """What the whole model in memory generates through Hugging Face `generate`, prompt by prompt."""
    with torch.inference_mode():
        return [model.generate(**request.options(p.to(model.device))).cpu() for p in request.prompts]


def measure_policy(
    open_engine: Callable[[], OffloadEngine],
    request: BenchRequest,
    device: torch.device,
    expected: Sequence[Tensor] | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One engine record (see `eval.json`) and a short window of its trace.

    Times and counts are per prompt: `ttft_ms` to the first token, `tpot_ms` per token after it, `block_ms` per whole
    decoder layer with an MoE block and `exposed_ms_per_token` both while decoding. Bytes, hits and misses are those
    of one pass over all prompts. `peak_device_bytes` covers opening and serving. Without `expected`, the resident
    model's tokens, nothing is said about equality.
    """
    with PeakMemory(device) as peak, open_engine() as engine:
        prompts = [prompt.to(device) for prompt in request.prompts]
        engine.generate(**request.options(prompts[0]))
        ttft, tpot, total, block, exposed = [], [], [], [], []
        equal, timeline = True, []
        for repeat in range(request.repeats):
            engine.reset_counters()
            for number, prompt in enumerate(prompts):
                clock = TokenClock(device)
                engine.trace.start()
                clock.begin()
                tokens = engine.generate(**request.options(prompt), streamer=clock)
                spans = engine.trace.stop()
                seconds = clock.seconds
                equal = equal and expected is not None and torch.equal(tokens.cpu(), expected[number])
                ttft.append(seconds[0] * 1e3)
                total.append(seconds[-1])
                if len(seconds) > 1:
                    tpot.append((seconds[-1] - seconds[0]) / (len(seconds) - 1) * 1e3)
                    decoding = [span for span in spans if span.start_ms >= seconds[0] * 1e3]
                    block += [s.end_ms - s.start_ms for s in decoding if _is_decoder_layer(s)]
                    waits = sum(s.end_ms - s.start_ms for s in decoding if s.lane == "wait")
                    exposed.append(waits / (len(seconds) - 1))
                if repeat == request.repeats - 1 and number == 0:
                    timeline = _window(spans, seconds)
        peak_bytes = peak.read()
        counted = engine.counters.to_dict()
    record: dict[str, Any] = {
        "ttft_ms": statistics.median(ttft),
        "tokens_per_s": request.new_tokens / statistics.median(total),
        "bytes_moved": counted["bytes_moved"],
        "hits": counted["hits"],
        "misses": counted["misses"],
    }
    if expected is not None:
        record["tokens_equal_resident"] = equal
    if tpot:
        record["tpot_ms"] = statistics.median(tpot)
        record["exposed_ms_per_token"] = statistics.median(exposed)
    if block:
        record["block_ms"] = statistics.median(block)
    if peak_bytes is not None:
        record["peak_device_bytes"] = peak_bytes
    return record, timeline


def _is_decoder_layer(span: Span) -> bool:
    return span.lane == "layer" and span.name.startswith("decoder")


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
