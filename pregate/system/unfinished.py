"""A directory that is filled in steps: an attempt that was stopped is taken up by the next one that makes the same.

It appears whole or not at all, as those of `durable.partial_beside`. A step counts once it is on the disk and recorded.
Knows files; knows nothing about what is in them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from pregate.system.console import say
from pregate.system.durable import (
    LOCK,
    PROGRESS,
    abandoned,
    clear_abandoned,
    clear_scratch,
    locked_beside,
    num_bytes,
    read_object,
    to_jsonable,
    write_json,
)


class Unfinished:
    """`folder` to fill, and `progress`, what an earlier attempt recorded; {} where there was none.

    A finished step is flushed and recorded by a thread, while the caller makes the next one.
    """

    def __init__(self, folder: Path, made_from: Any, progress: dict[str, Any]) -> None:
        self.folder, self.progress = folder, progress
        self._made_from = made_from
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def finish_step(self, flush: Callable[[], None], progress: dict[str, Any]) -> None:
        """Have `flush` bring a step to the disk and then record `progress`, once the step before is there.

        Raises what the step before raised, as `settle` does for the last one.
        """
        self.settle()

        def finish() -> None:
            flush()
            write_json(self.folder / PROGRESS, {"made_from": self._made_from, "progress": progress})

        self._last = self._thread.submit(finish)

    def settle(self) -> None:
        """Return once every step so far is on the disk."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def forget(self) -> None:
        """Nothing that is finished is of use to another attempt."""
        self._thread.shutdown()
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def close(self) -> None:
        self._thread.shutdown()
        if (self.folder / PROGRESS).exists():
            say(f"what is finished lies in {self.folder}: the same command goes on there.")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def unfinished_beside(target: Path, made_from: Any) -> Iterator[Unfinished]:
    """A directory beside `target` to fill and to `put` there. If that does not come to pass, it stays as soon as one of
    its steps is recorded, and the next attempt with an equal `made_from` (plain JSON) goes on in it. Any other attempt
    removes it."""
    made_from = to_jsonable(made_from)
    with ExitStack() as stack:
        found = _taken_up(stack, target, made_from)
        clear_abandoned(target)
        folder, progress = found or (stack.enter_context(locked_beside(target)), {})
        yield stack.enter_context(closing(Unfinished(folder, made_from, progress)))


def _taken_up(stack: ExitStack, target: Path, made_from: Any) -> tuple[Path, dict[str, Any]] | None:
    """What is left of an attempt at the same, and what it recorded; locked for as long as `stack` is open."""
    left = abandoned(target)
    for folder in left:
        record = read_object(folder / PROGRESS) or {}
        progress = record.get("progress")
        if record.get("made_from") == made_from and isinstance(progress, dict) and (folder / LOCK).exists():
            stack.callback(left.close)
            clear_scratch(folder)
            say(f"what an earlier attempt has finished lies in {folder}, and is taken up.")
            return folder, progress
        if progress:
            say(f"{folder} was begun with other weights or settings: it is removed, and the work begins anew.")
    return None


def reclaimable_bytes(target: Path) -> int:
    """The size of what earlier attempts at `target` left: an attempt goes on in it or removes it."""
    return sum(num_bytes(folder) for folder in abandoned(target))
