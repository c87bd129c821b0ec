"""Files that the page cache has forgotten, or holds, so that a read from a folder is known to be cold or warm."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def drop_page_cache(folder: Path) -> None:
    """Have the page cache forget every file of `folder`, where the system can be asked to. What is not yet written
    to the disk, or is mapped, stays: see `cached_share`."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in _files(folder):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fill_page_cache(folder: Path) -> None:
    """Read every file of `folder` once."""
    buffer = bytearray(8 << 20)
    for file in _files(folder):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def cached_share(folder: Path) -> float | None:
    """The share of the bytes of `folder` that the page cache holds; None where the system does not say."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        cached, total = 0, 0
        for file in _files(folder):
            pages = _resident_pages(libc, file)
            cached += sum(pages)
            total += len(pages)
    except (OSError, AttributeError, TypeError):
        return None
    return cached / total if total else None


def _resident_pages(libc: Any, file: Path) -> bytes:
    """One byte a page of `file`, 1 if it is in memory (mincore)."""
    size = file.stat().st_size
    if size == 0:
        return b""
    mapped = np.memmap(file, np.uint8, "r")
    found = ctypes.create_string_buffer(-(-size // os.sysconf("SC_PAGE_SIZE")))
    if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(size), found) != 0:
        raise OSError(ctypes.get_errno(), f"the pages of {file} cannot be counted")
    return bytes(byte & 1 for byte in found.raw)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.is_file() and not file.is_symlink())
