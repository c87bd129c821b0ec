"""What the CUDA driver is asked about host memory, with a driver that is not there; on a GPU, with the real one."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pregate.config import UsageError
from pregate.engine.device import device_addresses as module
from pregate.engine.device.device_addresses import device_addresses, host_allocated
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes, page_lock, page_unlock


class FakeDriver:
    """Sees all memory 4096 bytes further on; allocates from a tensor."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.memory = status, aligned_bytes(4 * PAGE)
        self.allocated: list[tuple[int, int]] = []
        self.freed: list[int | None] = []

    def cuPointerGetAttribute(self, found: Any, attribute: int, host: ctypes.c_uint64) -> int:
        assert attribute == 3
        found._obj.value = host.value + 4096
        return self.status

    def cuMemHostAlloc(self, place: Any, size: ctypes.c_size_t, flags: int) -> int:
        self.allocated.append((size.value, flags))
        place._obj.value = None if self.status else self.memory.data_ptr()
        return self.status

    def cuMemFreeHost(self, place: ctypes.c_void_p) -> int:
        self.freed.append(place.value)
        return 0


def use(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    monkeypatch.setattr(module, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    return driver


def test_a_cpu_sees_memory_where_it_is() -> None:
    slabs = list(aligned_bytes(3 * PAGE).view(3, PAGE))
    addresses_G = device_addresses(slabs, "cpu")
    assert addresses_G.dtype is torch.int64
    assert addresses_G.tolist() == [slabs[0].data_ptr() + n * PAGE for n in range(3)]


def test_a_gpu_sees_memory_where_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeDriver(), monkeypatch)
    assert module._seen_by_device(1 << 40) == (1 << 40) + 4096
    use(FakeDriver(status=1), monkeypatch)
    with pytest.raises(UsageError, match=r"cannot read .* \(CUDA error 1\): they must be page-locked"):
        module._seen_by_device(1 << 40)


@pytest.mark.parametrize(("write_combined", "flags"), [(False, 1 | 2), (True, 1 | 2 | 4)])
def test_the_drivers_memory_is_freed_again(monkeypatch: pytest.MonkeyPatch, write_combined: bool, flags: int) -> None:
    driver = use(FakeDriver(), monkeypatch)
    with pytest.raises(KeyError), host_allocated(4 * PAGE, write_combined=write_combined) as memory:
        assert memory.data_ptr() == driver.memory.data_ptr() and memory.shape == (4 * PAGE,)
        memory.fill_(7)
        assert (driver.memory == 7).all() and driver.freed == []
        raise KeyError
    assert driver.allocated == [(4 * PAGE, flags)]
    assert driver.freed == [driver.memory.data_ptr()]


def test_memory_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = use(FakeDriver(status=2), monkeypatch)
    with (
        pytest.raises(UsageError, match=r"4\.10 kB of page-locked host memory cannot be had \(CUDA error 2\)"),
        host_allocated(PAGE, write_combined=True),
    ):
        pass
    assert driver.freed == []


def test_a_machine_without_the_driver_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    module._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(UsageError, match=r"libcuda\.so\.1"):
        module._driver()


def test_the_engines_own_memory_is_registered_as_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may read registered memory only if it is (cudaHostRegisterMapped is 2)."""
    calls: list[tuple[int, int, int]] = []
    cudart = SimpleNamespace(cudaHostRegister=lambda *call: calls.append(call) or 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = aligned_bytes(PAGE)
    page_lock(memory)
    assert calls == [(memory.data_ptr(), PAGE, 2)]


@pytest.mark.gpu
def test_registered_memory_is_seen_from_any_byte_on() -> None:
    memory = aligned_bytes(8 * PAGE)
    page_lock(memory)
    try:
        first, last = device_addresses([memory, memory[7 * PAGE :]], "cuda").tolist()
        assert last - first == 7 * PAGE
    finally:
        page_unlock(memory)
