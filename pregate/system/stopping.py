"""How a command ends when it is asked to: Ctrl-C, or SIGTERM, which schedulers send when the time is up.

Knows signals and exit codes; knows nothing about the work, and not torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pregate.system.process_exit import may_tell

GOES_ON = "a training or a benchmark goes on with the same command and resume=true."
"""What is said where the work itself says nothing: see `going_on`."""


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. Whatever cleans up behind Ctrl-C does so here as well."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a clean end: one sentence, and the status 130 or 143 that shells know them by.

    SIGTERM keeps its handler outside the main thread, and where one is set already.
    """
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, Termination())
    try:
        yield
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        if may_tell():
            told = next(iter(getattr(stop, "__notes__", ())), GOES_ON)
            print(f"pregate: {'terminated' if terminated else 'stopped'}; {told}", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def going_on(how: Callable[[], str | None]) -> Iterator[None]:
    """For work that goes on in another way than `GOES_ON` says: `how` is asked when it is stopped inside, and gives the
    sentence, or None where there is nothing to go on from."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if (sentence := how()) is not None:
            stop.add_note(sentence)
        raise


class Termination:
    """The handler of SIGTERM: raises `Terminated` once, as a launcher passes on what has reached everyone already."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not is_forked(self.process, number):
            signal.signal(number, signal.SIG_IGN)
            raise Terminated


def is_forked(process: int, number: int) -> bool:
    """Whether this is not `process` but one that was forked from it: SIGTERM then does there what it would without a
    handler, and Ctrl-C nothing, as the parent ends it."""
    if os.getpid() == process:
        return False
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return True
