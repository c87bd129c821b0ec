"""The two CUDA constructs that device-driven decoding needs, and what they are on a CPU: a second stream that forks
from the computation and joins it again, and a step that is captured once and replayed.

Knows streams and graphs; knows nothing about what runs in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from pregate.engine.device.sampler_state import StepKind

STEPS_AT_ONCE = 8
"""Steps of the longer graph of a kind, see `StepGraphs`."""
WARM_UPS = 2
"""Steps before a capture: kernels are compiled and libraries make their workspaces, which a capture must not see."""


class SideStream(Protocol):
    @contextmanager
    def fork(self, behind: Any = None) -> Iterator[None]:
        """Work submitted in the body begins behind all work submitted so far, or behind a mark of another side stream,
        and runs beside what follows."""
        ...

    def mark(self) -> Any:
        """The point that the side stream's work has reached by now."""
        ...

    def join(self, mark: Any) -> None:
        """What follows begins behind `mark`."""
        ...


class InOrder:
    """Without streams: everything happens in the order it is written in."""

    @contextmanager
    def fork(self, behind: None = None) -> Iterator[None]:
        yield

    def mark(self) -> None:
        return None

    def join(self, mark: None) -> None:
        return None


class CudaSideStream:
    """A stream of the highest priority, because its few programs must not queue behind the computation's many.

    Inside a capture its work becomes a branch of the graph; every fork must be joined before the capture ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device, priority=-1)

    @contextmanager
    def fork(self, behind: Any = None) -> Iterator[None]:
        if behind is None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            self._stream.wait_event(behind)
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def join(self, mark: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)


def side_stream(device: torch.device) -> SideStream:
    return CudaSideStream(device) if device.type == "cuda" else InOrder()


class StepGraphs:
    """Runs `step(kind)`: on CUDA as graphs captured the first time a kind is asked for; else as it is.

    There are two graphs of a kind, of one step and of `STEPS_AT_ONCE`: between two replays the device waits for more
    than ten microseconds, inside a graph for one or two. `begin` brings the step's state to a place from which
    one step may run and be forgotten.
    """

    def __init__(self, step: Callable[[StepKind], None], begin: Callable[[], None], device: torch.device) -> None:
        self._step, self._begin, self._device = step, begin, device
        self._graphs: dict[tuple[StepKind, int], Any] = {}
        self._pool: Any = None

    def prepare(self, kind: StepKind) -> None:
        """Capture `kind` unless that was done. Runs a few steps, so whatever a request has prepared is lost."""
        if self._device.type == "cuda" and (kind, 1) not in self._graphs:
            pool = self._pool
            try:
                self._graphs |= {(kind, steps): self._capture(kind, steps) for steps in (1, STEPS_AT_ONCE)}
            except BaseException:
                self._pool = pool  # the one of a graph that is dropped is gone with it
                raise

    def run(self, kind: StepKind, steps: int = 1) -> None:
        """So many steps of a prepared kind."""
        if self._device.type != "cuda":
            for _ in range(steps):
                self._step(kind)
            return
        for _ in range(steps // STEPS_AT_ONCE):
            self._graphs[kind, STEPS_AT_ONCE].replay()
        for _ in range(steps % STEPS_AT_ONCE):
            self._graphs[kind, 1].replay()

    def forget(self) -> None:
        """Give back the graphs, which must not be running, and their memory; what is prepared next is captured anew."""
        self._graphs.clear()
        self._pool = None

    def _capture(self, kind: StepKind, steps: int) -> Any:
        # what is drawn here is forgotten with the steps, so that a seed set before the request still begins with it
        with torch.cuda.device(self._device), torch.random.fork_rng([torch.cuda.current_device()]):
            aside: Any = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self._begin()
                    self._step(kind)
                self._begin()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # other threads of the process may use CUDA meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                for _ in range(steps):
                    self._step(kind)
            self._pool = graph.pool()
        return graph
