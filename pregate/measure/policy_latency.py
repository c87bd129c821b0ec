"""How long generation takes under each policy, what moves, and whether the tokens are the resident model's.

Batch 1, greedy, a fixed number of new tokens, as in the paper. Figures are medians over prompts and repeats after
a warm-up. Knows servers and token ids; knows nothing about tasks or reports.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.engine.trace import Span
from pregate.measure.equality import check_moved, compare_logits, tolerance
from pregate.measure.request_timing import medians
from pregate.measure.servers import Inputs, engine_server, forced_logits
from pregate.measure.timeline import middle_of
from pregate.models.family import family_of_model
from pregate.system.memory import PeakMemory

COUNTED = ("bytes_moved", "hits", "misses")


@dataclass(frozen=True)
class BenchRequest:
    """Prompts as rows of ids (1, S) each, the number of new tokens, and how often each prompt is repeated."""

    prompts: Sequence[Tensor]
    new_tokens: int
    repeats: int

    @property
    def options(self) -> dict[str, Any]:
        length = {"min_new_tokens": self.new_tokens, "max_new_tokens": self.new_tokens}
        return {"do_sample": False, "num_beams": 1, **length}

    def inputs(self, device: torch.device) -> list[Inputs]:
        moved = (prompt.to(device) for prompt in self.prompts)
        return [{"input_ids": prompt, "attention_mask": torch.ones_like(prompt)} for prompt in moved]


@dataclass(frozen=True)
class Expected:
    """What the whole model in memory gives, prompt by prompt: tokens (1, T), and logits (1, T - 1, V) with those as
    input.

    `most`: how far logits of the same weights may be off (`equality.TOLERANCE`); None where other weights are served.
    """

    tokens: Sequence[Tensor]
    logits: Sequence[Tensor]
    most: float | None = None


def resident_answers(model: Any, request: BenchRequest, same_weights: bool = True) -> Expected:
    """Through Hugging Face `generate` and a forward call; `same_weights`: whether these are also what is served."""
    prompts = request.inputs(model.device)
    with torch.inference_mode():
        tokens = [model.generate(**prompt, **request.options).cpu() for prompt in prompts]
    objective, pairs = family_of_model(model).objective, zip(prompts, tokens, strict=True)
    logits = [forced_logits(model, objective, prompt, each[:, :-1]) for prompt, each in pairs]
    return Expected(tokens, logits, tolerance({p.dtype for p in model.parameters()}) if same_weights else None)


def measure_policy(
    open_engine: Callable[[], OffloadEngine | DeviceEngine],
    request: BenchRequest,
    device: torch.device,
    expected: Expected | None,
    keep_trace: Callable[[list[Span]], None] = lambda spans: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One engine record (see `eval.json`) and a short window of its trace.

    Times and counts are per prompt: `ttft_ms` to the first token, `tpot_ms` per token after it, `block_ms` per whole
    layer with an MoE block and `exposed_ms_per_token` both while decoding. Bytes, hits and misses are those
    of one pass over all prompts. `peak_device_bytes` covers opening and serving. Without `expected` nothing is said
    about equality. `keep_trace` is given the whole trace of one request. Of an engine that the device drives, which
    cannot be watched in a step, `block_ms`, `exposed_ms_per_token` and the trace are absent.
    """
    with PeakMemory(device) as peak, open_engine() as engine, engine_server(engine, device) as server:
        prompts = request.inputs(device)
        warm_up = server.serve(prompts[0], request.options)
        passes = [[server.serve(prompt, request.options) for prompt in prompts] for _ in range(request.repeats)]
        peak_bytes = peak.read()
        timed = [one for each in passes for one in each]
        check_moved(engine.policy, sum(one.counted["bytes_moved"] for one in [warm_up, *timed]))
        wanted = expected.tokens if expected is not None else [one.tokens for one in timed]
        logits = [server.logits(prompt, each[:, :-1]) for prompt, each in zip(prompts, wanted, strict=False)]
        wanted_logits, most = (expected.logits, expected.most) if expected is not None else (None, None)
        found = compare_logits(logits, wanted_logits, most, broke=bool(server.rows_not_finite()))
    record: dict[str, Any] = {
        **medians(timed),
        "tokens_per_s": request.new_tokens / statistics.median(one.seconds[-1] for one in timed),
        **{name: sum(one.counted[name] for one in passes[-1]) for name in COUNTED},
    }
    if expected is not None:
        pairs = [pair for each in passes for pair in zip(each, expected.tokens, strict=True)]
        same = all(torch.equal(one.tokens, tokens) for one, tokens in pairs)
        record["tokens_equal_resident"] = same and found["logits_finite"]
    record |= found
    if peak_bytes is not None:
        record["peak_device_bytes"] = peak_bytes
    shown = passes[-1][0]
    if shown.spans is None:
        return record, []
    keep_trace(shown.spans)
    return record, middle_of(shown.spans, shown.seconds)
