"""What offloading will give before anything is packed: tokens/s and memory of every policy, and which one pays.

Needs a geometry, a measured link and a measured compute time. Computing is timed on a model of the same geometry with
few experts, because a step's time does not depend on how many experts a block could choose from; then the engine's own
scheduler is run against a clock (`simulation`). Knows engines and models; knows nothing about files of results.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from pregate.config import CacheRule, Drive, Policy, SlabDtype
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.engine.engine import OffloadEngine
from pregate.engine.storage.store import DramStore
from pregate.engine.trace import Span
from pregate.measure.bench.drives import SlabStream, lone_slabs, slab_stream
from pregate.measure.bench.grid import BenchModel, RowSpec, bench_model
from pregate.measure.bench.probes import Ground
from pregate.measure.bench.row import Requests
from pregate.measure.bench.simulation import Durations, Load, Predicted, simulate
from pregate.measure.latency import Timed, TokenClock
from pregate.models.family import ExpertKey, family_of
from pregate.models.synthetic import synthetic_checkpoint

FEW_EXPERTS = 8
STEPS = 24
"""Decoding steps that are timed at a time."""
TURNS = 5
"""Times that a profile compares computing and moving with and without each other."""
READS_BESIDE = 4
"""Slabs in flight beside the computation, whose layers alone can put others in their place: enough for the link not
to run out of them in between, but at the end of a block that has few."""


@dataclass(frozen=True)
class Profile:
    """Measured once for a model, slab dtype and batch: `durations` on a link of `link_gb_per_s`, and what the link
    gives where slabs are read one behind the other. `step_ms`: of whatever step was given, at the same time."""

    durations: Durations
    link_gb_per_s: float
    in_order_gb_per_s: float
    slab_bytes: int
    step_ms: float | None = None

    def at(self, link_gb_per_s: float | None, compute_factor: float | None) -> Durations:
        """The durations at a moment when the link has another bandwidth and computing takes `compute_factor` times as
        long, as a shared machine changes from minute to minute; None for what has not changed."""
        slab = self.slab_bytes / (link_gb_per_s or self.link_gb_per_s) / 1e6
        factor = compute_factor or 1.0
        return replace(
            self.durations,
            before_block=tuple(factor * part for part in self.durations.before_block),
            expert=factor * self.durations.expert,
            after_blocks=factor * self.durations.after_blocks,
            resume=factor * self.durations.resume,
            slab=slab,
        )


@lru_cache(maxsize=1)
def few_experts(model: BenchModel) -> BenchModel:
    """A random-weight model of the same geometry, small enough to be timed anywhere."""
    geometry = {**model.source.config, "num_experts": min(FEW_EXPERTS, model.family.num_experts)}
    gating = model.gating
    return bench_model(model.name, None, synthetic_checkpoint(family_of(geometry), geometry, gating, model.dtype))


@contextmanager
def all_on_device(small: BenchModel, slab_dtype: SlabDtype, device: torch.device) -> Iterator[OffloadEngine]:
    """An engine for `small` with every expert on the device, as slabs of `slab_dtype`."""
    memory = DramStore(small.source, small.family, small.layout(slab_dtype), page_locked=False)
    try:
        engine = OffloadEngine.open(small.source, policy=Policy.gpu_only, device=device, store=memory)
    finally:
        memory.close()
    with engine:
        yield engine


def step_ms(engine: OffloadEngine, batch: int, prompt_len: int, device: torch.device) -> float:
    """The time of a decoding step of `engine`, now; a mean over steps, as that of a row is."""
    requests = Requests(batch, prompt_len, engine.model.config.vocab_size, 0, device)
    return _step_ms(_timed(engine, requests, 1))


def profile(
    small: BenchModel, ground: Ground, batch: int, prompt_len: int, step: Callable[[], float] | None = None
) -> Profile:
    """Time the steps of `small`, all of whose experts are on the device as slabs like those of the store, alone and
    beside a busy link; the link alone and beside the computation; and `step`, by which the profile can be compared
    with another moment."""
    keys, store, device = small.family.keys(), ground.store, ground.device
    requests = Requests(batch, prompt_len, small.vocab_size, 0, device)
    links, in_order = [ground.gb_per_s(keys)], ground.gb_per_s(keys, in_order=True)
    with all_on_device(small, store.layout.stored, device) as engine:
        _timed(engine, requests, 1)
        alone, steps = [_timed(engine, requests, 2)], [step()] if step is not None else []
        slowdowns = {}
        if device.type == "cpu":
            # a GPU's copy engine and its multiprocessors share little; here both are the same cores and memory. The
            # machine changes meanwhile: each turn is compared with what stood before and after it
            computing, moving, resuming = [], [], []
            for _ in range(TURNS):
                beside_ms, gb_per_s = _beside_a_busy_link(engine, requests, keys, ground)
                links.append(ground.gb_per_s(keys))
                alone.append(_timed(engine, requests, 2))
                steps += [step()] if step is not None else []
                computing.append(2 * beside_ms / (_step_ms(alone[-2]) + _step_ms(alone[-1])))
                moving.append((links[-2] + links[-1]) / 2 / gb_per_s)
                waiting = _with_waits(engine, requests, keys, ground)
                alone.append(_timed(engine, requests, 2))
                resuming.append(waiting.resume_ms((_step_ms(alone[-2]) + _step_ms(alone[-1])) / 2))
            slowdowns["compute_slowdown"] = max(1.0, statistics.median(computing))
            slowdowns["link_slowdown"] = max(1.0, statistics.median(moving))
            slowdowns["resume"] = max(0.0, statistics.median(resuming))
    link, slab_bytes = statistics.median(links), store.layout.slab_bytes
    parts = durations(min(alone, key=_step_ms), slab_bytes / link / 1e6)
    # its parts are medians over steps, which leave out what a step now and then takes longer
    measured_ms, described_ms = statistics.median(_step_ms(timed) for timed in alone), parts.compute_ms
    step_ms = statistics.median(steps) if steps else None
    whole = Profile(replace(parts, **slowdowns), link, in_order, slab_bytes, step_ms)
    # `resume` is a mean already
    corrected = replace(whole.at(link, measured_ms / described_ms), resume=whole.durations.resume)
    return replace(whole, durations=corrected)


def _beside_a_busy_link(
    engine: OffloadEngine, requests: Requests, keys: list[ExpertKey], ground: Ground
) -> tuple[float, float]:
    """Milliseconds of a step while slabs come without an end, and the GB/s they come with between decoder layers."""
    reads = max(READS_BESIDE, ground.io_threads)
    with (
        slab_stream(ground.store, keys, reads, ground.io_uring) as stream,
        _kept_going(engine, stream) as beside,
    ):
        timed = _timed(engine, requests, 2)
        num_bytes = max(1, beside.num_arrived) * ground.store.layout.slab_bytes
        return _step_ms(timed), num_bytes / beside.seconds / 1e9


@dataclass(frozen=True)
class _Waits:
    """Steps that wait: a step's milliseconds, those spent waiting, and how many waits it has."""

    step_ms: float
    waited_ms: float
    waits: int

    def resume_ms(self, alone_ms: float) -> float:
        """What a wait costs beyond its length, against a step of `alone_ms` without waits."""
        return (self.step_ms - self.waited_ms - alone_ms) / self.waits


def _with_waits(engine: OffloadEngine, requests: Requests, keys: list[ExpertKey], ground: Ground) -> _Waits:
    """Steps before whose experts of every block a slab is fetched and waited for, though none is needed."""
    waited: list[float] = []
    decoder = [block for block in engine.model.moe_blocks() if block.stack == "decoder"]
    with lone_slabs(ground.store, keys, ground.io_threads, ground.io_uring) as fetch:
        hooks = [block.module.experts.register_forward_pre_hook(lambda *_: waited.append(fetch())) for block in decoder]
        try:
            timed = _timed(engine, requests, 2)
        finally:
            for hook in hooks:
                hook.remove()
    return _Waits(_step_ms(timed), 1e3 * statistics.mean(waited) * len(decoder), len(decoder))


@dataclass
class _Beside:
    """Slabs that arrived between two decoder layers of one request, and the seconds that passed between them. An
    encoder's layers take too long for a link to have enough to do."""

    num_arrived: int = 0
    seconds: float = 0.0
    last: float | None = None


@contextmanager
def _kept_going(engine: OffloadEngine, stream: SlabStream) -> Iterator[_Beside]:
    """`stream` goes on at every layer that computes, as the engine's own reads do."""
    beside = _Beside()

    def encoder_layer(*_: Any) -> None:
        stream.go_on()
        beside.last = None

    def decoder_layer(*_: Any) -> None:
        before, now = stream.num_arrived, time.perf_counter()
        stream.go_on()
        if beside.last is not None:
            beside.num_arrived += stream.num_arrived - before
            beside.seconds += now - beside.last
        beside.last = now

    hooks = [layer.register_forward_hook(encoder_layer) for layer in engine.model.encoder.block]
    hooks += [layer.register_forward_hook(decoder_layer) for layer in engine.model.decoder.block]
    try:
        yield beside
    finally:
        for hook in hooks:
            hook.remove()


def _timed(engine: OffloadEngine, requests: Requests, number: int) -> Timed:
    return requests.serve(engine.generate, number, STEPS, TokenClock(requests.device), engine.trace)


def _step_ms(timed: Timed) -> float:
    assert timed.tpot_ms is not None
    return timed.tpot_ms


def durations(timed: Timed, slab_ms: float) -> Durations:
    """The parts of a decoding step, from the trace of a request in which nothing had to move."""
    computed = [span for span in timed.spans or () if span.lane == "compute" and span.name.startswith("decoder")]
    before: list[list[float]] = []
    after: list[float] = []
    expert: list[float] = []
    for begin, end in zip(timed.seconds, timed.seconds[1:], strict=False):
        step = [span for span in computed if begin * 1e3 <= span.start_ms < end * 1e3]
        moment, parts = begin * 1e3, []
        for block in _blocks(step):
            parts.append(block[0].start_ms - moment)
            moment = block[-1].end_ms
            expert.append((moment - block[0].start_ms) / len(block))
        before.append(parts)
        after.append(end * 1e3 - moment)
    complete = [parts for parts in before if len(parts) == max(map(len, before))]
    medians = tuple(statistics.median(column) for column in zip(*complete, strict=True))
    return Durations(medians, statistics.median(expert), statistics.median(after), slab_ms)


def _blocks(step: list[Span]) -> list[list[Span]]:
    """The compute spans of a step, block by block."""
    blocks: dict[str, list[Span]] = {}
    for span in step:
        blocks.setdefault(span.name.rpartition(" expert ")[0], []).append(span)
    return list(blocks.values())


def predict(
    model: BenchModel,
    spec: RowSpec,
    profiled: Profile,
    link_gb_per_s: float | None = None,
    compute_factor: float | None = None,
) -> dict[str, Any]:
    """Predicted figures of one engine row: `tpot_ms`, `tokens_per_s`, `exposed_ms_per_token`, `bytes_per_step`,
    `active_experts` a block and step, `slots`, `peak_device_bytes`. `link_gb_per_s`: of the moment;
    `compute_factor`: how much longer than in the profile a step computes at the moment; None for the profile's own."""
    layout = model.layout(str(spec.slab_dtype))
    policy, cache = Policy(spec.policy), CacheRule(spec.cache or CacheRule.none)
    budget = None if policy is Policy.gpu_only else spec.budget
    slots = slots_within(budget, policy, model.family, layout.slab_bytes)
    if link_gb_per_s is None and policy is Policy.prefetch_all:
        link_gb_per_s = profiled.in_order_gb_per_s
    found: Predicted = simulate(
        model.family,
        model.gating,
        profiled.at(link_gb_per_s, compute_factor),
        policy=policy,
        cache=cache,
        num_slots=slots,
        slab_bytes=layout.slab_bytes,
        load=Load(spec.batch, spec.forced_experts),
        prompt_tokens=spec.prompt_len,
        new_tokens=spec.new_tokens,
        seed=spec.seed,
    )
    return {
        "tpot_ms": found.tpot_ms,
        "tokens_per_s": spec.batch * 1e3 / found.tpot_ms,
        "exposed_ms_per_token": found.exposed_ms_per_token,
        "bytes_per_step": found.bytes_per_step,
        "active_experts": found.active_experts,
        "slots": slots,
        "peak_device_bytes": memory_bytes(model, spec, slots),
    }


def memory_bytes(model: BenchModel, spec: RowSpec, slots: int) -> int:
    """Weights that are not experts, slots, scratch for dequantised experts, and on a CPU the host buffers too; on a
    GPU those are host memory and not counted. Activations are not in it."""
    layout = model.layout(str(spec.slab_dtype))
    expert_names = {name for key in model.family.keys() for name in model.family.tensor_names(key)}  # noqa: SIM118
    numel = sum(
        torch.Size(info.shape).numel() for name, info in model.source.tensors.items() if name not in expert_names
    )
    total = numel * model.dtype.itemsize + slots * layout.slab_bytes
    if layout.is_quantised:
        total += layout.matrix_bytes
    if spec.host_budget is not None:
        total += host_buffers_within(spec.host_budget, model.family, layout.slab_bytes) * layout.slab_bytes
    return total


def verdict(rows: list[dict[str, Any]]) -> str:
    """One sentence on predicted rows of one load: whether pre-gating pays, and what would help more where it does
    not. Each row has `policy`, `cache`, `tokens_per_s`, `link_ms`, `compute_ms`."""
    plain = {row["policy"]: row for row in rows if row.get("cache") in (None, "none")}
    ahead, behind = plain.get(Policy.pre_gated), plain.get(Policy.on_demand)
    if ahead is None or behind is None:
        return "Plan both pre_gated and on_demand without a cache to learn whether pre-gating pays."
    gain = ahead["tokens_per_s"] / behind["tokens_per_s"]
    link, compute = ahead["link_ms"], ahead["compute_ms"]
    cached = max((row for row in rows if row.get("cache") not in (None, "none")), key=_speed, default=None)
    better = ""
    if cached is not None and _speed(cached) > 1.05 * _speed(ahead):
        better = f"; {cached['policy']} with an {cached['cache']} cache reaches {_speed(cached) / _speed(ahead):.2f}×"
    if link > 3 * compute:
        return (
            f"The link needs {link / compute:.1f} times as long as the computation, so overlap gives {gain:.2f}× at "
            f"best: a cache, smaller slabs or a larger batch help more{better}."
        )
    if link < 0.1 * compute:
        return f"Fetching takes {100 * link / compute:.0f} % of the computation: there is little to hide ({gain:.2f}×)."
    return f"Pre-gating pays: {gain:.2f}× the tokens/s of fetching on demand{better}."


def _speed(row: dict[str, Any]) -> float:
    return row["tokens_per_s"]


def is_predictable(spec: RowSpec) -> bool:
    """Whether a row can be predicted: it is served by the host-driven engine, whose scheduler the planner runs."""
    return spec.policy in {str(policy) for policy in Policy} and spec.drive != Drive.device
