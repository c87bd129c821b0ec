"""Files and directories that a power cut leaves whole: the old one or the new one, never a part, never none.

What is written lies in memory until it is flushed, and so does the name that it was given. So the order is always
the same: write beside, flush the contents, take the place of the old by a rename, flush the folder that holds the name,
and only then let the old one go. Knows files, locks and what a full disk says; knows nothing about what is in the
files, and not torch, so that a command line is checked without it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK = ".lock"
"""Held in a directory that is being filled, for as long as the process that fills it lives."""
PROGRESS = ".progress.json"
"""What is finished of a directory that is filled in steps (`unfinished`)."""
MARKS = (LOCK, PROGRESS)
"""Files of a directory that is being filled which are no part of what it becomes."""
PARTIAL = re.compile(r"\.partial-\d+-[0-9a-f]{8}")
SCRATCH = re.compile(r"\..+\.\d+\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSALS = (*FULL, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


def flush(opened: int) -> None:
    """Return once the contents of an opened file, or the names in an opened directory, are on the disk."""
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # it cannot be flushed: a pipe, some network directories
            raise


def flush_file(path: Path) -> None:
    """Return once the contents of `path` are on the disk; of a directory, the names in it."""
    opened = os.open(path, os.O_RDONLY)
    try:
        flush(opened)
    finally:
        os.close(opened)


def write_all(opened: int, data: bytes | memoryview) -> None:
    """Write all of `data`, of which the system may take a part at a time."""
    left = memoryview(data)
    while left:
        left = left[os.write(opened, left) :]


def digest_file(digest: Any, path: Path) -> None:
    """Update a hash with the content of a file, a small part of it in memory at a time."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def flush_tree(directory: Path) -> None:
    """Return once everything below `directory` is on the disk; its own name, in its parent, is not."""
    for folder, _, files in os.walk(directory, topdown=False):
        for path in (Path(folder) / name for name in files):
            if path.is_file() and not path.is_symlink():
                flush_file(path)
        flush_file(Path(folder))


def flush_folders(directory: Path, *names: str) -> None:
    """Flush those of the folders `names` in `directory` that are there, with their own names."""
    for name in names:
        flush_tree(directory / name)
    flush_file(directory)


def make_directory(directory: Path) -> None:
    """Make `directory` and what is missing above it, to stay."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        flush_file(directory.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, to stay; a reader sees the old file or the whole new one, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush(file.fileno())
        scratch.replace(path)
        flush_file(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write each value as a line of JSON, to stay; a reader sees the old file or the whole new one, never a part."""
    write_text(path, "".join(_line(value) for value in values))


def append_line(path: Path, value: Any) -> None:
    """Add `value` to `path` as a line of JSON, to stay. A last line that an interruption tore is ended first."""
    line = _line(value).encode()
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        flush(file.fileno())


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> list[Any]:
    """The values that `write_lines` and `append_line` have written to `path`, none if there is no such file. Lines that
    an interruption tore are left out."""
    values = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):  # also of bytes that are no text
            values.append(json.loads(line))
    return values


def to_jsonable(value: Any) -> Any:
    """`value` as plain JSON values: tensors and arrays as lists or scalars, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return to_jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, to stay; a reader sees the old file or the whole new one, never a part."""
    write_text(path, json.dumps(to_jsonable(value), indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if it is not there or a power cut has spoilt it."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def partial_beside(target: Path) -> Iterator[Path]:
    """An empty directory beside `target` to fill and to `put` there; whatever happens, nothing else of it stays."""
    with locked_beside(target) as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked_beside(target: Path) -> Iterator[Path]:
    """An empty directory beside `target`, which stays as the caller leaves it.

    A lock marks it as in use. The process number in its name is not enough: the number of a killed process is used
    again, in a container on every run, and another machine may share the disk.
    """
    make_directory(target.parent)
    with ExitStack() as stack:
        yield _locked(stack, target)


def _locked(stack: ExitStack, target: Path) -> Path:
    """Hidden until it is locked: what is seen and not locked has been abandoned. Who clears up takes a hidden one for
    abandoned too, since a kill can come that early; then it is made again under another name."""
    while True:
        folder = target.with_name(f"{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
        hidden = folder.with_name(f".{folder.name}")
        with ExitStack() as attempt:
            attempt.callback(shutil.rmtree, hidden, ignore_errors=True)
            hidden.mkdir()
            try:
                lock = attempt.enter_context((hidden / LOCK).open("w"))
                with suppress(OSError):  # a file system without locks: it would never look abandoned, and stays
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                flush_file(hidden)
                hidden.rename(folder)
            except FileNotFoundError:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            stack.push(attempt.pop_all())
            return folder


def put(folder: Path, target: Path) -> None:
    """Give the finished `folder` of `partial_beside` its name. Raises `OSError` if something took it meanwhile."""
    flush_tree(folder)
    folder.rename(target)
    for name in MARKS:  # only now: unlocked, it would have looked abandoned
        (target / name).unlink(missing_ok=True)
    flush_file(target)
    flush_file(target.parent)


def abandoned(target: Path) -> Generator[Path]:
    """What processes that were killed left of earlier attempts at `target`, each locked until the next is asked for;
    one that a process still fills is none."""
    if not target.parent.is_dir():
        return
    for hidden in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        if PARTIAL.fullmatch(hidden.name.removeprefix(f".{target.name}")):
            with suppress(OSError):
                hidden.rename(hidden.with_name(hidden.name[1:]))
    for folder in sorted(target.parent.iterdir()):
        if folder.name.startswith(target.name) and PARTIAL.fullmatch(folder.name.removeprefix(target.name)):
            with suppress(OSError):
                if (folder / LOCK).exists():
                    with (folder / LOCK).open("r+") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        yield folder
                else:  # it was killed while it cleaned up
                    yield folder


def clear_abandoned(target: Path) -> None:
    """Remove what processes that were killed left of earlier attempts at `target`; one that still writes holds on."""
    for folder in abandoned(target):
        with suppress(OSError):
            (folder / PROGRESS).unlink(missing_ok=True)  # first: a half removed one is not taken up
        shutil.rmtree(folder, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that it holds, as far as that can be done."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def discard(directory: Path) -> None:
    """Remove a directory so that nobody who comes after a kill takes what is left of it for the whole."""
    gone = directory.with_name(f".{directory.name}.gone")
    remove(gone)
    if directory.exists():
        directory.rename(gone)
        remove(gone)


def clear_scratch(directory: Path) -> None:
    """Remove what `write_text` left in `directory` when it was killed. Nobody else may be writing there."""
    for path in directory.glob(".*.tmp"):
        if SCRATCH.fullmatch(path.name):
            remove(path)


def free_bytes(place: Path) -> int:
    """What is free on the disk that `place` lies on, or will."""
    return shutil.disk_usage(next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir())).free


def num_bytes(directory: Path) -> int:
    """The size of all files below `directory`; 0 if it is not there."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def refusal(error: BaseException) -> str | None:
    """Why the disk did not take what was written, if that is what `error` is about.

    Writers in Rust, those of safetensors and tokenizers, raise exceptions of their own that name the number in words.
    """
    number = error.errno if isinstance(error, OSError) else None
    named = re.search(r"\(os error (\d+)\)", str(error))
    if number is None and named:
        number = int(named.group(1))
    return os.strerror(number) if number in REFUSALS else None
