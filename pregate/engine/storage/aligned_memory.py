"""Host memory for slabs: page-aligned, and page-locked where a GPU copies from it. Knows bytes and addresses only."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.system.byte_sizes import human_bytes
from pregate.system.memory import is_out_of_memory

PAGE = 4096
"""O_DIRECT wants addresses, offsets and lengths in multiples of the logical block, at most a page."""
HUGE_PAGE = 2 << 20
HOST_REGISTER_MAPPED = 2
"""cudaHostRegisterMapped. Devices with unified addressing map registered memory without it; it is promised with it."""
CANNOT_LOCK = (2, 304, 801)
"""cudaErrorMemoryAllocation, cudaErrorOperatingSystem, cudaErrorNotSupported: the system locks no more, or none."""


def round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def aligned_bytes(size: int) -> Tensor:
    """A uint8 tensor of `size` bytes on the CPU that starts at a page boundary; of a huge page, where the system has
    those and `size` is one or more. Large matrices are read with fewer address translations then, and a read past
    the page cache pins fewer pages. Raises `MemoryError`."""
    huge = getattr(mmap, "MADV_HUGEPAGE", None)
    try:
        if size < HUGE_PAGE or huge is None:
            raw, unit = torch.empty(size + PAGE, dtype=torch.uint8), PAGE
        else:
            # private: the kernel gives shared memory no huge pages by default
            memory, unit = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), HUGE_PAGE
            with contextlib.suppress(OSError):  # a kernel without them
                memory.madvise(huge)
            raw = torch.frombuffer(memory, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:  # mmap and torch
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"There are no {human_bytes(size)} of host memory left.") from error
    start = -raw.data_ptr() % unit
    # a tensor of its own, not a view: of a view, torch asks whether what it is a view of is page-locked
    return torch.from_numpy(raw.numpy()[start : start + size])


def as_buffer(slab_B: Tensor) -> memoryview:
    """The bytes of a CPU uint8 tensor, for reading and writing files."""
    return memoryview(cast(Any, slab_B.numpy()))


def copy_bytes(source: Tensor, target: Tensor) -> None:
    """Between CPU tensors, on this thread alone: torch would start a team of threads beside the one that computes."""
    np.copyto(target.numpy(), source.numpy())


def page_lock(memory: Tensor) -> None:
    """Page-lock `memory` in place for CUDA copies, and map it for kernels that read it themselves. Raises
    `UsageError` if the system allows no more of it, `RuntimeError` for any other fault."""
    register = cast(Any, torch.cuda.cudart()).cudaHostRegister
    status = int(register(memory.data_ptr(), memory.numel(), HOST_REGISTER_MAPPED))
    if status != 0:
        _forget_last_error()
    if status not in (0, *CANNOT_LOCK):
        raise RuntimeError(f"Page-locking {human_bytes(memory.numel())} of host memory ended in CUDA error {status}.")
    if status != 0:
        raise UsageError(
            f"{human_bytes(memory.numel())} of host memory could not be page-locked (CUDA error {status}): raise the "
            "limit with ulimit -l, or use engine.tier=disk."
        )


def page_unlock(memory: Tensor) -> None:
    if int(cast(Any, torch.cuda.cudart()).cudaHostUnregister(memory.data_ptr())) != 0:
        _forget_last_error()


def _forget_last_error() -> None:
    """CUDA keeps the error of a call that failed, and torch raises it behind the next kernel, which has no part in it.
    Here that kernel is one that nobody needs."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda").add_(1)


class PageLocks:
    """Memory that is page-locked until `release`. What a forked process inherits of it is its parent's."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []
        self._process = os.getpid()

    def lock(self, memory: Tensor) -> None:
        """See `page_lock`."""
        page_lock(memory)
        self._memory.append(memory)

    def are_ours(self) -> bool:
        """Whether there is anything to unlock. A process that ends leaves no memory locked."""
        return bool(self._memory) and os.getpid() == self._process and not sys.is_finalizing()

    def release(self) -> None:
        """May be called again, also after an interrupted call."""
        while self.are_ours():
            page_unlock(self._memory[-1])
            self._memory.pop()
        self._memory.clear()
