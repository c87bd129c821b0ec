"""Reads in parts on several threads: each byte once, errors told, nothing lost, no dead lock with few buffers."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pregate.config import SlabDtype
from pregate.engine.io import read_pool
from pregate.engine.io.base import Move, MoverClosedError
from pregate.engine.io.host_cache import HostBuffers
from pregate.engine.io.read_pool import ReadJob, ReadPool, parts_of
from pregate.engine.io.threads import ThreadMover
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes
from pregate.engine.storage.slabs import MatrixPlace, SlabLayout
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertKey
from tests.engine.hostile import HostileStore, MemoryStore

pytestmark = pytest.mark.timeout(300)


def key(number: int) -> ExpertKey:
    return ExpertKey("decoder", 0, number)


def submitted(pool: ReadPool, job: ReadJob) -> ReadJob:
    pool.submit([job])
    return job


@contextmanager
def pool_of(num_threads: int) -> Iterator[ReadPool]:
    pool = ReadPool(num_threads)
    try:
        yield pool
    finally:
        pool.close()


def job_of(*parts: Callable[[], None], result: Any = None) -> ReadJob:
    return ReadJob(lambda: list(parts), lambda: result)


@given(pages=st.integers(1, 50_000), part=st.integers(1, 3000))
@settings(derandomize=True, database=None, deadline=None, max_examples=200)
def test_parts_cover_a_slab_exactly_once(pages: int, part: int) -> None:
    before, read_pool.PART_BYTES = read_pool.PART_BYTES, part * PAGE
    try:
        parts = parts_of(pages * PAGE)
    finally:
        read_pool.PART_BYTES = before
    assert parts[0][0] == 0
    assert parts[-1][1] == pages * PAGE
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    assert all(first % PAGE == 0 and last % PAGE == 0 and first < last for first, last in parts)
    assert max(last - first for first, last in parts) <= part * PAGE


def test_as_many_parts_as_threads_run_side_by_side() -> None:
    """Every part waits until all three of a job, or of three jobs, are under way."""
    for num_jobs in (1, 3):
        meet = threading.Barrier(3)
        with pool_of(3) as pool:
            part = lambda meet=meet: meet.wait(10)  # noqa: E731
            jobs = [submitted(pool, job_of(*[part] * (3 // num_jobs))) for _ in range(num_jobs)]
            for job in jobs:
                job.result()


def test_the_oldest_job_ends_first() -> None:
    """All parts of one slab are read before the next slab's: it is needed first."""
    seen: list[int] = []
    with pool_of(1) as pool:
        jobs = [submitted(pool, job_of(lambda n=n: seen.append(n), lambda n=n: seen.append(n))) for n in range(50)]
        for job in jobs:
            job.result()
    assert seen == [n for n in range(50) for _ in range(2)]


def test_results_are_given_to_whoever_asks_and_as_often() -> None:
    with pool_of(2) as pool:
        job = submitted(pool, job_of(lambda: None, result="here"))
        assert (job.result(), job.result(), job.done(), job.ended_well()) == ("here", "here", True, True)


@pytest.mark.parametrize("where", ["begin", "part", "finish"])
def test_an_error_is_raised_every_time_it_is_asked_for(where: str) -> None:
    error, after = OSError("no"), []

    def fail() -> Any:
        raise error

    begin = fail if where == "begin" else lambda: [fail if where == "part" else after.clear, after.clear]
    with pool_of(2) as pool:
        job = submitted(pool, ReadJob(begin, fail if where == "finish" else lambda: after.append("finished")))
        for _ in range(2):
            with pytest.raises(OSError, match="no"):
                job.result()
        assert job.done()
        assert not job.ended_well()
        assert after == []
        assert submitted(pool, job_of(lambda: None, result=1)).result() == 1


class Dawdling(SimpleQueue):  # type: ignore[type-arg]
    """Between taking a job and doing anything with it, a thread may lose the interpreter for as long as it likes."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        taken = super().get(block, timeout)
        if isinstance(taken, ReadJob):
            time.sleep(0.003)
        return taken


@pytest.mark.parametrize("num_threads", [1, 3])
def test_drain_waits_also_for_a_job_just_taken(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_pool, "SimpleQueue", Dawdling)
    with pool_of(num_threads) as pool:
        for number in range(12):
            jobs = [submitted(pool, job_of(lambda: None, lambda: None)) for _ in range(number % 4)]
            pool.drain()
            assert all(job.done() for job in jobs), f"{sum(not job.done() for job in jobs)} of {len(jobs)} still run"


def test_drain_waits_for_jobs_that_fail_and_never_raises() -> None:
    def fail() -> None:
        time.sleep(0.001)
        raise OSError("no")

    with pool_of(2) as pool:
        jobs = [submitted(pool, job_of(fail, fail)) for _ in range(20)]
        pool.drain()
        assert all(job.done() for job in jobs)


def test_closing_ends_the_threads_and_leaves_no_job_undone() -> None:
    """What was waiting is read or abandoned; whoever asks for it does not wait for ever."""
    before = set(threading.enumerate())
    pool = ReadPool(2)
    jobs = [submitted(pool, job_of(lambda: time.sleep(0.002))) for _ in range(20)]
    assert len(set(threading.enumerate()) - before) == 2
    pool.close()
    pool.close()
    assert set(threading.enumerate()) <= before
    for job in jobs:
        assert job.done()
        if not job.ended_well():
            with pytest.raises(MoverClosedError):
                job.result()
    with pytest.raises(MoverClosedError, match="closed: open it again"):
        submitted(pool, job_of())


def test_an_interrupted_close_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ReadPool(2)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("pregate-reader")]
    join = threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        join(thread, timeout)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    monkeypatch.undo()
    again = threading.Thread(target=pool.close, daemon=True)
    again.start()
    again.join(120)
    assert not again.is_alive(), "the second close hangs"
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize("num_buffers", [1, 3])
def test_jobs_that_found_no_buffer_begin_once_there_is_one(num_threads: int, num_buffers: int) -> None:
    """Many jobs, of several parts each, some of which fail; a job begins only while a buffer is free."""
    draw = random.Random(num_threads)
    free, most = [num_buffers], [0]
    lock = threading.Lock()

    def begin(fails: bool) -> list[Callable[[], None]] | None:
        with lock:
            if not free[0]:
                return None
            free[0] -= 1
            most[0] = max(most[0], num_buffers - free[0])
        return [lambda: time.sleep(draw.choice([0, 0, 2e-4])) for _ in range(2)] + [lambda: fails and 1 / 0]

    def give_back() -> None:
        with lock:
            free[0] += 1

    with pool_of(num_threads) as pool:
        jobs = []
        for number in range(200):
            jobs.append(submitted(pool, ReadJob(lambda n=number: begin(n % 7 == 3), give_back, give_back)))
        for number, job in enumerate(jobs):
            if number % 7 == 3:
                with pytest.raises(ZeroDivisionError):
                    job.result()
            else:
                job.result()
        pool.drain()
    assert free == [num_buffers]
    assert 1 <= most[0] <= num_buffers


def test_buffers_are_a_cache_that_forgets_the_slab_unused_for_longest() -> None:
    buffers = HostBuffers(3, PAGE, page_locked=False)

    def use(number: int, trusted: bool = True) -> bool:
        taken = buffers.take(key(number))
        assert taken is not None
        buffers.give_back(taken[0], key(number) if trusted else None)
        return taken[1]

    assert [use(number) for number in (0, 1, 2)] == [False] * 3
    assert [use(number) for number in (0, 1, 2, 0)] == [True] * 4
    assert not use(3)  # in the place of 1
    assert [use(number) for number in (2, 0, 3)] == [True] * 3
    assert not use(1, trusted=False)  # in the place of 2, and its read failed
    assert not use(1)
    assert [use(number) for number in (0, 3, 1)] == [True] * 3
    buffers.close()


def test_busy_buffers_are_given_to_nobody_else() -> None:
    buffers = HostBuffers(2, PAGE, page_locked=False)
    one, other = buffers.take(key(0)), buffers.take(key(1))
    assert one is not None and other is not None
    assert one[0] is not other[0]
    assert buffers.take(key(0)) is buffers.take(key(2)) is None
    buffers.give_back(one[0], key(0))
    again = buffers.take(key(0))
    assert again == (one[0], True)
    one[0].memory.fill_(1)
    other[0].memory.fill_(2)
    assert one[0].memory.eq(1).all()
    buffers.close()


SLAB = 3 * PAGE
LAYOUT = SlabLayout(torch.uint8, SlabDtype.source, (MatrixPlace("m", (3, PAGE), 0),), SLAB)


def slab_store(num_slabs: int) -> MemoryStore:
    """Slabs of three pages; every byte tells the slab and the page."""
    matrices = {
        key(n): [torch.tensor([[10 * n], [10 * n + 1], [10 * n + 2]], dtype=torch.uint8).expand(3, PAGE)]
        for n in range(num_slabs)
    }
    return MemoryStore(LAYOUT, matrices)


@pytest.mark.parametrize("host_buffers", [0, 1, 2, 8])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_mover_fills_slots_through_any_number_of_buffers(
    host_buffers: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slabs of three parts each, six of them under way at a time. With buffers for all, each is read once, and from
    then on comes from host memory."""
    monkeypatch.setattr(read_pool, "PART_BYTES", PAGE)
    store, counters = slab_store(8), Counters()
    hostile = HostileStore(store, most_s=0.0003)
    mover = ThreadMover(hostile, Trace(torch.device("cpu")), counters, num_threads, host_buffers)
    draw = random.Random(0)
    slots = aligned_bytes(6 * SLAB).view(6, SLAB)
    moved: set[int] = set()
    for _ in range(30):
        wanted = draw.sample(range(8), 6)
        transfers = mover.start([Move(key(n), slot) for n, slot in zip(wanted, slots, strict=True)])
        for n, slot, transfer in zip(wanted, slots, transfers, strict=True):
            transfer.wait()
            assert transfer.done()
            assert torch.equal(slot, store.slabs[key(n)]), f"slab {n}: {slot.unique()}"
        moved |= set(wanted)
    assert counters.bytes_moved == 180 * SLAB
    assert counters.bytes_read == 180 * SLAB - counters.host_hits * SLAB == hostile.num_reads * PAGE
    if host_buffers == 0:
        assert counters.host_hits == 0
    if host_buffers == 8:
        assert hostile.num_reads == 3 * len(moved)
    assert mover.host_bytes == host_buffers * SLAB
    mover.close()


@pytest.mark.parametrize("host_buffers", [0, 1])
def test_a_failed_read_leaves_no_trusted_slab_behind(host_buffers: int) -> None:
    store, slot = slab_store(2), aligned_bytes(SLAB)

    def fail_first(number: int, _: ExpertKey) -> None:
        if number == 0:
            raise OSError("the disk is gone")

    hostile = HostileStore(store, before_read=fail_first)
    mover = ThreadMover(hostile, Trace(torch.device("cpu")), Counters(), 2, host_buffers)
    [transfer] = mover.start([Move(key(1), slot)])
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            transfer.wait()
    mover.start([Move(key(1), slot)])[0].wait()
    assert torch.equal(slot, store.slabs[key(1)])
    mover.close()


def test_drain_returns_when_no_slot_changes_any_more() -> None:
    store = slab_store(8)
    mover = ThreadMover(HostileStore(store, most_s=0.002), Trace(torch.device("cpu")), Counters(), 3)
    slots: list[Tensor] = list(aligned_bytes(8 * SLAB).view(8, SLAB))
    mover.start([Move(key(n), slot) for n, slot in enumerate(slots)])
    mover.drain()
    for n, slot in enumerate(slots):
        assert torch.equal(slot, store.slabs[key(n)]), n
    mover.close()
