"""Where all expert slabs live when they are not on the compute device: host memory (`dram`) or a file (`disk`).

Knows slabs and bytes; knows nothing about slots, policies or models' arithmetic.
"""

from __future__ import annotations

import errno
import os
import threading
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.engine.storage.aligned_memory import PAGE, PageLocks, aligned_bytes, as_buffer, copy_bytes
from pregate.engine.storage.origin import LONG_CHECK, Unchanged
from pregate.engine.storage.pack import SLABS, checksum, read_index, read_slabs
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.experts import ExpertKey, ExpertSpec
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import say

CHUNK = 1 << 30


class SlabReadError(UsageError, OSError):
    """A slab could not be read from disk."""


class DamagedPackError(SlabReadError):
    """A slab on disk is not what was packed: cut short, or with other bytes."""


class Store(Protocol):
    """Where slabs are read from. The reading methods may be called from several threads."""

    layout: SlabLayout
    in_host_memory: bool
    made_from: dict[str, Any] | None
    """The `identity` of the checkpoint whose experts these are; None if that is not known."""

    def read_part(self, key: ExpertKey, slab_B: Tensor, first: int, last: int) -> None:
        """Fill bytes `first` to `last` (multiples of 4 KiB) of a page-aligned CPU slab."""
        ...

    def arrived(self, key: ExpertKey, slab_B: Tensor) -> None:
        """Told once all parts are there. Raises `DamagedPackError` if they are not what was stored."""
        ...

    def read_into(self, key: ExpertKey, slab_B: Tensor) -> None:
        """Fill a page-aligned CPU slab and check it."""
        self.read_part(key, slab_B, 0, self.layout.slab_bytes)
        self.arrived(key, slab_B)

    def slab(self, key: ExpertKey) -> Tensor | None:
        """The slab itself where it lies in (page-locked) host memory, else None."""
        ...

    def is_held(self, key: ExpertKey, slab_B: Tensor) -> bool:
        """Whether the store's slab of `key` is this CPU slab."""
        ...

    def holds(self, checkpoint: SourceCheckpoint, family: ExpertSpec) -> bool:
        """Whether the experts of a checkpoint, as slabs of this layout, are those of the store. They are read until one
        differs."""
        size = len(family.keys()) * self.layout.slab_bytes
        if size > LONG_CHECK:
            say(f"comparing the experts of {checkpoint.directory} with those that are packed.")
        return all(self.is_held(key, slab) for key, slab in read_slabs(checkpoint, family, self.layout))

    def close(self) -> None: ...


class DramStore(Store):
    """All slabs in host memory, in chunks of about 1 GiB; page-locked in place for a CUDA device.

    Registering plain memory avoids the power-of-two rounding of torch's pinned allocator. Raises `UsageError` where
    there is not that much memory, or not that much of it can be page-locked.
    """

    in_host_memory = True

    def __init__(self, checkpoint: SourceCheckpoint, family: ExpertSpec, layout: SlabLayout, page_locked: bool) -> None:
        self._chunks: list[Tensor] = []
        self._locks = PageLocks()
        self.layout = layout
        keys = family.keys()
        per_chunk = max(1, CHUNK // layout.slab_bytes)
        try:
            for first in range(0, len(keys), per_chunk):
                self._chunks.append(aligned_bytes(min(per_chunk, len(keys) - first) * layout.slab_bytes))
        except MemoryError as error:
            self._chunks.clear()
            raise UsageError(
                f"The experts need {human_bytes(len(keys) * layout.slab_bytes)} of host memory, which are not to be "
                "had: use engine.tier=disk."
            ) from error
        self._place = {key: divmod(number, per_chunk) for number, key in enumerate(keys)}
        try:
            for chunk in self._chunks if page_locked else ():
                self._locks.lock(chunk)
            with Unchanged(checkpoint) as signs:
                for key, slab in read_slabs(checkpoint, family, layout):
                    self.slab(key).copy_(slab)
            self.made_from: dict[str, Any] | None = signs.identity
        except BaseException:
            self.close()
            raise

    def slab(self, key: ExpertKey) -> Tensor:
        chunk, row = self._place[key]
        return self._chunks[chunk][row * self.layout.slab_bytes : (row + 1) * self.layout.slab_bytes]

    def read_part(self, key: ExpertKey, slab_B: Tensor, first: int, last: int) -> None:
        copy_bytes(self.slab(key)[first:last], slab_B[first:last])

    def arrived(self, key: ExpertKey, slab_B: Tensor) -> None:
        return None

    def is_held(self, key: ExpertKey, slab_B: Tensor) -> bool:
        return torch.equal(self.slab(key), slab_B)

    def close(self) -> None:
        self._locks.release()
        self._chunks.clear()

    def __del__(self) -> None:
        # memory of a store that was dropped unclosed would stay page-locked after it is freed
        self.close()


class DiskStore(Store):
    """Slabs in one file, read with O_DIRECT so that the page cache neither helps nor hides; buffered if it must.

    The first time a slab is read, its checksum is compared: a pack that was altered gives an error, not other tokens.
    """

    in_host_memory = False

    def __init__(self, pack_dir: Path, made_from: dict[str, Any] | None = None) -> None:
        self.made_from = made_from
        index = read_index(pack_dir)
        self.layout = index.layout
        self._offsets, self._checksums = index.offsets, index.checksums
        self._pack_dir = pack_dir
        self._unverified = set(index.offsets)
        self._lock = threading.Lock()
        self._file = -1
        path = pack_dir / SLABS
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            os.preadv(self._file, [as_buffer(aligned_bytes(PAGE))], 0)
            self.direct = bool(getattr(os, "O_DIRECT", 0))
        except OSError:
            self.close()
            self._file = os.open(path, os.O_RDONLY)
            self.direct = False
        if not self.direct:
            warnings.warn(f"{path}: no O_DIRECT on this file system, reads go through the page cache", stacklevel=2)

    @property
    def file(self) -> int:
        """The descriptor slabs are read from, -1 once closed; for movers that read without `read_part`."""
        return self._file

    def offset(self, key: ExpertKey) -> int:
        """Where in `file` the slab begins, in bytes."""
        return self._offsets[key]

    def slab(self, key: ExpertKey) -> None:
        return None

    def read_part(self, key: ExpertKey, slab_B: Tensor, first: int, last: int) -> None:
        """Raises `SlabReadError` for a failed read, `DamagedPackError` for one that ends early."""
        offset = self._offsets[key]
        buffer = as_buffer(slab_B)
        done = first
        while done < last:
            try:
                got = os.preadv(self._file, [buffer[done:last]], offset + done)
            except OSError as error:
                raise self.failed(key, error) from error
            if got <= 0:
                raise self.ends_inside(key)
            done += got

    def arrived(self, key: ExpertKey, slab_B: Tensor) -> None:
        with self._lock:
            if key not in self._unverified:
                return
        if checksum(slab_B) != self._checksums[key]:
            raise DamagedPackError(
                f"{self._pack_dir / SLABS} holds other bytes than were packed for {key.label}: remove "
                f"{self._pack_dir}, and the experts are packed again."
            )
        with self._lock:
            self._unverified.discard(key)

    def is_held(self, key: ExpertKey, slab_B: Tensor) -> bool:
        return checksum(slab_B) == self._checksums[key]

    def failed(self, key: ExpertKey, error: OSError) -> SlabReadError:
        """The error to raise where reading `key` gave `error`."""
        if self._file < 0:
            return SlabReadError(f"{self._pack_dir / SLABS} was closed before {key.label} was read: open it again.")
        # where direct reads must be whole blocks, what is left of a block that the file ends in is refused, not short
        if error.errno == errno.EINVAL and os.fstat(self._file).st_size < self._offsets[key] + self.layout.slab_bytes:
            return self.ends_inside(key)
        return SlabReadError(
            f"{self._pack_dir / SLABS} cannot be read at {key.label} ({error.strerror}): check the disk, or set "
            "engine.pack_dir to another."
        )

    def ends_inside(self, key: ExpertKey) -> DamagedPackError:
        """The error to raise where the file ended before `key` did."""
        return DamagedPackError(
            f"{self._pack_dir / SLABS} ends inside {key.label}: remove {self._pack_dir}, and the experts are packed "
            "again."
        )

    def verify(self) -> None:
        """Read every slab once and compare its checksum. Raises `SlabReadError`."""
        buffer = aligned_bytes(self.layout.slab_bytes)
        for key in self._offsets:
            self.read_into(key, buffer)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
