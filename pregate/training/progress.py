"""What a person sees while a model trains, and what Ctrl-C and a scheduler's SIGTERM do.

Knows the terminal and signals; knows nothing about models.
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

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pregate.system.launch import asked, rank
from pregate.system.stopping import Termination, is_forked

ECHO_S = 1.0
"""A launcher hands Ctrl-C on to processes that the terminal has told already: within this time it is the same one."""
LINES_EVERY = 10
"""Without a terminal, one line is printed for this many logged steps."""


class Progress:
    """A progress bar on a terminal, a plain line now and then elsewhere, nothing at all where `shown` is false."""

    def __init__(self, stage: str, first_step: int, steps: int, log_every: int, shown: bool) -> None:
        self.stage, self.first_step, self.steps = stage, first_step, steps
        self.line_every = log_every * LINES_EVERY
        self.shown = shown
        self.bar = self._bar() if shown and sys.stderr.isatty() else None
        self.started = time.perf_counter()

    def _bar(self) -> Any:
        bar = rich.progress.Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s "),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        bar.add_task(self.stage, total=self.steps, completed=self.first_step, loss=float("nan"), rate=0.0)
        return bar

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show that `step` steps are done, with the loss of the last one and the speed."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, loss=loss, rate=tokens_per_second)
        elif self.shown and (step % self.line_every == 0 or step == self.steps):
            done = max(1, step - self.first_step)
            left = (time.perf_counter() - self.started) / done * (self.steps - step)
            self.note(
                f"step {step}/{self.steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {_clock(left)} left"
            )

    def note(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.console.print(f"{self.stage}: {text}", highlight=False)
        elif self.shown:
            print(f"{self.stage}: {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


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
