"""Reads that the Linux kernel carries out by itself: as much of io_uring as reading into registered memory takes.

A read costs the calling thread one short system call; no thread of this process takes part in it, so neither the
interpreter lock nor a core is taken from the computation. Memory is registered once: its pages are pinned then, not
at every read. Knows rings, file descriptors and addresses; knows nothing about slabs.

The interface is the kernel's own (`man io_uring`, `linux/io_uring.h`); the entries of both queues lie in memory shared
with it. Only where loads and stores keep their order (x86-64) can Python share that memory without barriers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys
from collections.abc import Sequence

_SETUP, _ENTER, _REGISTER = 425, 426, 427
"""System call numbers."""
_READ_FIXED = 4
_GET_EVENTS = 1
_REGISTER_BUFFERS = 0
_AT_SUBMISSIONS, _AT_COMPLETIONS, _AT_ENTRIES = 0, 0x8000000, 0x10000000
"""Offsets at which the ring's memory is mapped."""
_ENTRY = struct.Struct("<BBHiQQIIQHHiQQ")
_COMPLETION = struct.Struct("<QiI")
_U32 = 1 << 32

MOST_REGISTERED = 1 << 30
"""Bytes of one registered piece of memory, by the kernel's rule."""


class RingUnavailableError(OSError):
    """This system offers no io_uring, or not to this process; the message says which and what would help."""


class _Offsets(ctypes.Structure):
    """Where the fields of one queue lie in its memory. `last`: the array of entry numbers, or the completions."""

    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("head", "tail", "mask", "entries", "fifth", "sixth", "seventh", "eighth", "low", "high")
    ]


class _Parameters(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("submissions", "completions", "flags", "cpu", "idle", "features")),
        ("other", ctypes.c_uint32 * 4),
        ("submission", _Offsets),
        ("completion", _Offsets),
    ]


class _Piece(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class Ring:
    """One io_uring with registered memory. Used by one thread at a time.

    How many reads are under way is read off the memory shared with the kernel, never counted here, so an interrupt
    between two lines of Python cannot falsify it.
    """

    def __init__(self, num_entries: int, memory: Sequence[tuple[int, int]]) -> None:
        """`memory`: (address, length) of each piece, at most `MOST_REGISTERED` bytes long; it must outlive the ring.

        Raises `RingUnavailableError`.
        """
        self._file = -1
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            raise RingUnavailableError(errno.ENOSYS, "io_uring is used on Linux on x86-64 only")
        self._libc = ctypes.CDLL(None, use_errno=True)
        parameters = _Parameters()
        try:
            self._file = self._call(_SETUP, num_entries, ctypes.byref(parameters))
        except OSError as error:
            raise RingUnavailableError(
                error.errno, "the system refuses io_uring to this process (a container's profile often does)"
            ) from error
        try:
            self._map(parameters)
            self._register(memory)
        except BaseException:
            self.close()
            raise

    def _map(self, parameters: _Parameters) -> None:
        self._num_entries = parameters.submissions
        sq, cq = parameters.submission, parameters.completion
        self._entries = mmap.mmap(self._file, self._num_entries * _ENTRY.size, offset=_AT_ENTRIES)
        self._sq_memory = mmap.mmap(self._file, sq.seventh + 4 * self._num_entries, offset=_AT_SUBMISSIONS)
        self._cq_memory = mmap.mmap(
            self._file, cq.sixth + _COMPLETION.size * parameters.completions, offset=_AT_COMPLETIONS
        )
        self._sq, self._cq = memoryview(self._sq_memory).cast("I"), memoryview(self._cq_memory).cast("I")
        self._sq_head, self._sq_tail, self._array = sq.head // 4, sq.tail // 4, sq.seventh // 4
        self._cq_head, self._cq_tail, self._cqes = cq.head // 4, cq.tail // 4, cq.sixth
        self._cq_mask = parameters.completions - 1

    def _register(self, memory: Sequence[tuple[int, int]]) -> None:
        pieces = (_Piece * len(memory))(*memory)
        try:
            self._call(_REGISTER, self._file, _REGISTER_BUFFERS, ctypes.byref(pieces), len(memory))
        except OSError as error:
            size = sum(length for _, length in memory)
            raise RingUnavailableError(
                error.errno, f"{size} bytes of memory cannot be pinned for io_uring: raise the limit with ulimit -l"
            ) from error

    def read(self, number: int, file: int, offset: int, address: int, length: int, piece: int) -> None:
        """Begin to read `length` bytes at `offset` of `file` to `address`, which lies in registered `piece`.

        `number` comes back with the completion. At most `num_entries` reads may be under way. Raises `OSError`.
        """
        tail = self._sq[self._sq_tail]
        place = tail % self._num_entries
        _ENTRY.pack_into(
            self._entries, place * _ENTRY.size,
            _READ_FIXED, 0, 0, file, offset, address, length, 0, number, piece, 0, 0, 0, 0,
        )  # fmt: skip
        self._sq[self._array + place] = place
        self._sq[self._sq_tail] = (tail + 1) % _U32
        while self._sq[self._sq_head] == tail:
            try:
                self._call(_ENTER, self._file, 1, 0, 0, None, 0)
            except InterruptedError:
                continue

    def completed(self) -> list[tuple[int, int]]:
        """(number, bytes read or minus an errno) of what has ended since the last call. Asks the kernel nothing."""
        head, tail = self._cq[self._cq_head], self._cq[self._cq_tail]
        if head == tail:
            return []
        found = []
        while head != tail:
            number, result, _ = _COMPLETION.unpack_from(
                self._cq_memory, self._cqes + (head & self._cq_mask) * _COMPLETION.size
            )
            found.append((number, result))
            head = (head + 1) % _U32
        self._cq[self._cq_head] = head
        return found

    def wait(self) -> None:
        """Wait until something has ended that `completed` has not told yet; something must be under way."""
        while self._cq[self._cq_head] == self._cq[self._cq_tail]:
            try:
                self._call(_ENTER, self._file, 0, 1, _GET_EVENTS, None, 0)
            except InterruptedError:
                continue

    def settle(self) -> None:
        """Wait until nothing is under way, and forget what has ended."""
        if self._file < 0:
            return
        # what was prepared and never handed over is taken back
        self._sq[self._sq_tail] = self._sq[self._sq_head]
        while self._cq[self._cq_tail] != self._sq[self._sq_head]:
            self._cq[self._cq_head] = self._cq[self._cq_tail]
            self.wait()
        self._cq[self._cq_head] = self._cq[self._cq_tail]

    def close(self) -> None:
        """May be called again."""
        file, self._file = self._file, -1
        if file < 0:
            return
        os.close(file)  # what is under way ends into pages that the kernel keeps pinned until then
        for name in ("_sq", "_cq"):
            if hasattr(self, name):
                getattr(self, name).release()
        for name in ("_entries", "_sq_memory", "_cq_memory"):
            if hasattr(self, name):
                getattr(self, name).close()

    def __del__(self) -> None:
        # an engine that was dropped unclosed would keep its slots pinned
        self.close()

    def _call(self, number: int, *arguments: object) -> int:
        result = self._libc.syscall(ctypes.c_long(number), *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result
