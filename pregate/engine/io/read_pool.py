"""Several reads in flight: a pool of threads that reads slabs in parts.

A job is begun when the buffers it needs are free, its parts are read side by side, and the thread that reads the
last one finishes it. Knows nothing about slots, policies or which slab should move.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

from pregate.engine.io.base import CLOSED, MoverClosedError
from pregate.engine.storage.aligned_memory import PAGE, round_up

PART_BYTES = 4 << 20
"""About as much of a slab as one read asks for: one slab alone then keeps several reads in flight."""


def parts_of(slab_bytes: int) -> list[tuple[int, int]]:
    """(first, last) of equal page-aligned parts of at most about `PART_BYTES`."""
    num_parts = -(-slab_bytes // PART_BYTES)
    step = round_up(-(-slab_bytes // num_parts), PAGE)
    return [(first, min(first + step, slab_bytes)) for first in range(0, slab_bytes, step)]


class ReadJob:
    """`begin()` gives the parts to run, or None while it cannot begin; `finish()` gives the result.

    `begin` runs under the pool's lock, so it must be quick and must not block; parts and `finish` run on its threads.
    """

    def __init__(
        self,
        begin: Callable[[], list[Callable[[], None]] | None],
        finish: Callable[[], Any],
        failed: Callable[[], None] | None = None,
    ) -> None:
        """`failed` is called instead of `finish` once every part has ended and one has raised."""
        self.begin, self._finish, self._failed = begin, finish, failed
        self._remaining = 0
        self._counting = threading.Lock()
        # held until the job has ended; lighter than an Event, whose waking runs more bytecode under the
        # interpreter lock that the computing thread needs
        self._running = threading.Lock()
        self._running.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def expect(self, num_parts: int) -> None:
        self._remaining = num_parts

    def run(self, part: Callable[[], None]) -> bool:
        """Run one part; returns whether that was the last one and the job has ended."""
        try:
            if self._error is None:
                part()
        except BaseException as error:
            self._error = error
        with self._counting:
            self._remaining -= 1
            if self._remaining:
                return False
        try:
            if self._error is None:
                self._result = self._finish()
        except BaseException as error:
            self._error = error
        if self._error is not None and self._failed is not None:
            self._failed()
        self._running.release()
        return True

    def abandon(self, error: BaseException) -> None:
        """For a job that was never begun."""
        self._error = error
        self._running.release()

    def done(self) -> bool:
        return not self._running.locked()

    def result(self) -> Any:
        """Waits. Raises what a part or `finish` raised, every time it is asked. For one thread at a time."""
        self._running.acquire()
        self._running.release()
        if self._error is not None:
            raise self._error
        return self._result

    def ended_well(self) -> bool:
        return self.done() and self._error is None


class ReadPool:
    """Threads that run the parts of jobs, oldest job first.

    A caller only appends to queues, one step that an interrupt (Ctrl-C) cannot cut in half; if it falls between two
    of them, `drain` makes up for the second. All other bookkeeping is done by the threads.
    """

    def __init__(self, num_threads: int) -> None:
        self._jobs: deque[ReadJob] = deque()
        self._parts: deque[_Part] = deque()
        self._num_begun = 0
        self._drained: deque[_Drained] = deque()
        self._lock = threading.Lock()
        self._wake: SimpleQueue[bool] = SimpleQueue()
        """One entry wakes one thread: True to look for work, False to end."""
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._work, name=f"pregate-reader-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, jobs: Sequence[ReadJob]) -> None:
        if self._stopping:
            raise MoverClosedError(CLOSED)
        self._jobs.extend(jobs)
        for _ in self._threads[: len(jobs)]:
            self._wake.put(True)

    def drain(self) -> None:
        """Wait until every job submitted so far has ended, well or not."""
        if self._stopping:
            return
        drained = _Drained()
        self._drained.append(drained)
        for _ in self._threads:
            self._wake.put(True)
        drained.ended.acquire()

    def close(self) -> None:
        """Wait for every job and end the threads; may be called again, also after an interrupted call."""
        self.drain()
        self._stopping = True
        for _ in self._threads:
            self._wake.put(False)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        while self._wake.get():
            # without asking again while there is work: each wait costs a turn of the interpreter lock
            while (part := self._next_part()) is not None:
                if part.job.run(part.run):
                    with self._lock:
                        self._num_begun -= 1
            # a thread that waits must not keep the last slab's memory alive
            del part

    def _next_part(self) -> _Part | None:
        with self._lock:
            if not self._parts:
                self._begin_job()
            if self._parts:
                if len(self._parts) > 1:
                    self._wake.put(True)
                return self._parts.popleft()
            if not (self._jobs or self._num_begun):
                while self._drained:
                    self._drained.popleft().ended.release()
            return None

    def _begin_job(self) -> None:
        """Begin the oldest job, if it can begin."""
        while self._jobs:
            job = self._jobs[0]
            try:
                runs = job.begin()
            except BaseException as error:
                self._jobs.popleft()
                job.abandon(error)
                continue
            if runs is not None:
                self._jobs.popleft()
                self._num_begun += 1
                job.expect(len(runs))
                self._parts.extend(_Part(job, run) for run in runs)
            return


class _Part(NamedTuple):
    job: ReadJob
    run: Callable[[], None]


class _Drained:
    """`ended` is released when all jobs submitted before have ended."""

    def __init__(self) -> None:
        self.ended = threading.Lock()
        self.ended.acquire()
