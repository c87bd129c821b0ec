"""What a person sees while a model trains. Knows the terminal; knows nothing about models."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
