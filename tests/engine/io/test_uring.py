"""Reads by the kernel itself: bytes, errors, and what is left after them; and an engine over an unfriendly ring."""

from __future__ import annotations

import errno
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import CacheRule, Policy
from pregate.engine.engine import OffloadEngine
from pregate.engine.io import make_mover, ring
from pregate.engine.io.base import Move, MoverClosedError
from pregate.engine.io.ring import _ENTER, Ring, RingUnavailableError
from pregate.engine.io.threads import ThreadMover
from pregate.engine.io.uring import UringMover
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes
from pregate.models.experts import ExpertKey
from tests.engine.hostile import HostileRing, poison_slots
from tests.engine.serving import OFFLOADED, SLAB, Served, assert_same, generated, needs_io_uring, request

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("nothing_left_behind")]
PAGES = 64


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file of `PAGES` pages, each filled with its own number, read past the page cache where that can be."""
    path = tmp_path / "pages"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(PAGES)))
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.fixture
def memory() -> Tensor:
    return aligned_bytes(PAGES * PAGE).fill_(0xFF)


def whole(memory: Tensor) -> list[tuple[int, int]]:
    return [(memory.data_ptr(), memory.numel())]


def all_of(ring: Ring, number: int) -> dict[int, int]:
    ended: dict[int, int] = {}
    while len(ended) < number:
        ring.wait()
        ended |= dict(ring.completed())
    return ended


@needs_io_uring
def test_reads_arrive_where_they_were_sent(file: int, memory: Tensor) -> None:
    """Many more than the ring has room for at a time, so that its counters wrap around its queues."""
    ring = Ring(4, whole(memory))
    for first in range(0, PAGES, 4):
        for page in range(first, first + 4):
            to = PAGES - 1 - page
            ring.read(page, file, page * PAGE, memory.data_ptr() + to * PAGE, PAGE, 0)
        ring.submit()
        assert all_of(ring, 4) == dict.fromkeys(range(first, first + 4), PAGE)
        assert ring.completed() == []
    ring.close()
    found = memory.view(PAGES, PAGE)
    assert torch.equal(found, torch.arange(PAGES - 1, -1, -1, dtype=torch.uint8)[:, None].expand(PAGES, PAGE))


@needs_io_uring
def test_ends_and_errors_come_back_as_numbers(file: int, memory: Tensor) -> None:
    ring = Ring(4, whole(memory))
    ring.read(1, file, (PAGES - 1) * PAGE, memory.data_ptr(), 4 * PAGE, 0)
    ring.read(2, file, PAGES * PAGE, memory.data_ptr(), PAGE, 0)
    ring.read(3, -1, 0, memory.data_ptr(), PAGE, 0)
    ring.read(4, file, 0, memory.data_ptr() + memory.numel(), PAGE, 0)
    ring.submit()
    assert all_of(ring, 4) == {1: PAGE, 2: 0, 3: -errno.EBADF, 4: -errno.EFAULT}
    ring.close()


@needs_io_uring
def test_settling_forgets_what_has_ended_and_takes_back_what_never_began(file: int, memory: Tensor) -> None:
    ring = Ring(4, whole(memory))
    for number in range(3):
        ring.read(number, file, 0, memory.data_ptr(), memory.numel(), 0)
    ring.submit()
    # as if an interrupt had come between preparing a read and handing it over
    ring._sq[ring._sq_tail] += 1
    ring.settle()
    assert ring.completed() == []
    ring.read(7, file, 0, memory.data_ptr(), PAGE, 0)
    ring.submit()
    assert all_of(ring, 1) == {7: PAGE}
    ring.close()
    ring.close()
    ring.settle()


@needs_io_uring
def test_settling_does_not_miss_a_read_that_ends_meanwhile(file: int, memory: Tensor) -> None:
    """Short reads, settled at once: now and then one ends between two looks at the queue."""
    ring = Ring(4, whole(memory))
    for number in range(3000):
        ring.read(number, file, 0, memory.data_ptr(), PAGE, 0)
        ring.submit()
        ring.settle()
        assert ring.completed() == []
    ring.close()


@needs_io_uring
def test_another_process_may_not_use_the_ring(file: int, memory: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the reads of the one that opened it."""
    ring = Ring(4, whole(memory))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(RuntimeError, match="before the process forked: open one in each"):
            ring.read(1, file, 0, memory.data_ptr(), PAGE, 0)
            ring.submit()
        with pytest.raises(RuntimeError, match="before the process forked"):
            ring.completed()
        ring.settle()
    ring.read(1, file, 0, memory.data_ptr(), PAGE, 0)
    ring.submit()
    assert all_of(ring, 1) == {1: PAGE}
    ring.close()


@needs_io_uring
@pytest.mark.parametrize("where", ["settle", "_call"])
def test_an_interrupted_close_can_be_repeated(
    file: int, memory: Tensor, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ring = Ring(4, whole(memory))
    ring.read(1, file, 0, memory.data_ptr(), memory.numel(), 0)
    ring.submit()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ring, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ring.close()
    ring.close()
    ring.close()


@needs_io_uring
def test_a_ring_that_is_dropped_waits_for_its_reads(file: int, memory: Tensor) -> None:
    for _ in range(50):
        ring = Ring(4, whole(memory))
        memory.fill_(0xFF)
        ring.read(1, file, 0, memory.data_ptr(), memory.numel(), 0)
        ring.submit()
        del ring
        seen = memory.clone()
        time.sleep(1e-4)
        assert torch.equal(memory, seen), "the kernel still wrote"


def test_large_memory_is_private_and_may_have_huge_pages() -> None:
    memory = aligned_bytes(16 << 20).fill_(1)
    maps = Path("/proc/self/smaps")
    if not maps.is_file():
        pytest.skip("no smaps on this system")
    entries = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", maps.read_text())
    inside = (e for e in entries if int(e.split("-")[0], 16) <= memory.data_ptr() < int(e.split()[0].split("-")[1], 16))
    entry = next(inside)
    assert entry.split()[1].endswith("p"), entry
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if enabled.is_file() and "[never]" not in enabled.read_text():
        assert int(re.search(r"AnonHugePages: +(\d+)", entry)[1]) > 0, entry  # type: ignore[index]


def test_it_says_why_there_is_no_ring(memory: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        with pytest.raises(RingUnavailableError, match="on Linux on x86-64 only"):
            Ring(4, whole(memory))
    refuse(monkeypatch, ring._SETUP, errno.EPERM)
    with pytest.raises(RingUnavailableError, match="refuses io_uring to this process"):
        Ring(4, whole(memory))


@needs_io_uring
def test_memory_that_cannot_be_pinned_is_told(memory: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ring._REGISTER, errno.ENOMEM)
    with pytest.raises(RingUnavailableError, match=rf"{PAGES * PAGE} bytes .* raise the limit with ulimit -l"):
        Ring(4, whole(memory))


def refuse(monkeypatch: pytest.MonkeyPatch, system_call: int, error: int) -> None:
    call = Ring._call

    def refusing(ring: Ring, number: int, *arguments: Any) -> int:
        if number == system_call:
            raise OSError(error, os.strerror(error))
        return call(ring, number, *arguments)

    monkeypatch.setattr(Ring, "_call", refusing)


@pytest.mark.parametrize(("error", "warned"), [(errno.EPERM, True), (errno.ENOMEM, True), (errno.ENOSYS, False)])
def test_without_a_ring_threads_read_and_the_reason_is_told(
    served: Served, expected: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, error: int, warned: bool
) -> None:
    def no_ring(*_: Any) -> None:
        raise RingUnavailableError(error, "no ring today")

    monkeypatch.setattr(make_mover, "UringMover", no_ring)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with OffloadEngine.open(served.directory) as engine:
            assert isinstance(engine.host.mover, ThreadMover)
            assert_same(generated(engine.generate, request(2)), expected)
    reasons = [str(warning.message) for warning in told if "read by threads" in str(warning.message)]
    assert len(reasons) == warned
    assert all("no ring today" in reason for reason in reasons)


@needs_io_uring
def test_the_kernel_reads_unless_it_is_told_not_to_or_slabs_pass_through_host_memory(served: Served) -> None:
    for options, kind in (({}, UringMover), ({"io_uring": False}, ThreadMover), ({"host_budget": "50%"}, ThreadMover)):
        with OffloadEngine.open(served.directory, **options) as engine:
            assert type(engine.host.mover) is kind, options


@needs_io_uring
@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("cache", [CacheRule.none, CacheRule.lru])
@pytest.mark.parametrize("budget", [str(SLAB), "20%", "60%"])
@pytest.mark.parametrize("io_threads", [1, 3])
def test_an_unfriendly_ring_changes_no_token(
    served: Served, expected: tuple[Tensor, Tensor], policy: Policy, cache: CacheRule, budget: str, io_threads: int
) -> None:
    """Pieces, late and out of order; slots lose what they held the moment a read into them is asked for."""
    options = {"device_budget": None if policy is Policy.gpu_only else budget, "cache": cache, "io_threads": io_threads}
    with OffloadEngine.open(served.directory, policy=policy, **options) as engine:
        poison_slots(engine)
        ring = HostileRing(engine, seed=io_threads)
        for _ in range(3):
            assert_same(generated(engine.generate, request(2)), expected)
        if policy is not Policy.gpu_only:
            assert ring.num_pieces > engine.counters.misses, "some slabs came in pieces"
        assert engine.counters.bytes_read == engine.counters.misses * SLAB or policy is Policy.gpu_only


@needs_io_uring
def test_computing_before_a_slab_has_arrived_is_noticed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pregate.engine.io.uring._SlotRead.wait", lambda read: None)
    with OffloadEngine.open(served.directory, device_budget="20%") as engine:
        poison_slots(engine)
        HostileRing(engine)
        _, logits = generated(engine.generate, request(2))
    assert logits.isnan().any(), logits


@needs_io_uring
@pytest.mark.parametrize("policy", OFFLOADED)
def test_slots_lie_in_several_registered_pieces(
    served: Served, expected: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, policy: Policy
) -> None:
    monkeypatch.setattr("pregate.engine.io.uring.MOST_REGISTERED", 3 * SLAB)
    with OffloadEngine.open(served.directory, policy=policy, device_budget="60%", cache=CacheRule.lru) as engine:
        poison_slots(engine)
        assert_same(generated(engine.generate, request(2)), expected)


@needs_io_uring
def test_reads_of_the_next_block_begin_behind_those_of_the_one_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would share the link with slabs that are needed sooner."""
    with OffloadEngine.open(served.directory, device_budget="60%", io_threads=2) as engine:
        mover: Any = engine.host.mover
        slots = engine.host.scheduler._slots
        under_way: list[int] = []
        ended: list[tuple[int, int]] = []
        monkeypatch.setattr(Ring, "read", lambda ring, number, *_: under_way.append(number))
        monkeypatch.setattr(Ring, "completed", lambda ring: [ended.pop() for _ in ended[:]])
        wanted = [
            ExpertKey("decoder", 0, 0),
            ExpertKey("decoder", 0, 1),
            ExpertKey("decoder", 1, 0),
            ExpertKey("decoder", 1, 1),
        ]
        reads = mover.start([Move(key, slots[number]) for number, key in enumerate(wanted)])
        assert under_way == [1, 2]
        ended.append((1, SLAB))
        assert reads[0].done() and not reads[2].done()
        assert under_way == [1, 2], "the other read of block 0 is still under way"
        ended.append((2, SLAB))
        assert reads[1].done()
        assert under_way == [1, 2, 3, 4]
        ended.extend([(3, SLAB), (4, SLAB)])
        assert reads[2].done() and reads[3].done()


@needs_io_uring
def test_many_small_slabs_are_read_by_one_call_of_the_kernel(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a block that are asked for together, though `io_threads` is 1: they are small."""
    asked: list[int] = []
    call = Ring._call

    def counted(ring: Ring, number: int, *arguments: Any) -> int:
        if number == _ENTER and arguments[1]:
            asked.append(arguments[1])
        return call(ring, number, *arguments)

    with OffloadEngine.open(served.directory, device_budget="100%", io_threads=1) as engine:
        monkeypatch.setattr(Ring, "_call", counted)
        slots = engine.host.scheduler._slots
        wanted = [ExpertKey("decoder", 0, expert) for expert in (3, 0, 4, 1)]
        reads = engine.host.mover.start([Move(key, slots[number]) for number, key in enumerate(wanted)])
        for read in reads:
            read.wait()
        assert asked == [4]
        assert len({int(slots[number].view(torch.int64).sum()) for number in range(4)}) == 4


@needs_io_uring
def test_what_was_called_off_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transfer under way, and one that was waiting for its turn, when everything was reset."""
    with OffloadEngine.open(served.directory, device_budget="60%", io_threads=1) as engine:
        mover: Any = engine.host.mover
        monkeypatch.setattr(Ring, "completed", lambda ring: [])  # the first might have ended when the second is begun
        slots = engine.host.scheduler._slots
        wanted = ExpertKey("decoder", 0, 0), ExpertKey("decoder", 1, 0)
        begun, waiting = mover.start([Move(key, slots[number]) for number, key in enumerate(wanted)])
        mover.drain()
        for read in (begun, waiting):
            with pytest.raises(MoverClosedError, match="ask for it again"):
                read.wait()
    with pytest.raises(MoverClosedError, match="closed"):
        mover.start([Move(engine.family.keys()[0], torch.empty(0))])
