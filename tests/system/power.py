"""What a power cut would leave of a directory: a model of the disk, fed by the calls that a program makes.

Contents that were not flushed are lost, the file is empty. Of the changes to the names in a directory since that was
last flushed, any first few may have reached the disk; directories are independent of each other. That is less than any
file system promises, so what survives here survives there.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, Any]
"""name -> bytes of a file, or the tree of a directory"""
CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "remove", "link")


class Disk:
    """Follows `root`; `outcomes` are the trees that a cut at one of the moments so far would have left."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outcomes: list[Tree] = []
        self._seen: set[Any] = set()
        self._names: dict[int, list[dict[str, int]]] = {}
        """directory -> its names as they were flushed, and after each change since"""
        self._contents: dict[int, bytes] = {}
        """file -> contents when they were last flushed"""
        self._open: dict[int, int] = {}
        """held open, so that no number is given twice"""
        self._look(root)
        for names in self._names.values():
            names[:] = names[-1:]
        for path in root.rglob("*"):
            if path.is_file():
                self._contents[path.stat().st_ino] = path.read_bytes()

    @contextmanager
    def watched(self) -> Iterator[Disk]:
        """All outcomes of cuts within, one for each moment before and after a call that changes or flushes names."""
        with pytest.MonkeyPatch.context() as patch:
            for call in CALLS:
                patch.setattr(os, call, self._wrapped(call, getattr(os, call)))
            yield self
        self._moment()
        for opened in self._open.values():
            os.close(opened)

    def forget(self) -> None:
        """Look at the outcomes from now on only."""
        self.outcomes.clear()
        self._seen.clear()
        self._moment()

    def _wrapped(self, call: str, real: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self._moment()
            done = real(*arguments, **options)
            if call == "fsync":
                self._flushed(arguments[0])
            self._moment()
            return done

        return wrapped

    def _flushed(self, opened: int) -> None:
        found = os.fstat(opened)
        if stat.S_ISDIR(found.st_mode):
            if found.st_ino in self._names:
                self._look(Path(f"/proc/self/fd/{opened}").readlink())
                self._names[found.st_ino] = self._names[found.st_ino][-1:]
        else:
            self._contents[found.st_ino] = Path(f"/proc/self/fd/{opened}").read_bytes()

    def _look(self, directory: Path) -> None:
        """Note the names below `directory` as they are now."""
        number = self._hold(directory)
        history = self._names.setdefault(number, [{}])
        now = {}
        for entry in os.scandir(directory):
            now[entry.name] = self._hold(Path(entry.path))
            if entry.is_dir(follow_symlinks=False):
                self._look(Path(entry.path))
        if history[-1] != now:
            history.append(now)

    def _hold(self, path: Path) -> int:
        number = path.lstat().st_ino
        if number not in self._open:
            self._open[number] = os.open(path, os.O_RDONLY)
        return number

    def _moment(self) -> None:
        self._look(self.root)
        top = self.root.stat().st_ino
        numbers = list(self._names)
        for chosen in itertools.product(*(self._names[number] for number in numbers)):
            tree = self._left(top, dict(zip(numbers, chosen, strict=True)))
            key = _key(tree)
            if key not in self._seen:
                self._seen.add(key)
                self.outcomes.append(tree)

    def _left(self, number: int, names: dict[int, dict[str, int]]) -> Tree:
        return {
            name: self._left(below, names) if below in names else self._contents.get(below, b"")
            for name, below in names[number].items()
        }


def _key(tree: Tree) -> Any:
    return tuple(sorted((name, _key(part) if isinstance(part, dict) else part) for name, part in tree.items()))


def lay(tree: Tree, place: Path) -> Path:
    """Write `tree` to the new directory `place`."""
    place.mkdir()
    for name, part in tree.items():
        if isinstance(part, dict):
            lay(part, place / name)
        else:
            (place / name).write_bytes(part)
    return place


def tree_of(directory: Path) -> Tree:
    """What lies in `directory`."""
    return {path.name: tree_of(path) if path.is_dir() else path.read_bytes() for path in directory.iterdir()}
