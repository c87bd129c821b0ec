"""What the user sees of a command while it works: notices, tables, progress bars.

Knows the terminal; knows nothing about what the notices say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TimeRemainingColumn
from transformers.utils import logging

from pregate.system.launcher_environment import rank


def say(sentence: str) -> None:
    """Print a notice to the user, on standard error, because results go to standard output. Only rank 0 prints."""
    if rank() == 0:
        print(f"pregate: {sentence}", file=sys.stderr)


@lru_cache
def say_once(sentence: str) -> None:
    """`say`, for what several parts of one command find: a command opens a checkpoint several times."""
    say(sentence)


def first_of(names: Sequence[str], most: int = 1, separator: str = ", ") -> str:
    """The first `most` of `names` and how many more there are: "a, b and 3 more"."""
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def console() -> Console:
    """Standard output for rich tables; 100 columns where it is no terminal, since rich would assume 80."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


@contextmanager
def silent_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which would draw over the run's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def reason_of(error: BaseException) -> str:
    """What an error of another library says, on one line and without its full stop, for a sentence of ours."""
    return " ".join(str(error).split()).rstrip(".")


@contextmanager
def progress(what: str, total: int, counted: ProgressColumn) -> Iterator[Callable[[int], None]]:
    """A progress bar with the time left on a terminal, nothing elsewhere. Yields a function that advances it.
    `counted`: the column that shows how much is done."""
    bar = Progress(what, BarColumn(), counted, TimeRemainingColumn(), console=Console(stderr=True))
    bar.disable = not sys.stderr.isatty()
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
