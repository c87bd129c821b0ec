"""What a person sees while a model trains, and what happens when he presses Ctrl-C.

Knows the terminal and signals; knows nothing about models.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from pregate.processes import asked, rank

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
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        bar = Progress(
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
    """Holds the first Ctrl-C back until the loop asks for it, so that a step is never torn; a second acts at once.

    Outside the main thread no signal handler can be set, and Ctrl-C keeps its usual effect.
    """

    def __init__(self) -> None:
        self.pending = False
        self._first_s = 0.0
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)
            self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.pending:
            if asked()[1] > 1 and time.monotonic() - self._first_s < ECHO_S:
                return
            raise KeyboardInterrupt
        self.pending, self._first_s = True, time.monotonic()
        if rank() == 0:
            print("\nStopping after this step; press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)
