"""The scheduler's promises under random operations, with a mover whose transfers end when the test says so."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pregate.config import CacheRule, Policy
from pregate.engine.fetching import Fetcher
from pregate.engine.io.base import Move
from pregate.engine.scheduler import Scheduler
from pregate.engine.slot_cache import SlotTable
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertKey, ExpertSpec

NUM_BLOCKS, NUM_EXPERTS = 4, 5


@dataclass
class Slot:
    """What lies in it, who computes with it, and the transfer that fills it."""

    holds: ExpertKey | None = None
    used_by: ExpertKey | None = None
    filling: FakeTransfer | None = None


@dataclass
class FakeTransfer:
    key: ExpertKey
    slot: Slot
    fails: bool = False
    over: bool = False

    def finish(self) -> None:
        if not self.over:
            self.over, self.slot.filling = True, None
            self.slot.holds = None if self.fails else self.key

    def done(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.finish()
        if self.fails:
            raise OSError(f"no {self.key}")


@dataclass
class FakeMover:
    """Refuses what a mover is never to be asked for."""

    transfers: list[FakeTransfer] = field(default_factory=list)
    batches: list[list[ExpertKey]] = field(default_factory=list)
    fail_next: bool = False

    @property
    def started(self) -> list[ExpertKey]:
        return [transfer.key for transfer in self.transfers]

    def start(self, moves: Sequence[Move]) -> list[FakeTransfer]:
        assert moves, "nothing to move"
        self.batches.append([key for key, _ in moves])
        return [self._start(*move) for move in moves]

    def _start(self, key: ExpertKey, slot: Slot) -> FakeTransfer:
        assert slot.used_by is None, f"{key} is moved into the slot that computes {slot.used_by}"
        assert slot.filling is None, f"{key} is moved into the slot that {slot.filling} is still moving into"
        slot.holds = None
        slot.filling = FakeTransfer(key, slot, self.fail_next)
        self.fail_next = False
        self.transfers.append(slot.filling)
        return slot.filling

    def used(self, slot: Slot) -> None:
        slot.used_by = None

    def drain(self) -> None:
        for transfer in self.transfers:
            transfer.finish()

    host_bytes = 0

    def close(self) -> None:
        return None


class Bench:
    def __init__(self, num_slots: int, rule: CacheRule) -> None:
        self.slots, self.mover, self.counters = [Slot() for _ in range(num_slots)], FakeMover(), Counters()
        self.table = SlotTable(num_slots, rule)
        self.scheduler = Scheduler(self.slots, self.table, self.mover, Trace(torch.device("cpu")), self.counters)

    def compute(self, key: ExpertKey) -> None:
        self.hold(key)
        self.scheduler.release(key)

    def hold(self, key: ExpertKey) -> Slot:
        slot = self.slots[self.scheduler.acquire(key)]
        assert slot.holds == key, f"{key} is computed with {slot.holds}, {slot.filling} under way"
        slot.used_by = key
        return slot


def keys(block: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey("decoder", block, expert) for expert in experts]


@pytest.mark.parametrize("rule", list(CacheRule))
@pytest.mark.parametrize("num_slots", [1, 2, 3, 7, 20])
def test_random_blocks_never_touch_a_slot_in_use_or_in_flight(rule: CacheRule, num_slots: int) -> None:
    """Blocks run in order, with routes announced up to two ahead, some of them never used; transfers end at random,
    and now and then one fails. The mover and `hold` assert what must never happen."""
    draw = random.Random(num_slots)
    bench = Bench(num_slots, rule)
    scheduler, counters, mover = bench.scheduler, bench.counters, bench.mover
    failures = ready = 0
    for _ in range(1500):
        block = draw.randrange(NUM_BLOCKS)
        needed = keys(block, *draw.sample(range(NUM_EXPERTS), draw.randint(0, NUM_EXPERTS)))
        try:
            for ahead in draw.sample(range(3), draw.randint(0, 3)):
                experts = draw.sample(range(NUM_EXPERTS), draw.randint(1, NUM_EXPERTS))
                scheduler.request(keys((block + ahead) % NUM_BLOCKS, *experts))
            mover.fail_next = draw.random() < 0.01
            scheduler.request(needed, urgent=True)
            for key in draw.sample(needed, len(needed)):
                for transfer in draw.sample(mover.transfers, min(2, len(mover.transfers))):
                    transfer.finish()
                if scheduler.is_ready(key):
                    slot = bench.slots[bench.table.find(key)]
                    # it holds nothing if its transfer has failed, which `acquire` tells
                    assert slot.filling is None and slot.holds in (key, None)
                    ready += 1
                bench.compute(key)
            scheduler.finish_block("decoder", block)
            if draw.random() < 0.1:
                scheduler.settle()
                assert all(slot.filling is None for slot in bench.slots)
        except OSError:
            failures += 1
            scheduler.reset()
            assert all(slot.filling is None for slot in bench.slots)
            for slot in bench.slots:
                slot.used_by = None
        held = [key for b in range(NUM_BLOCKS) for key in keys(b, *range(NUM_EXPERTS)) if scheduler.is_placed(key)]
        assert len(held) <= num_slots
        assert len({bench.table.find(key) for key in held}) == len(held)
        mover.transfers = [transfer for transfer in mover.transfers if not transfer.over]
    assert counters.misses >= num_slots and ready > 100
    if num_slots < NUM_BLOCKS * NUM_EXPERTS:
        assert failures > 0


@pytest.mark.parametrize("rule", list(CacheRule))
def test_a_held_slot_survives_everything_else_that_is_asked_for(rule: CacheRule) -> None:
    bench = Bench(2, rule)
    [first] = keys(0, 0)
    bench.scheduler.request([first], urgent=True)
    slot = bench.hold(first)
    bench.scheduler.request(keys(1, 0, 1, 2))
    for key in keys(1, 2, 1, 0):
        bench.compute(key)
    assert slot.holds == first
    bench.scheduler.release(first)


def test_urgent_requests_go_before_everything_announced_earlier() -> None:
    bench = Bench(1, CacheRule.none)
    bench.scheduler.request(keys(1, 0, 1, 2))
    bench.scheduler.request(keys(0, 3, 4), urgent=True)
    # what moves already stays until its slot is needed; it is then fetched again, last of all
    for key in keys(0, 3, 4):
        bench.compute(key)
    for key in keys(1, 1, 2, 0):
        bench.compute(key)
    assert bench.mover.started == [*keys(1, 0), *keys(0, 3, 4), *keys(1, 1, 2, 0)]


def test_an_announced_slab_becomes_urgent_when_its_block_runs() -> None:
    bench = Bench(1, CacheRule.none)
    bench.scheduler.request(keys(0, 0))
    bench.scheduler.request(keys(1, 0, 1, 2))
    bench.scheduler.request(keys(1, 2), urgent=True)
    bench.compute(keys(0, 0)[0])
    assert bench.mover.started == [*keys(0, 0), *keys(1, 2)]


def test_hits_misses_and_evictions_are_counted_where_they_happen() -> None:
    bench = Bench(2, CacheRule.lru)

    def use(*wanted: ExpertKey) -> tuple[int, int, int]:
        bench.scheduler.request(wanted, urgent=True)
        for key in wanted:
            bench.compute(key)
        return bench.counters.hits, bench.counters.misses, bench.counters.evictions

    assert use(*keys(0, 0, 1)) == (0, 2, 0)
    assert use(*keys(0, 1)) == (1, 2, 0)
    assert use(*keys(0, 2)) == (1, 3, 1)  # 0 left
    assert use(*keys(0, 1)) == (2, 3, 1)
    assert use(*keys(0, 0)) == (2, 4, 2)  # 2 left
    assert use(*keys(0, 1, 0)) == (4, 4, 2)


def test_a_use_is_counted_once_however_often_it_is_announced() -> None:
    """A slab that was prefetched is a miss and no hit; one that was kept is a hit when it is first announced."""
    bench = Bench(3, CacheRule.lru)
    for hits in (0, 2):
        for _ in range(3):
            bench.scheduler.request(keys(0, 0, 1))
        bench.scheduler.request(keys(0, 0, 1), urgent=True)
        for key in keys(0, 0, 1):
            bench.compute(key)
        assert (bench.counters.hits, bench.counters.misses) == (hits, 2)


def test_without_a_cache_only_stolen_slots_are_evictions() -> None:
    bench = Bench(1, CacheRule.none)
    bench.scheduler.request(keys(0, 0))
    bench.compute(keys(0, 0)[0])
    bench.scheduler.request(keys(1, 0))
    bench.scheduler.request(keys(0, 1), urgent=True)
    bench.compute(keys(0, 1)[0])
    assert (bench.counters.misses, bench.counters.evictions) == (4, 1)
    assert bench.mover.started == [*keys(0, 0), *keys(1, 0), *keys(0, 1), *keys(1, 0)]


def test_finishing_a_block_calls_off_what_it_never_used() -> None:
    bench = Bench(1, CacheRule.none)
    bench.scheduler.request(keys(0, 0, 1, 2))
    bench.scheduler.request(keys(1, 4))
    bench.compute(keys(0, 0)[0])
    bench.scheduler.finish_block("decoder", 0)
    assert bench.mover.started == [*keys(0, 0, 1), *keys(1, 4)]


@pytest.mark.parametrize("num_slots", [1, 3, NUM_EXPERTS, 2 * NUM_EXPERTS, NUM_BLOCKS * NUM_EXPERTS])
@pytest.mark.parametrize("rule", [CacheRule.none, CacheRule.lru])
def test_prefetch_all_never_exceeds_its_slots(num_slots: int, rule: CacheRule) -> None:
    family = ExpertSpec(
        num_experts=NUM_EXPERTS,
        top_k=1,
        lookahead=0,
        matrices={},
        layers={"decoder": list(range(NUM_BLOCKS))},
        layouts=(lambda *_: [],),
        apply=lambda matrices, hidden: hidden,
        activation="relu",
    )
    draw = random.Random(num_slots)
    bench = Bench(num_slots, rule)
    fetcher = Fetcher(Policy.prefetch_all, family, bench.scheduler)
    moved: list[Sequence[ExpertKey]] = []
    for step in range(3):
        for block in range(NUM_BLOCKS):
            [needed] = keys(block, draw.randrange(NUM_EXPERTS))
            begun = len(bench.mover.transfers)
            fetcher.on_enter("decoder", block, [needed])
            under_way = [slot for slot in bench.slots if slot.filling is not None]
            occupied = [slot for slot in bench.slots if slot.filling is not None or slot.holds is not None]
            assert len(under_way) <= len(occupied) <= num_slots
            assert sum(not transfer.over for transfer in bench.mover.transfers) == len(under_way)
            bench.compute(needed)
            bench.scheduler.finish_block("decoder", block)
            moved.append(bench.mover.started[begun:])
        bench.scheduler.settle()
        assert all(slot.filling is None for slot in bench.slots), step
    if num_slots >= 2 * NUM_EXPERTS and rule is CacheRule.none:
        # with room for two blocks, every expert of every block moves once a step
        assert sorted(bench.mover.started) == sorted(3 * family.keys())


def test_reset_forgets_even_what_is_half_done() -> None:
    """As after an interrupt between giving a slot away and starting its transfer."""
    bench = Bench(2, CacheRule.lru)
    bench.scheduler.request(keys(0, 0, 1, 2, 3))
    bench.hold(keys(0, 0)[0])
    start: Any = bench.mover.start

    def interrupted(moves: Sequence[Move]) -> list[FakeTransfer]:
        raise KeyboardInterrupt

    bench.mover.start = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        bench.scheduler.acquire(keys(1, 0)[0])
    bench.mover.start = start
    bench.scheduler.reset()
    for slot in bench.slots:
        slot.used_by = None
    for key in (*keys(0, 0, 1, 2, 3), *keys(1, 0)):
        assert not bench.scheduler.is_placed(key)
        bench.compute(key)
