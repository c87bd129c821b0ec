"""Streams and graphs: without CUDA they change nothing; with it, they order what must be ordered."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pregate.engine.device.graph import STEPS_AT_ONCE, WARM_UPS, InOrder, StepGraphs, side_stream
from pregate.engine.device.sampler_state import StepKind

CPU = torch.device("cpu")
GREEDY, SAMPLED = StepKind(), StepKind(sample=True)


def test_on_a_cpu_steps_run_as_they_are() -> None:
    ran: list[StepKind] = []
    graphs = StepGraphs(ran.append, lambda: pytest.fail("nothing is captured here"), CPU)
    graphs.prepare(GREEDY)
    graphs.run(GREEDY)
    graphs.run(SAMPLED, 3)
    graphs.forget()
    assert ran == [GREEDY, *[SAMPLED] * 3]


def test_on_a_cpu_the_side_stream_is_the_only_one() -> None:
    side = side_stream(CPU)
    assert isinstance(side, InOrder)
    ran = []
    with side.fork():
        ran.append("beside")
        mark = side.mark()
    side.join(mark)
    ran.append("behind")
    assert ran == ["beside", "behind"]


class FakeCuda:
    """Two devices and their streams, without either: which is current, and what is captured on which.

    The end of a capture behaves as torch's: where it raises, the thread stays on the stream.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.streams = 0, {0: "default", 1: "default"}
        self.captures: list[tuple[Any, Any]] = []
        """The pool that was given, and the device and stream of the capture."""
        self.capturing = self.end_fails = False
        self.num_streams = self.num_pools = 0
        self.waits: list[tuple[str, str]] = []
        for name in ("device", "stream", "graph", "Stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self._stream(*self.where))
        monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())

    @property
    def where(self) -> tuple[int, str]:
        return self.current, self.streams[self.current]

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        leave = self._enter(stream)
        try:
            yield
        finally:
            leave()

    @contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        leave = self._enter(stream)
        self.captures.append((pool, stream.where))
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            if self.end_fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            leave()

    def _enter(self, stream: Any) -> Callable[[], None]:
        device, name = stream.where
        before = self.current, self.streams[device]
        self.current, self.streams[device] = device, name

        def leave() -> None:
            self.current, self.streams[device] = before

        return leave

    def Stream(self) -> Any:
        self.num_streams += 1
        return self._stream(self.current, f"own {self.num_streams}")

    def _stream(self, device: int, name: str) -> Any:
        def wait_stream(other: Any) -> None:
            self.waits.append((name, other.where[1]))

        return SimpleNamespace(where=(device, name), wait_stream=wait_stream)

    def CUDAGraph(self) -> Any:
        self.num_pools += 1
        pool = f"pool {self.num_pools}"
        return SimpleNamespace(pool=lambda: self.captures[-1][0] or pool)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


SECOND = torch.device("cuda", 1)
BEFORE = (0, {0: "default", 1: "default"})
"""The current device, and the current stream of each."""


def test_warm_ups_and_captures_share_a_stream_of_the_graphs_own_device(cuda: FakeCuda) -> None:
    """Another device has captured before, and it is the current one."""
    ran: list[Any] = []
    for device in (torch.device("cuda", 0), SECOND):
        graphs = StepGraphs(lambda kind: ran.append(cuda.where), lambda: ran.append(cuda.where), device)
        cuda.captures.clear(), ran.clear()
        for kind in (GREEDY, SAMPLED, GREEDY):
            graphs.prepare(kind)
        assert len({*ran}) == 1 and ran[0][0] == device.index and ran[0][1].startswith("own")
        assert [where for _, where in cuda.captures] == [ran[0]] * 4
        pools = [pool for pool, _ in cuda.captures]
        assert pools[0] is None and pools[1] is not None and pools[1:] == [pools[1]] * 3
        assert cuda.waits[-2:] == [(ran[0][1], "default"), ("default", ran[0][1])]
    assert (cuda.current, cuda.streams) == BEFORE and cuda.num_streams == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no memory")], ids=["interrupt", "full"])
@pytest.mark.parametrize("end_fails", [False, True])
def test_a_capture_that_is_cut_short_raises_what_cut_it_short(
    cuda: FakeCuda, error: BaseException, end_fails: bool
) -> None:
    """And leaves the thread where it was; what is captured next has a pool and a stream that are not half in use."""
    fails: list[bool] = []

    def step(kind: StepKind) -> None:
        if cuda.capturing and fails.pop():
            cuda.end_fails = end_fails
            raise error from ValueError("the reason")

    graphs = StepGraphs(step, lambda: None, SECOND)
    fails[:] = [False] * (1 + STEPS_AT_ONCE)
    graphs.prepare(GREEDY)
    fails[:] = [True, False]  # the first graph of the kind is captured, the second is not
    with pytest.raises(type(error)) as raised:
        graphs.prepare(SAMPLED)
    assert raised.value is error and isinstance(error.__cause__, ValueError)
    assert (cuda.current, cuda.streams) == BEFORE
    cuda.end_fails = False
    failed = cuda.captures[-1]
    fails[:] = [False] * (1 + STEPS_AT_ONCE)
    graphs.prepare(SAMPLED)
    (first, stream), (second, same) = cuda.captures[-2:]
    assert first is None and second is not None and stream == same != failed[1]
    assert len(graphs._graphs) == 4


def test_what_only_the_end_of_a_capture_raises_is_raised(cuda: FakeCuda) -> None:
    graphs = StepGraphs(lambda kind: None, lambda: None, SECOND)
    cuda.end_fails = True
    with pytest.raises(RuntimeError, match="during capture"):
        graphs.prepare(GREEDY)
    assert (cuda.current, cuda.streams) == BEFORE and not graphs._graphs


def test_what_was_dropped_is_gone_before_a_capture(cuda: FakeCuda) -> None:
    """Its page-locked memory must not be given back during one."""
    dropped: Any = StepGraphs(lambda kind: None, lambda: None, CPU)
    dropped.itself, there = dropped, weakref.ref(dropped)
    gc.disable()
    try:
        del dropped
        assert there() is not None
        StepGraphs(lambda kind: None, lambda: None, SECOND).prepare(GREEDY)
        assert there() is None and len(cuda.captures) == 2
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("invalidated", [False, True])
def test_after_a_capture_that_was_cut_short_all_is_as_before(invalidated: bool) -> None:
    device = torch.device("cuda")
    count, cut = torch.zeros(1, device=device), [True]

    def step(kind: StepKind) -> None:
        count.add_(1)
        if cut[0] and torch.cuda.is_current_stream_capturing():
            if invalidated:
                with suppress(RuntimeError):
                    torch.cuda.synchronize()  # which no capture may do
            raise KeyboardInterrupt

    graphs, before = StepGraphs(step, count.zero_, device), torch.cuda.current_stream()
    with pytest.raises(KeyboardInterrupt):
        graphs.prepare(GREEDY)
    assert torch.cuda.current_stream() == before
    cut[0] = False
    graphs.prepare(GREEDY)
    count.zero_()
    graphs.run(GREEDY, STEPS_AT_ONCE + 2)
    assert count.item() == STEPS_AT_ONCE + 2
    graphs.forget()


@pytest.mark.gpu
def test_each_kind_is_captured_once_and_replayed() -> None:
    device = torch.device("cuda")
    count, calls = torch.zeros(1, device=device), []

    def step(kind: StepKind) -> None:
        calls.append(kind)
        count.add_(10 if kind.sample else 1)

    graphs = StepGraphs(step, count.zero_, device)
    for kind in (GREEDY, SAMPLED, GREEDY):
        graphs.prepare(kind)
    captured = len(calls)
    count.zero_()
    for kind, steps in ((GREEDY, 1), (SAMPLED, 2), (GREEDY, 2 * STEPS_AT_ONCE + 3)):
        graphs.run(kind, steps)
    assert count.item() == 21 + 2 * STEPS_AT_ONCE + 3
    expected = 2 * (2 * WARM_UPS + 1 + STEPS_AT_ONCE)
    assert len(calls) == captured == expected, "warm-ups and captures of each kind, and no call after that"
    graphs.forget()


@pytest.mark.gpu
def test_a_fork_runs_beside_and_joins_inside_a_graph() -> None:
    """The side stream reads what came before it, and what follows the join reads what it wrote."""
    device = torch.device("cuda")
    side = side_stream(device)
    size = 1 << 22
    source, moved, result = (torch.zeros(size, device=device) for _ in range(3))

    def step(kind: StepKind) -> None:
        source.add_(1)
        with side.fork():
            moved.copy_(source)
            mark = side.mark()
        other = torch.randn(512, 512, device=device)
        for _ in range(8):
            other = other @ other
        side.join(mark)
        result.copy_(moved * 2)

    graphs = StepGraphs(step, source.zero_, device)
    graphs.prepare(GREEDY)
    source.zero_()
    for number in range(1, 20):
        graphs.run(GREEDY)
        assert (result == 2 * number).all()
