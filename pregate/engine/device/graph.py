"""The two CUDA constructs that device-driven decoding needs, and what they are on a CPU: a second stream that forks
from the computation and joins it again, and a step that is captured once and replayed.

Knows streams and graphs; knows nothing about what runs in them.
"""

from __future__ import annotations

import gc
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
        self._stream: Any = None
        """Of warm-ups and captures alike: torch's own for captures is of whichever device captured first."""

    def prepare(self, kind: StepKind) -> None:
        """Capture `kind` unless that was done. Runs a few steps, so whatever a request has prepared is lost."""
        if self._device.type == "cuda" and (kind, 1) not in self._graphs:
            gc.collect()  # what has been dropped may own page-locked memory, and must not give it back during a capture
            try:
                self._graphs |= {(kind, steps): self._capture(kind, steps) for steps in (1, STEPS_AT_ONCE)}
            except BaseException:
                # torch and CUDA may take the capture for one that still runs
                self._pool = self._stream = None
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
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            own, caller = self._stream, torch.cuda.current_stream()
            own.wait_stream(caller)
            try:
                with torch.cuda.stream(own):
                    for _ in range(WARM_UPS):
                        self._begin()
                        self._step(kind)
                    self._begin()
            finally:
                caller.wait_stream(own)
            graph = torch.cuda.CUDAGraph()
            self._record(graph, own, kind, steps)
            self._pool = graph.pool()
        return graph

    def _record(self, graph: Any, own: Any, kind: StepKind, steps: int) -> None:
        """Raises what a step raised, whatever the end of the capture makes of it."""
        raised: BaseException | None = None
        # other threads of the process may use CUDA meanwhile
        options: dict[str, Any] = {"pool": self._pool, "stream": own, "capture_error_mode": "thread_local"}
        try:
            # entered outside as well: a capture whose end fails stays on its stream
            with torch.cuda.stream(own), torch.cuda.graph(graph, **options):
                try:
                    for _ in range(steps):
                        self._step(kind)
                except BaseException as error:
                    raised = error
                    raise
        except BaseException:
            if raised is None:
                raise
        if raised is not None:
            raise raised
