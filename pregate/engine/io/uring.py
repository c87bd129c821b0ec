"""The mover for a CPU where the kernel reads by itself, straight from the file into slots in host memory.

Reads are handed over and their ends noticed whenever the engine asks for something, by the thread that computes; it
does nothing in between. Knows slots and stores on disk; knows nothing about which slab should move.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence

from torch import Tensor

from pregate.engine.io.base import CLOSED, Move, MoverClosedError, Transfer
from pregate.engine.io.read_pool import PART_BYTES
from pregate.engine.io.ring import MOST_REGISTERED, Ring, RingUnavailableError
from pregate.engine.storage.store import DiskStore
from pregate.engine.trace import Counters, Trace
from pregate.models.experts import ExpertKey

MOST_READS = 64
"""At most so many at a time: a larger ring gains nothing."""
AGAIN = (-errno.EINTR, -errno.EAGAIN)


def reads_in_flight(io_threads: int, slots_NB: Tensor) -> int:
    """How many slabs the kernel reads at a time: `io_threads`, and of small ones more, so that as many bytes are under
    way as with threads. The end of a read is noticed when the engine asks, and the disk must have work until then."""
    num_slots, slab_bytes = slots_NB.shape
    return max(io_threads, min(num_slots, io_threads * PART_BYTES // slab_bytes, MOST_READS))


class _SlotRead:
    """One slab on its way into its slot."""

    def __init__(self, mover: UringMover, key: ExpertKey, slot_B: Tensor) -> None:
        self.key, self.slot_B = key, slot_B
        self.num_read, self.ended = 0, False
        self.error: BaseException | None = None
        self.begun_at: float | None = None
        self._mover, self._checked = mover, False

    def done(self) -> bool:
        if not self.ended:
            self._mover.advance()
        return self.ended

    def wait(self) -> None:
        self._mover.advance()
        while not self.ended:
            self._mover.await_one()
        if self.error is None and not self._checked:
            try:
                self._mover.store.arrived(self.key, self.slot_B)
            except BaseException as error:
                self.error = error
            self._checked = True
        if self.error is not None:
            raise self.error


def _block(read: _SlotRead) -> tuple[str, int]:
    return read.key.stack, read.key.block


class UringMover:
    """Several reads in flight, in the order they were asked for and of one block at a time: the next block's would
    share the link with those that are waited for, and some disks report no read while others still run. A trace sees
    a read end when the engine notices it, at its next call after the end."""

    host_bytes, reader = 0, "io_uring"

    def __init__(self, store: DiskStore, trace: Trace, counters: Counters, num_reads: int, slots_NB: Tensor) -> None:
        """`num_reads`: slabs in flight at most. `slots_NB` (slots, bytes) is pinned until `close`.

        Raises `RingUnavailableError`.
        """
        self.store = store
        self._trace, self._counters, self._num_reads = trace, counters, num_reads
        num_slots, self._slab_bytes = slots_NB.shape
        self._slots_in_piece = MOST_REGISTERED // self._slab_bytes
        if self._slots_in_piece == 0:
            raise RingUnavailableError(errno.EFBIG, "a slab is larger than a piece of memory that io_uring registers")
        self._address = slots_NB.data_ptr()
        pieces = []
        for first in range(0, num_slots, self._slots_in_piece):
            num_bytes = min(self._slots_in_piece, num_slots - first) * self._slab_bytes
            pieces.append((self._address + first * self._slab_bytes, num_bytes))
        self._ring = Ring(num_reads, pieces, owner=slots_NB)
        self._waiting: deque[_SlotRead] = deque()
        self._reading: dict[int, _SlotRead] = {}
        self._number, self._closed = 0, False

    def start(self, moves: Sequence[Move]) -> list[Transfer]:
        if self._closed:
            raise MoverClosedError(CLOSED)
        reads = [_SlotRead(self, key, slot) for key, slot in moves]
        self._counters.bytes_moved += len(moves) * self._slab_bytes
        self._waiting.extend(reads)
        self.advance()
        return [*reads]

    def used(self, slot: Tensor) -> None:
        return None

    def advance(self) -> None:
        """Note what has ended and hand over what waits."""
        for number, result in self._ring.completed():
            self._ended(self._reading.pop(number), result)
        while self._waiting and len(self._reading) < self._num_reads:
            # all that are under way are of one block
            if self._reading and _block(next(iter(self._reading.values()))) != _block(self._waiting[0]):
                break
            self._prepare(self._waiting.popleft())
        try:
            self._ring.submit()
        except OSError as error:
            newest = next(reversed(self._reading.values()))
            raise self.store.failed(newest.key, error) from error

    def await_one(self) -> None:
        """Wait until one more of the reads under way has ended."""
        if not self._reading:
            raise MoverClosedError("A read was called off before it had begun: ask for it again.")
        self._ring.wait()
        self.advance()

    def drain(self) -> None:
        self._waiting.clear()
        self._ring.settle()
        self._reading.clear()

    def close(self) -> None:
        if not self._closed:
            self.drain()
            self._ring.close()
            self._closed = True

    def _prepare(self, read: _SlotRead) -> None:
        if read.begun_at is None:
            read.begun_at = self._trace.mark()
            self._counters.bytes_read += self._slab_bytes
        self._number += 1
        self._reading[self._number] = read
        slot = (read.slot_B.data_ptr() - self._address) // self._slab_bytes
        self._ring.read(
            self._number,
            self.store.file,
            self.store.offset(read.key) + read.num_read,
            read.slot_B.data_ptr() + read.num_read,
            self._slab_bytes - read.num_read,
            slot // self._slots_in_piece,
        )

    def _ended(self, read: _SlotRead, result: int) -> None:
        read.num_read += max(0, result)
        if result in AGAIN or (result > 0 and read.num_read < self._slab_bytes):
            self._prepare(read)
            return
        if result < 0:
            read.error = self.store.failed(read.key, OSError(-result, os.strerror(-result)))
        elif result == 0:
            read.error = self.store.ends_inside(read.key)
        elif self._trace.enabled:
            self._trace.add("transfer", read.key.label, read.begun_at, self._trace.mark())
        read.ended = True
