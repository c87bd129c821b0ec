"""Where a device sees host memory, and page-locked memory of the driver's own making.

Registered memory may have another address on the device than on the host, so kernels are given what the driver says.
Knows addresses and the driver's few calls for them; knows nothing about slabs' contents.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.system.byte_sizes import human_bytes

DEVICE_POINTER = 3
"""CU_POINTER_ATTRIBUTE_DEVICE_POINTER: where kernels of the current context reach memory, any byte of it."""
PORTABLE, DEVICE_MAP, WRITE_COMBINED = 1, 2, 4
"""Flags of cuMemHostAlloc."""
INVALID_VALUE, OUT_OF_MEMORY = 1, 2
"""What the driver says of memory that it does not know, and where there is no more. All else is a fault of its own."""


def device_addresses(slabs: Iterable[Tensor], device: torch.device | str) -> Tensor:
    """Where `device` sees the first byte of each CPU tensor: int64, one a slab, on the device.

    For a GPU the memory must be page-locked and mapped, as `aligned_memory.page_lock` does. Raises `UsageError` if it
    is not.
    """
    device = torch.device(device)
    hosts = [slab.data_ptr() for slab in slabs]
    if device.type != "cuda":
        return torch.tensor(hosts, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes torch's context the thread's current one
        return torch.tensor([_seen_by_device(host) for host in hosts], dtype=torch.int64, device=device)


@contextmanager
def host_allocated(num_bytes: int, *, write_combined: bool) -> Iterator[Tensor]:
    """A page-locked uint8 CPU tensor from the driver, freed at the end. Write-combined pages are slow to read for
    the CPU, and may cross the link faster because no cache is asked for them. Raises `UsageError`."""
    torch.cuda.synchronize()
    place, flags = ctypes.c_void_p(), PORTABLE | DEVICE_MAP | (WRITE_COMBINED if write_combined else 0)
    status = _driver().cuMemHostAlloc(ctypes.byref(place), ctypes.c_size_t(num_bytes), flags)
    if status not in (0, OUT_OF_MEMORY):
        raise RuntimeError(f"Asking for {human_bytes(num_bytes)} of page-locked memory ended in CUDA error {status}.")
    if status != 0 or place.value is None:
        raise UsageError(f"{human_bytes(num_bytes)} of page-locked host memory cannot be had (CUDA error {status}).")
    try:
        yield torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(place.value), dtype=torch.uint8)
    finally:
        torch.cuda.synchronize()  # nothing may still read it
        _driver().cuMemFreeHost(place)


def _seen_by_device(host: int) -> int:
    found = ctypes.c_uint64()
    status = _driver().cuPointerGetAttribute(ctypes.byref(found), DEVICE_POINTER, ctypes.c_uint64(host))
    if status not in (0, INVALID_VALUE):
        raise RuntimeError(f"Asking where the GPU sees the experts in host memory ended in CUDA error {status}.")
    if status != 0:
        raise UsageError(
            f"The GPU cannot read the experts in host memory (CUDA error {status}): they must be page-locked, which "
            "engine.tier=dram does."
        )
    return found.value


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UsageError("The CUDA driver's library, libcuda.so.1, cannot be loaded.") from error
