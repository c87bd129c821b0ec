"""Files that the page cache has forgotten, or holds, so that a read from a folder is known to be cold or warm."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
    size, prot_read, map_shared = file.stat().st_size, 1, 1
    if size == 0:
        return b""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, prot_read, map_shared, descriptor, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"{file} cannot be mapped")
        try:
            found = ctypes.create_string_buffer(-(-size // os.sysconf("SC_PAGE_SIZE")))
            if libc.mincore(address, size, found) != 0:
                raise OSError(ctypes.get_errno(), f"the pages of {file} cannot be counted")
        finally:
            libc.munmap(address, size)
    finally:
        os.close(descriptor)
    return bytes(byte & 1 for byte in found.raw)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.is_file() and not file.is_symlink())
