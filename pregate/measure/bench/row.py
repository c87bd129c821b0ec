"""Measuring one row of a benchmark: the requests, what is timed and counted, and the floors beside it.

Every repeat is a new random prompt, decoded greedily without ever repeating a token: random weights would decode into
a loop, and a repeated prompt would find its experts where it left them; both would flatter a cache. The prompts are the
same for every row, so that all rows decode the same tokens. Knows engines, models and stores; knows nothing about
grids or files.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.config import CacheRule, Policy
from pregate.engine.engine import OffloadEngine
from pregate.engine.trace import Trace
from pregate.measure.bench.active_experts import counted_experts, forced_experts
from pregate.measure.bench.baselines import Reference, use_generation_config
from pregate.measure.bench.grid import BenchModel, RowSpec
from pregate.measure.bench.probes import Ground, Probes, Request, floors
from pregate.measure.latency import Timed, TokenClock, medians, time_request
from pregate.measure.logits import check_moved, compare_logits, logit_difference, tolerance, watched
from pregate.measure.perfetto import write_perfetto
from pregate.system.memory import PeakMemory

NEVER_AGAIN = 1e6
"""`repetition_penalty`: a token's own logit is by far its largest in a random model with tied embeddings."""
WARM_UP = 10_000
"""Numbers of warm-up requests, away from those that are measured."""
LOGIT_TOKENS = 8
"""Target positions whose logits are compared; a batch of 32 then takes 33 MB with T5's vocabulary."""


def greedy(new_tokens: int) -> dict[str, Any]:
    """Options of `generate` for so many new tokens whatever their ends."""
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return {"do_sample": False, "num_beams": 1, "repetition_penalty": NEVER_AGAIN, **length}


@dataclass(frozen=True)
class Requests:
    """Random prompts (batch, prompt_len), numbered; each number is another prompt."""

    batch: int
    prompt_len: int
    vocab_size: int
    seed: int
    device: torch.device

    @classmethod
    def of(cls, spec: RowSpec, model: BenchModel, device: torch.device) -> Requests:
        return cls(spec.batch, spec.prompt_len, model.vocab_size, spec.seed, device)

    def prompt(self, number: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(self.seed + number)
        ids = torch.randint(2, self.vocab_size, (self.batch, self.prompt_len), generator=draw).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def serve(
        self, generate: Callable[..., Tensor], number: int, new_tokens: int, clock: TokenClock, trace: Trace | None
    ) -> Timed:
        return time_request(generate, {**self.prompt(number), **greedy(new_tokens)}, clock, trace)


@dataclass(frozen=True)
class Effort:
    """How much is measured: repeats after warm-up requests, none begun after `max_seconds`."""

    repeats: int
    warmup: int
    max_seconds: float

    def run(self, serve: Callable[[int], Timed], probe: Callable[[], None] = lambda: None) -> list[Timed]:
        """`probe` is called before each request and after the last."""
        begun, timed = time.perf_counter(), []
        while len(timed) < self.repeats and (not timed or time.perf_counter() - begun < self.max_seconds):
            probe()
            timed.append(serve(len(timed)))
        probe()
        return timed


@dataclass(frozen=True)
class Beside:
    """What the same run knows of the whole model under the same load; None where it was not measured."""

    compute_ms: float | None = None
    step_ms: Callable[[], float] | None = None
    """Times a decoding step of a model of the same geometry with all its few experts in memory, at the moment of the
    call: on a shared machine T_compute changes between the whole model's row and this one."""
    reference: Reference | None = None
    """With the weights that are served: dequantised ones for quantised slabs."""
    source_reference: Reference | None = None


def measure_whole(
    generate: Callable[..., Tensor],
    requests: Requests,
    new_tokens: int,
    effort: Effort,
    between: Callable[[], None] | None = None,
) -> list[Timed]:
    """Requests to a model that is served without an engine; `between`: work before every step that is not timed."""
    clock = TokenClock(requests.device, between=between)
    with torch.inference_mode():
        for number in range(effort.warmup):
            requests.serve(generate, WARM_UP + number, new_tokens, clock, None)
        return effort.run(lambda number: requests.serve(generate, number, new_tokens, clock, None))


def logits_record(
    logits: Tensor, reference: Reference | None, broke: bool, dtypes: Iterable[torch.dtype]
) -> dict[str, Any]:
    """`compare_logits` of request 0 with the whole model's; `broke`: a step of some request had logits that were not
    finite."""
    wanted_BtV = None if reference is None or reference.logits is None else reference.logits[:, : logits.shape[1]]
    found = compare_logits([logits], None if wanted_BtV is None else [wanted_BtV], tolerance(dtypes))
    if broke or not found["logits_finite"]:
        # NaN is chosen like any token, so that its tokens are equal is no equality
        found |= {"logits_finite": False, **({} if reference is None else {"tokens_equal_resident": False})}
    return found


def first_logits(forward: Callable[..., Any], requests: Requests, tokens_BT: Tensor) -> Tensor:
    """Float32 logits (B, t, V) for the first of `tokens_BT`, request 0 of the whole model, given as input."""
    targets = tokens_BT[:, :LOGIT_TOKENS].to(requests.device)
    with torch.inference_mode():
        return forward(**requests.prompt(0), decoder_input_ids=targets).logits.float().cpu()


Serve = Callable[["RowSpec", "BenchModel", Ground, "Effort", "Beside", Probes], dict[str, Any]]
"""Measures the requests of a row and takes probes between them; leaves `requests` for the floors, and `spans` if it
saw any."""


def measure_row(
    spec: RowSpec,
    model: BenchModel,
    ground: Ground,
    effort: Effort,
    beside: Beside,
    trace_file: Path,
    serve: Serve | None = None,
) -> dict[str, Any]:
    """One row, complete, and a trace of its first request in `trace_file` where there is one. `serve` measures another
    engine than the host-driven one. Raises what opening the engine raises."""
    keys, moves = model.family.keys(), spec.policy != Policy.gpu_only
    in_order = spec.policy == Policy.prefetch_all

    def link(reader: str, number: int) -> float:
        same = replace(ground, io_uring=reader == "io_uring")
        return same.gb_per_s(keys, 1000 * spec.seed + number, in_order)

    probes = Probes(link if moves else None, beside.step_ms, beside.compute_ms)
    measured = (serve or serve_by_host)(spec, model, ground, effort, beside, probes)
    spans, requests = measured.pop("spans", None), measured.pop("requests")
    if spans is not None:
        write_perfetto(trace_file, spans, spec.sentence())
    return {**spec.to_dict(), **measured, **floors(requests, probes, spec.batch)}


def serve_by_host(
    spec: RowSpec, model: BenchModel, ground: Ground, effort: Effort, beside: Beside, probes: Probes
) -> dict[str, Any]:
    """See `Serve`."""
    device, store = ground.device, ground.store
    requests, counts, warm_up_bytes = Requests.of(spec, model, device), [], 0
    with (
        PeakMemory(device) as peak,
        OffloadEngine.open(
            model.source,
            policy=Policy(spec.policy),
            device=device,
            device_budget=spec.budget,
            host_budget=spec.host_budget,
            cache=CacheRule(spec.cache or CacheRule.none),
            store=store,
            io_threads=ground.io_threads,
            io_uring=ground.io_uring,
        ) as engine,
        forced_experts(engine.model, spec.forced_experts),
        watched(engine) as rows_not_finite,
    ):
        use_generation_config(engine.model, model)
        probes.reader = engine.reader
        link = "bytes_moved" if device.type == "cuda" and store.in_host_memory else "bytes_read"
        clock = TokenClock(device, read=lambda: getattr(engine.counters, link))
        with counted_experts(engine.model) as active:
            for number in range(effort.warmup):
                requests.serve(engine.generate, WARM_UP + number, spec.new_tokens, clock, None)
        warm_up_bytes = engine.counters.bytes_moved

        def serve(number: int) -> Timed:
            engine.reset_counters()
            timed = requests.serve(engine.generate, number, spec.new_tokens, clock, engine.trace)
            counts.append(engine.counters.to_dict())
            return timed

        timed = effort.run(serve, lambda: probes.take(peak))
        check_moved(spec.policy, warm_up_bytes + sum(count["bytes_moved"] for count in counts))
        row = both_report(engine, peak, requests, timed, [_decoded_bytes(one) for one in timed], spec, beside)
        logits = first_logits(engine.forward, requests, tokens_given(beside.reference, timed))
        row |= logits_record(logits, beside.reference, bool(rows_not_finite()), (model.dtype, engine.model.dtype))
    return {
        "spans": timed[0].spans or [],
        "io_threads": ground.io_threads,
        "reader": probes.reader,
        "active_experts": _mean(active),
        **{name: _mean([count[name] for count in counts]) for name in counts[0]},
        **row,
    }


def both_report(
    engine: Any,
    peak: PeakMemory,
    requests: Requests,
    timed: Sequence[Timed],
    link_bytes: Sequence[float],
    spec: RowSpec,
    beside: Beside,
) -> dict[str, Any]:
    """What a row has whoever drives the engine, which is still open; `link_bytes`: a step's, of each request."""
    peak_bytes, expected = peak.read(), engine.expected_bytes()
    row = {
        "slots": engine.num_slots,
        "slab_bytes": engine.slab_bytes,
        **moved(timed, link_bytes),
        **figures(timed, spec, beside.reference),
        "expected_bytes": sum(expected.values()),
        "expected_bytes_parts": expected,
    }
    if peak_bytes is not None:
        row["peak_device_bytes"] = peak_bytes
    if beside.source_reference is not None and beside.source_reference.logits is not None:
        wanted = beside.source_reference.logits
        row |= logit_difference(first_logits(engine.forward, requests, beside.source_reference.tokens[0]), wanted)
    return row


def tokens_given(reference: Reference | None, timed: Sequence[Timed]) -> Tensor:
    """The tokens (B, T) of request 0 to give as input: the whole model's, or the row's where those are not known."""
    return timed[0].tokens if reference is None else reference.tokens[0]


def moved(timed: Sequence[Timed], link_bytes: Sequence[float]) -> dict[str, Any]:
    """The requests as the floors want them, `link_bytes` for each step of each, and the mean of those bytes."""
    tpot_ms = [request.tpot_ms or 0.0 for request in timed]
    requests = [Request(ms, num_bytes) for ms, num_bytes in zip(tpot_ms, link_bytes, strict=True)]
    return {"requests": requests, "link_bytes_per_step": statistics.mean(link_bytes)}


def _mean(numbers: Sequence[int]) -> int | float:
    """Of counts: whole where it is whole."""
    mean = statistics.mean(numbers)
    return int(mean) if mean == int(mean) else round(mean, 2)


def _decoded_bytes(timed: Timed) -> float:
    """Bytes that came over the link, for each step after the first token."""
    return (timed.readings[-1] - timed.readings[0]) / (len(timed.readings) - 1)


def figures(timed: Sequence[Timed], spec: RowSpec, reference: Reference | None) -> dict[str, Any]:
    """What any server is measured by: medians over repeats, the spread of `tpot_ms`, and whether the tokens are the
    whole model's (see also `logits_record`). `tokens_per_s` is while decoding, of the whole batch. Where tokens differ,
    `tokens_equal_until`: new tokens before the first difference of any row and request."""
    tpot = [request.tpot_ms for request in timed if request.tpot_ms is not None]
    found: dict[str, Any] = medians(timed)
    found |= {
        "tpot_ms_min": min(tpot),
        "tpot_ms_max": max(tpot),
        "tokens_per_s": spec.batch * 1e3 / found["tpot_ms"],
        "repeats": len(timed),
    }
    if spec.forced_experts is not None:
        found["active_experts"] = spec.forced_experts
    if reference is not None:
        compared = zip(range(reference.tokens.shape[0]), timed, strict=False)
        equal = [reference.equal_until(number, request.tokens) for number, request in compared]
        departs = [tokens for tokens in equal if tokens is not None]
        found["tokens_equal_resident"] = not departs
        if departs:
            found["tokens_equal_until"] = min(departs)
    return found
