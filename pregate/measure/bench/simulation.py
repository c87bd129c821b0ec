"""The engine's own scheduler, cache and policies, run against a clock instead of a device.

Two servers share the time: one computes, one moves slabs in the order they are asked for. Each is slower while the
other is busy, by factors that were measured. Which slab moves when is decided by the very code that decides it in the
engine, so a planned row differs from a measured one in its durations only. Knows nothing about tensors or files.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pregate.config import CacheRule, Policy
from pregate.engine.fetching import Fetcher
from pregate.engine.io.base import Move, Transfer
from pregate.engine.scheduler import Scheduler
from pregate.engine.slot_cache import SlotTable
from pregate.engine.trace import Counters, Trace
from pregate.measure.bench.simulated_routes import Load
from pregate.models.experts import ExpertKey, ExpertSpec
from pregate.models.pregating import PreGating


@dataclass(frozen=True)
class Durations:
    """What was measured, in milliseconds: the parts of one decoding step, and a slab's time on the link.

    before_block: the computation from the previous block's experts (or the step's begin) to those of each block.
    expert: one expert applied to its tokens. after_blocks: from the last block's experts to the next step.
    slab: one slab on the link while nothing computes. compute_slowdown and link_slowdown: how much longer either
    takes while the other is busy, 1 for not at all. resume: what computing takes longer after a wait for a whole slab,
    because cores that slept come back slowly; in proportion after a shorter one.
    """

    before_block: tuple[float, ...]
    expert: float
    after_blocks: float
    slab: float
    compute_slowdown: float = 1.0
    link_slowdown: float = 1.0
    resume: float = 0.0

    def compute_ms(self, active_experts: float = 1.0) -> float:
        """A step in which nothing waits and nothing slows the computation, with so many experts a block."""
        return sum(self.before_block) + len(self.before_block) * active_experts * self.expert + self.after_blocks


class Clock:
    """Time that passes by computing or by waiting; the link works through its queue meanwhile."""

    def __init__(self, durations: Durations) -> None:
        self.now = 0.0
        self._durations = durations
        self._queue: deque[_VirtualTransfer] = deque()

    def enqueue(self, transfer: _VirtualTransfer) -> None:
        self._queue.append(transfer)

    def compute(self, work: float) -> None:
        """Let `work` ms of computation pass, longer where slabs move beside it."""
        slow, link_slow = self._durations.compute_slowdown, self._durations.link_slowdown
        while work > 0:
            if not self._queue:
                self.now += work
                return
            head = self._queue[0]
            beside = min(work * slow, head.left * link_slow)
            self.now += beside
            work -= beside / slow
            self._work_off(beside / link_slow)
            if work < 1e-9:
                return

    def wait_for(self, transfer: _VirtualTransfer) -> None:
        while transfer.left > 0:
            step = self._queue[0].left
            self.now += step
            self._work_off(step)

    def _work_off(self, link_ms: float) -> None:
        head = self._queue[0]
        head.left -= link_ms
        if head.left < 1e-9:
            head.left = 0.0
            self._queue.popleft()


class _VirtualTransfer:
    def __init__(self, clock: Clock, left: float) -> None:
        self.left = left
        self._clock = clock

    def done(self) -> bool:
        return self.left == 0.0

    def wait(self) -> None:
        self._clock.wait_for(self)


class VirtualMover:
    """The engine's mover with a clock for a link."""

    host_bytes, reader = 0, "threads"

    def __init__(self, clock: Clock, slab_ms: float, slab_bytes: int, counters: Counters) -> None:
        self._clock, self._slab_ms = clock, slab_ms
        self._slab_bytes, self._counters = slab_bytes, counters

    def start(self, moves: Sequence[Move]) -> list[Transfer]:
        self._counters.bytes_moved += len(moves) * self._slab_bytes
        transfers = [_VirtualTransfer(self._clock, self._slab_ms) for _ in moves]
        for transfer in transfers:
            self._clock.enqueue(transfer)
        return [*transfers]

    def used(self, slot: int) -> None:
        return None

    def drain(self) -> None:
        return None

    def close(self) -> None:
        return None


@dataclass(frozen=True)
class Predicted:
    """Means over simulated requests: a step, the waiting in it, the bytes it moves, and the distinct experts that each
    of its blocks uses."""

    tpot_ms: float
    exposed_ms_per_token: float
    bytes_per_step: float
    active_experts: float


def simulate(
    family: ExpertSpec,
    gating: PreGating,
    durations: Durations,
    *,
    policy: Policy,
    cache: CacheRule,
    num_slots: int,
    slab_bytes: int,
    load: Load,
    prompt_tokens: int,
    new_tokens: int,
    requests: int = 2,
    seed: int = 0,
) -> Predicted:
    """Serve `requests` requests after one warm-up, as a benchmark row does, and time their decoding steps.

    The first stack reads the prompt, of `prompt_tokens` for each sequence, and its experts pass through the cache too.
    The last stack decodes. Where these are one stack, reading the prompt gives the first token.
    """
    draw, clock, counters = random.Random(seed), Clock(durations), Counters()
    mover = VirtualMover(clock, durations.slab, slab_bytes, counters)
    rule = CacheRule.lru if policy is Policy.gpu_only else cache
    scheduler = Scheduler(range(num_slots), SlotTable(num_slots, rule), mover, Trace(torch.device("cpu")), counters)
    step = _Step(family, gating, durations, policy, scheduler, clock)
    if policy is Policy.gpu_only:
        scheduler.request(family.keys())
        scheduler.settle()
    times, waits, moved = [], [], []
    first_stack, *_, last_stack = (*family.layers, *family.layers)
    prompt = Load(load.batch * prompt_tokens, load.active_experts)
    for number in range(1 + requests):
        step.run(first_stack, prompt, draw)
        for token in range(int(first_stack == last_stack), new_tokens):
            began, bytes_before, step.waited = clock.now, counters.bytes_moved, 0.0
            step.run(last_stack, load, draw)
            clock.compute(durations.after_blocks)
            if number and token:
                times.append(clock.now - began)
                waits.append(step.waited)
                moved.append(counters.bytes_moved - bytes_before)
        scheduler.settle()
    active = statistics.mean(len(load.route(family.num_experts, family.top_k, draw)) for _ in range(200))
    return Predicted(statistics.mean(times), statistics.mean(waits), statistics.mean(moved), active)


class _Step:
    """One pass through a stack: what the model and `OffloadedExperts` do, with durations in place of arithmetic."""

    def __init__(
        self,
        family: ExpertSpec,
        gating: PreGating,
        durations: Durations,
        policy: Policy,
        scheduler: Scheduler,
        clock: Clock,
    ) -> None:
        self._family, self._gating, self._durations = family, gating, durations
        self._fetcher = Fetcher(policy, family, scheduler)
        self._scheduler, self._clock = scheduler, clock
        self.waited = 0.0

    def run(self, stack: str, load: Load, draw: random.Random) -> None:
        num_blocks = len(self._family.layers[stack])
        routes = [load.route(self._family.num_experts, self._family.top_k, draw) for _ in range(num_blocks)]
        for block in self._gating.embedding_entries(stack, num_blocks):
            self._announce(stack, block, routes)
        for block, experts in enumerate(routes):
            # the durations while a prompt is read do not matter: only what it leaves in the cache does
            self._clock.compute(self._durations.before_block[min(block, len(self._durations.before_block) - 1)])
            seats = self._gating.gates_at(stack, block, num_blocks)
            if seats.own and not seats.weighs:
                self._announce(stack, block, routes)
            if seats.target is not None:
                self._announce(stack, seats.target, routes)
            self._experts(stack, block, experts)

    def _announce(self, stack: str, block: int, routes: Sequence[list[int]]) -> None:
        self._fetcher.on_route(stack, block, routes[block])

    def _experts(self, stack: str, block: int, experts: Sequence[int]) -> None:
        keys = [ExpertKey(stack, block, expert) for expert in experts]
        self._fetcher.on_enter(stack, block, keys)
        for key in self._scheduler.in_order_of_arrival(keys):
            before = self._clock.now
            self._scheduler.acquire(key)
            if self._clock.now > before:
                waited = self._clock.now - before
                self.waited += waited
                self._clock.compute(self._durations.resume * min(1.0, waited / self._durations.slab))
            self._clock.compute(self._durations.expert)
            self._scheduler.release(key)
        self._scheduler.finish_block(stack, block)
