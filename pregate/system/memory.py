"""Measured peak memory of a stretch of work: the CUDA allocator's own high-water mark, or the process's.

On a CPU-only machine the compute device is host memory, so the figure is the growth of the resident set (Linux:
VmHWM, reset through /proc/self/clear_refs). Where it cannot be measured it is None, never an estimate.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


CUDA_OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation, which torch raises as an `AcceleratorError` where it is not its allocator that asks."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the host has no memory left, and not that something else is broken."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY:
        return isinstance(error, RuntimeError)
    # the CPU's allocator has no exception of its own
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error) and "memory" in str(error)


def bytes_in_use(device: torch.device) -> int:
    """By this process now: of a GPU, what torch has allocated; else its resident set, 0 where that is not told."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS") or 0


class PeakMemory:
    """`with PeakMemory(device) as peak: …`, then `peak.num_bytes`: the most memory in use above that at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0
        self._highest = 0
        self.num_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            return_free_memory()
            self._reset = _reset_high_water_mark()
        self._baseline = bytes_in_use(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.read()

    def read(self) -> int | None:
        """The peak so far; may be read inside the block too."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            high = torch.cuda.max_memory_allocated(self._device)
        else:
            high = _status_bytes("VmHWM") if self._reset else None
        if high is not None:
            self._highest = max(self._highest, high - self._baseline)
        self.num_bytes = None if high is None else self._highest
        return self.num_bytes

    def lower_to(self, peak: int) -> None:
        """Forget what was higher than `peak`, an earlier one, once it is given back."""
        with self.left_out():
            pass
        self._highest = peak

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """For work in between that is none of what is measured: what it takes does not count once it is given back."""
        self.read()
        yield
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            return_free_memory()
            self._reset = self._reset and _reset_high_water_mark()


def free_memory(device: torch.device) -> int:
    """Memory that `device` has left: the GPU's, or the machine's within the limit of its container."""
    if device.type == "cuda":
        # torch keeps what tensors have given back, and gives it to the next ones
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - int(stat["anon"]))  # pages of files give way
    except (OSError, ValueError, KeyError):  # no such control group, or no limit
        pass
    return free


def return_free_memory() -> None:
    """Give freed heap pages back, so that later allocations count as growth."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def read_ahead(tensor: torch.Tensor) -> None:
    """Have the system read the file that a tensor is mapped from into the page cache, while the caller goes on."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - first
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_WILLNEED))


def _reset_high_water_mark() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
