"""What Ctrl-C and the SIGTERM of a job scheduler do while a model trains: the step ends first.

Knows signals and processes; knows nothing about models. `system.stopping` says how the command ends then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from pregate.system.launcher_environment import asked, rank
from pregate.system.stopping import Termination, is_forked

ECHO_S = 1.0
"""A launcher hands Ctrl-C on to processes that the terminal has told already: within this time it is the same one."""


class Interrupts:
    """Holds the first Ctrl-C or SIGTERM back until the loop asks for it, so that a step is never torn.

    A second Ctrl-C acts at once. A second SIGTERM does not: a launcher passes on what a scheduler has sent to every
    process, and what ends a process without asking follows anyway. Outside the main thread no signal handler can be
    set, and both keep their usual effect.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._presses = 0
        self._pressed_s = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    @property
    def pending(self) -> bool:
        return self.first is not None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
            # torch's handler raises wherever the loop is once a loader's worker has died, as these do when a signal
            # goes to all processes; without it the loader tells when it is next asked for a batch
            self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            told = isinstance(handler, Termination) and self.first == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if told else handler or signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if is_forked(self._process, number):
            return
        if number == signal.SIGINT:
            echo = asked()[1] > 1 and self._presses and time.monotonic() - self._pressed_s < ECHO_S
            if echo:
                return
            self._presses, self._pressed_s = self._presses + 1, time.monotonic()
        if self._presses > 1:
            raise KeyboardInterrupt
        if self.first is None:
            self.first = number
            sentence = (
                "Stopping after this step; press Ctrl-C again to stop at once."
                if number == signal.SIGINT
                else "Asked to end (SIGTERM): stopping after this step."
            )
            if rank() == 0:
                with suppress(RuntimeError):  # it came in the middle of another line
                    print(f"\n{sentence}", file=sys.stderr, flush=True)
