"""Reads that the Linux kernel carries out by itself: as much of io_uring as reading into registered memory takes.

Reads cost the calling thread one short system call together; no thread of this process takes part in them, so neither
the interpreter lock nor a core is taken from the computation. Memory is registered once: its pages are pinned then, not
at every read. Knows rings, file descriptors and addresses; knows nothing about slabs.

The interface is the kernel's own (`man io_uring`, `linux/io_uring.h`); the entries of both queues lie in memory shared
with it. Only where loads and stores keep their order (x86-64) can Python share that memory without barriers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
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
_REGISTER_BUFFERS, _UNREGISTER_BUFFERS = 0, 1
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
    """Where the fields of one queue lie in its memory. Both begin alike; the seventh of the submissions is the array of
    entry numbers, the sixth of the completions is where those lie."""

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
    between two lines of Python cannot falsify it: `settle` waits for all of them whatever the caller believes.
    """

    def __init__(self, num_entries: int, memory: Sequence[tuple[int, int]], owner: object = None) -> None:
        """`memory`: (address, length) of each piece, at most `MOST_REGISTERED` bytes long. `owner`: what must not be
        freed while the kernel may write there.

        Raises `RingUnavailableError`.
        """
        self._owner, self._process = owner, os.getpid()
        self._file: io.FileIO | None = None
        self._sq = self._cq = memoryview(b"")
        self._mapped: list[mmap.mmap] = []
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            raise RingUnavailableError(errno.ENOSYS, "io_uring is used on Linux on x86-64 only")
        self._libc = ctypes.CDLL(None, use_errno=True)
        parameters = _Parameters()
        try:
            self._file = io.FileIO(self._call(_SETUP, num_entries, ctypes.byref(parameters)))
            self._map(self._file.fileno(), parameters)
            self._register(memory)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError) or isinstance(error, RingUnavailableError):
                raise
            refused = error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS)
            profile = "the system refuses io_uring to this process (a container's profile often does)"
            raise RingUnavailableError(error.errno, profile if refused else f"io_uring: {error.strerror}") from error

    def _map(self, file: int, parameters: _Parameters) -> None:
        self._num_entries = parameters.submissions
        sq, cq = parameters.submission, parameters.completion
        sizes = {
            _AT_ENTRIES: self._num_entries * _ENTRY.size,
            _AT_SUBMISSIONS: sq.seventh + 4 * self._num_entries,
            _AT_COMPLETIONS: cq.sixth + _COMPLETION.size * parameters.completions,
        }
        for offset, size in sizes.items():
            self._mapped.append(mmap.mmap(file, size, offset=offset))
        self._entries, self._sq_memory, self._cq_memory = self._mapped
        self._sq, self._cq = memoryview(self._sq_memory).cast("I"), memoryview(self._cq_memory).cast("I")
        self._sq_head, self._sq_tail, self._array = sq.head // 4, sq.tail // 4, sq.seventh // 4
        self._cq_head, self._cq_tail, self._cqes = cq.head // 4, cq.tail // 4, cq.sixth
        self._cq_mask = parameters.completions - 1

    def _register(self, memory: Sequence[tuple[int, int]]) -> None:
        pieces = (_Piece * len(memory))(*memory)
        try:
            self._call(_REGISTER, self._number, _REGISTER_BUFFERS, ctypes.byref(pieces), len(memory))
        except OSError as error:
            size = sum(length for _, length in memory)
            raise RingUnavailableError(
                error.errno, f"{size} bytes of memory cannot be pinned for io_uring: raise the limit with ulimit -l"
            ) from error

    def read(self, number: int, file: int, offset: int, address: int, length: int, piece: int) -> None:
        """Prepare to read `length` bytes at `offset` of `file` to `address`, which lies in registered `piece`; `submit`
        begins it.

        `number` comes back with the completion. At most `num_entries` reads may be under way.
        """
        self._refuse_other_processes()
        tail = self._sq[self._sq_tail]
        place = tail % self._num_entries
        _ENTRY.pack_into(
            self._entries, place * _ENTRY.size,
            _READ_FIXED, 0, 0, file, offset, address, length, 0, number, piece, 0, 0, 0, 0,
        )  # fmt: skip
        self._sq[self._array + place] = place
        self._sq[self._sq_tail] = (tail + 1) % _U32

    def submit(self) -> None:
        """Begin what has been prepared, in one system call. Raises `OSError`."""
        while prepared := (self._sq[self._sq_tail] - self._sq[self._sq_head]) % _U32:
            try:
                self._call(_ENTER, self._number, prepared, 0, 0, None, 0)
            except InterruptedError:
                continue

    def completed(self) -> list[tuple[int, int]]:
        """(number, bytes read or minus an errno) of what has ended since the last call. Asks the kernel nothing."""
        self._refuse_other_processes()
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
        """Wait until something has ended that `completed` has not given yet; something must be under way."""
        while self._cq[self._cq_head] == self._cq[self._cq_tail]:
            try:
                self._call(_ENTER, self._number, 0, 1, _GET_EVENTS, None, 0)
            except InterruptedError:
                continue

    def settle(self) -> None:
        """Wait until nothing is under way, and forget what has ended. Nothing happens in a forked process, whose reads
        these are not."""
        if not self._sq or os.getpid() != self._process:
            return
        # what was prepared and never handed over is taken back
        self._sq[self._sq_tail] = self._sq[self._sq_head]
        # looked at once a turn: a read may end between two looks
        while (tail := self._cq[self._cq_tail]) != self._sq[self._sq_head]:
            self._cq[self._cq_head] = tail
            self.wait()
        self._cq[self._cq_head] = tail

    def close(self) -> None:
        """Wait for what is under way and give everything back. May be called again, also after an interrupted call."""
        if self._file is None:
            return
        self.settle()
        if not self._file.closed and os.getpid() == self._process:
            # closing alone would give the pinned pages back some time later
            with contextlib.suppress(OSError):
                self._call(_REGISTER, self._number, _UNREGISTER_BUFFERS, None, 0)
        self._sq = self._cq = memoryview(b"")
        for memory in self._mapped:
            memory.close()
        self._file.close()
        self._owner = None

    def __del__(self) -> None:
        # an engine that was dropped unclosed would keep its slots pinned
        self.close()

    @property
    def _number(self) -> int:
        assert self._file is not None
        return self._file.fileno()

    def _refuse_other_processes(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("This engine was opened before the process forked: open one in each process.")

    def _call(self, number: int, *arguments: object) -> int:
        result = self._libc.syscall(ctypes.c_long(number), *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result
