"""What a decoding step is made of, timed in a few seconds on a shallow model of the same widths.

The shallow model has few layers and few experts. Each of its blocks costs what a block of the whole model costs, so the
times of a whole step are put together from those. Knows engines and stores; knows nothing about grids or tables.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from pregate.config import Policy, SlabDtype, Tier
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from pregate.engine.storage.store import DramStore
from pregate.engine.trace import Span
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.models import BenchModel, num_blocks, smaller
from pregate.measure.bench.requests import Requests, greedy
from pregate.measure.bench.simulation import Durations
from pregate.measure.bench.transfer_speed import Ground, Reading
from pregate.measure.request_timing import Timed, TokenClock, time_request
from pregate.models.experts import ExpertKey

FEW_BLOCKS, FEW_EXPERTS = 2, 4
STEPS = 8
"""Decoding steps of a timed request."""
PROMPT_TOKENS = 64
"""Most tokens of its prompt: reading a long one takes longer than all steps, which hardly depend on it."""
STEPS_BESIDE = 23
"""Of one that is timed beside a row."""
TURNS = 2
"""Times that computing and moving are compared with and without each other."""
ENOUGH_SECONDS = 5
"""After so long, as on a machine that is busy with other things, no further turn begins."""


def few_experts(model: BenchModel) -> BenchModel:
    """A random-weight model of the same geometry with few experts in each block."""
    return smaller(model, num_blocks(model), _few(model))


def shallow(model: BenchModel) -> BenchModel:
    """`few_experts` with few layers: as many as hold `FEW_BLOCKS` MoE blocks, or more for a longer lookahead or a later
    start."""
    return smaller(model, max(FEW_BLOCKS, model.gating.min_blocks), _few(model))


def _few(model: BenchModel) -> int:
    # the time of a step does not depend on how many experts a block could choose from
    return min(max(FEW_EXPERTS, model.family.top_k), model.family.num_experts)


@dataclass(frozen=True)
class Profile:
    """Measured once for a model, tier, slab dtype and load: `durations` on a link of `link_gb_per_s`, and what the link
    gives where slabs are read one behind the other."""

    durations: Durations
    link_gb_per_s: float
    in_order_gb_per_s: float
    slab_bytes: int
    active_experts: float
    """Distinct experts a block and step while it was measured."""

    def at(self, link_gb_per_s: float | None, compute_ms: float | None) -> Durations:
        """The durations at a moment when the link has another bandwidth and the measured step computes for
        `compute_ms`, as a shared machine changes from minute to minute; None for what has not changed."""
        slab = self.slab_bytes / (link_gb_per_s or self.link_gb_per_s) / 1e6
        factor = 1.0 if compute_ms is None else compute_ms / self.durations.compute_ms(self.active_experts)
        return replace(
            self.durations,
            before_block=tuple(factor * part for part in self.durations.before_block),
            expert=factor * self.durations.expert,
            after_blocks=factor * self.durations.after_blocks,
            resume=factor * self.durations.resume,
            slab=slab,
        )


def profile(model: BenchModel, spec: RowSpec, device: torch.device, reading: Reading, scratch: Path) -> Profile:
    """Time a shallow form of `model` under the load of `spec`, its slabs in the tier and dtype of `spec`. What is
    packed for it lies in `scratch` while it lasts."""
    small = shallow(model)
    tier, slab_dtype = Tier(str(spec.tier)), SlabDtype(str(spec.slab_dtype))
    try:
        store = open_store(small.source, tier=tier, device=device, pack_dir=scratch, slab_dtype=slab_dtype)
        with closing(store):
            return _profile(small, model, Ground(store, device, reading), spec)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _profile(small: BenchModel, model: BenchModel, ground: Ground, spec: RowSpec) -> Profile:
    keys, slab_bytes = small.family.keys(), ground.store.layout.slab_bytes
    prompt_len = min(spec.prompt_len, PROMPT_TOKENS)
    requests = Requests(spec.batch, prompt_len, small.vocab_size, spec.seed, ground.device)
    link, in_order = ground.gb_per_s(keys), ground.gb_per_s(keys, in_order=True)
    alone: list[Timed] = []
    slowed: list[tuple[float, float]] = []
    begun = time.perf_counter()
    with opened(small, ground, Policy.gpu_only) as engine:
        while not alone or (len(alone) < TURNS and time.perf_counter() - begun < ENOUGH_SECONDS):
            turn = len(alone)
            alone.append(timed_request(engine, requests, turn))
            # a GPU's copy engine and its multiprocessors share little; here both are the same cores and memory
            if ground.device.type == "cpu":
                slowed.append(_beside_a_busy_link(engine, requests, turn, ground, keys))
    # the least disturbed of each: the first request warms up, and a shared machine only ever slows
    fastest = min(alone, key=step_ms)
    parts, active_experts = durations(fastest, slab_bytes / link / 1e6)
    if slowed:
        steps_ms, gb_per_s = zip(*slowed, strict=True)
        parts = replace(
            parts,
            compute_slowdown=max(1.0, min(steps_ms) / step_ms(fastest)),
            link_slowdown=max(1.0, link / max(gb_per_s)),
            resume=_resume_ms(small, ground, requests, step_ms(fastest), parts.slab),
        )
    depth = len(list(model.family.layers.values())[-1])
    return Profile(stretched(parts, depth), link, in_order, slab_bytes, active_experts)


@contextmanager
def step_timer(model: BenchModel, spec: RowSpec, device: torch.device) -> Iterator[Callable[[], float]]:
    """A function that times a decoding step of `few_experts`, all of them on the device, whenever it is called; a mean
    over steps, as the time of a row is."""
    small = few_experts(model)
    with closing(DramStore(small.source, small.family, small.layout(SlabDtype.source), page_locked=False)) as memory:
        engine = OffloadEngine.open(small.source, policy=Policy.gpu_only, device=device, store=memory)
    requests = Requests(1, spec.prompt_len, small.vocab_size, 0, device)
    with engine:
        timed_request(engine, requests, 0)  # warms up
        yield lambda: step_ms(timed_request(engine, requests, 1, STEPS_BESIDE))


@contextmanager
def opened(small: BenchModel, ground: Ground, policy: Policy) -> Iterator[OffloadEngine]:
    """An engine for `small` on the store of `ground`."""
    settings = vars(ground.reading)
    with OffloadEngine.open(small.source, policy=policy, device=ground.device, store=ground.store, **settings) as one:
        yield one


def timed_request(
    engine: OffloadEngine, requests: Requests, number: int, steps: int = STEPS, read: Callable[[], int] | None = None
) -> Timed:
    options = {**requests.prompt(number), **greedy(1 + steps)}
    return time_request(engine.generate, options, TokenClock(requests.device, read), engine.trace)


def step_ms(timed: Timed) -> float:
    assert timed.tpot_ms is not None, "a timed request has several steps"
    return timed.tpot_ms


def _beside_a_busy_link(
    engine: OffloadEngine, requests: Requests, number: int, ground: Ground, keys: list[ExpertKey]
) -> tuple[float, float]:
    """Milliseconds of a step while slabs come without an end, and the GB/s that they come with meanwhile."""
    with ground.busy(keys) as num_bytes:
        timed = timed_request(engine, requests, number, read=num_bytes)
    seconds = timed.seconds[-1] - timed.seconds[0]
    return step_ms(timed), max(1, timed.readings[-1] - timed.readings[0]) / seconds / 1e9


def _resume_ms(small: BenchModel, ground: Ground, requests: Requests, alone_ms: float, slab_ms: float) -> float:
    """What computing takes longer after a wait for one slab, from steps that fetch every slab on demand."""
    with opened(small, ground, Policy.on_demand) as engine:
        timed = timed_request(engine, requests, 0)
    waited_ms = timed.exposed_ms_per_token or 0.0
    if waited_ms < slab_ms:  # slabs so small that they hardly take time say nothing of a wait
        return 0.0
    return max(0.0, (step_ms(timed) - waited_ms - alone_ms) * slab_ms / waited_ms)


def durations(timed: Timed, slab_ms: float) -> tuple[Durations, float]:
    """The parts of a decoding step and its distinct experts a block, means over the steps of a request in which nothing
    had to move."""
    before: list[list[float]] = []
    after: list[float] = []
    expert: list[float] = []
    active: list[int] = []
    computed = [span for span in timed.decoding if span.lane == "compute"]
    for begin, end in pairwise(1e3 * seconds for seconds in timed.seconds):
        moment, parts = begin, []
        for block in _blocks(span for span in computed if begin <= span.start_ms < end):
            parts.append(block[0].start_ms - moment)
            moment = block[-1].end_ms
            expert.append((moment - block[0].start_ms) / len(block))
            active.append(len(block))
        before.append(parts)
        after.append(end - moment)
    complete = [parts for parts in before if len(parts) == max(map(len, before))]
    means = tuple(statistics.mean(column) for column in zip(*complete, strict=True))
    parts = Durations(means, statistics.mean(expert), statistics.mean(after), slab_ms)
    return parts, statistics.mean(active)


def _blocks(step: Iterable[Span]) -> list[list[Span]]:
    """The compute spans of a step, block by block."""
    blocks: dict[str, list[Span]] = {}
    for span in step:
        blocks.setdefault(span.name.rpartition(" expert ")[0], []).append(span)
    return list(blocks.values())


def stretched(parts: Durations, num_blocks: int) -> Durations:
    """The durations of a model with so many blocks, each like those behind the first one of `parts`."""
    first, *others = parts.before_block
    other = statistics.mean(others or [first])
    return replace(parts, before_block=(first, *others, *[other] * num_blocks)[:num_blocks])
