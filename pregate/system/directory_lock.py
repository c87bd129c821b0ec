"""One command at a time works in a directory, and whether a command may write there at all.

Knows locks; knows nothing about what lies in the directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pregate.config import UsageError
from pregate.system.durable import FULL, make_directory

_locked: dict[Path, int] = {}


def hold(directory: Path, setting: str) -> None:
    """Make `directory`, and keep every other process out of it until `let_go`, or until this one ends, however it ends.

    Raises `UsageError` where another process works in it or it cannot be written; `setting` names another one.
    """
    refuse_unwritable(directory, setting)
    with refusing_unwritable(directory, setting):
        make_directory(directory)
        _lock(directory, setting)


def is_held(directory: Path) -> bool:
    return directory.resolve() in _locked


def let_go(directory: Path) -> None:
    """Let others work in a directory that this process has held."""
    handle = _locked.pop(directory.resolve(), None)
    if handle is not None:
        os.close(handle)


@contextmanager
def held(directory: Path, setting: str) -> Iterator[None]:
    """Hold a directory for as long as the work lasts. Raises `UsageError` as `hold` does."""
    hold(directory, setting)
    try:
        yield
    finally:
        let_go(directory)


def refuse_unwritable(directory: Path, setting: str) -> None:
    """Raises `UsageError` where nothing can be written to `directory`, or it cannot be made."""
    place = next((place for place in (directory, *directory.absolute().parents) if place.exists()), directory)
    if not place.is_dir():
        reason = errno.ENOTDIR
    elif not os.access(place, os.W_OK | os.X_OK):
        reason = errno.EACCES
    else:
        return
    with refusing_unwritable(directory, setting):
        raise OSError(reason, os.strerror(reason))


@contextmanager
def refusing_unwritable(directory: Path, setting: str) -> Iterator[None]:
    """Raises `UsageError` in place of an `OSError`."""
    try:
        yield
    except OSError as error:
        way = "make room" if error.errno in FULL else f"choose another {setting}=DIR"
        raise UsageError(f"{directory} cannot be written ({error.strerror}): {way}.") from error


def _after_fork() -> None:
    """In a forked process: a loader's worker that outlives its killed parent must not keep the directory locked."""
    while _locked:
        os.close(_locked.popitem()[1])


os.register_at_fork(after_in_child=_after_fork)


def _lock(directory: Path, setting: str) -> None:
    place = directory.resolve()
    if place in _locked:
        return
    handle = os.open(place, os.O_RDONLY)
    if not try_lock(handle):
        os.close(handle)
        raise UsageError(
            f"Another process works in {directory}: wait for its end, or choose another {setting}=DIR (a launcher "
            "starts several processes of one run, see the README)."
        )
    _locked[place] = handle


def try_lock(opened: int) -> bool:
    """Lock an open file or folder against other processes, without waiting. Whether none has it: also where the file
    system has no locks."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
