"""The listed slabs arrive whole and alone; the kernel holds to the reference over sizes, grids and unrolls, and reads
registered memory on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pregate.engine.device.device_addresses import device_addresses, host_allocated
from pregate.engine.device.ops.assign_slots import assign_slots
from pregate.engine.device.ops.gather_slabs import (
    gather_kernel,
    gather_slabs,
    launch_gather_slabs,
)
from pregate.engine.device.slots import DeviceSlots, Fetch
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes, page_lock, page_unlock

NUM_SLABS, NUM_SLOTS = 9, 6
LISTS = {
    "one": ([4, -1, -1], [2, -1, -1]),
    "all": ([8, 0, 3], [0, 5, 1]),
    "none": ([-1, -1, -1], [-1, -1, -1]),
}


@contextmanager
def readable_by(device: str, memory: Tensor) -> Iterator[None]:
    """Page-locked where a GPU is to read it, as the store of the engine is."""
    if device == "cpu":
        yield
        return
    page_lock(memory)
    try:
        yield
    finally:
        torch.cuda.synchronize()
        page_unlock(memory)


def listed_on(device: str, listed: tuple[list[int], list[int]]) -> list[Tensor]:
    """Slabs and slots as a fetch lists them."""
    return [torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in listed]


def random_store(num_slabs: int, size: int, seed: int) -> Tensor:
    memory = aligned_bytes(num_slabs * size)
    torch.randint(256, memory.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed), out=memory)
    return memory


def test_listed_slabs_arrive_whole_and_alone() -> None:
    size = 3 * PAGE
    store = [torch.randint(256, (size,), dtype=torch.uint8, out=aligned_bytes(size)) for _ in range(7)]
    addresses_G = device_addresses(store, "cpu")
    table, fetch = DeviceSlots.empty(7, 4, "cpu"), Fetch.empty(3, "cpu")
    slots_SB = torch.zeros(4, size, dtype=torch.uint8)
    for wanted in ([1, 1, 5], [-1, 6, 1], [0, 2, 0], [-1, -1, -1], [3, 3, 3]):
        assign_slots(*table, torch.tensor(wanted, dtype=torch.int32), *fetch, True, 0)
        expected_SB = slots_SB.clone()
        for slab, slot in zip(fetch.copy_slab_N.tolist(), fetch.copy_slot_N.tolist(), strict=True):
            if slab >= 0:
                expected_SB[slot] = store[slab]
        gather_slabs(addresses_G, fetch.copy_slab_N, fetch.copy_slot_N, slots_SB)
        assert torch.equal(slots_SB, expected_SB), wanted
        for slab, slot in zip(wanted, fetch.slot_N.tolist(), strict=True):
            assert slab < 0 or torch.equal(slots_SB[slot], store[slab])


@pytest.mark.parametrize("pages", [1, 3, 20])
@pytest.mark.parametrize("listed", list(LISTS))
@pytest.mark.parametrize(("num_programs", "unroll", "num_warps"), [(1, 1, 1), (3, 2, 4), (16, 4, 8), (40, 8, 8)])
def test_as_the_reference(
    kernel_device: str, pages: int, listed: str, num_programs: int, unroll: int, num_warps: int
) -> None:
    memory = random_store(NUM_SLABS, pages * PAGE, pages)
    expected_SB = torch.full((NUM_SLOTS, pages * PAGE), 171, dtype=torch.uint8)
    slots_SB = expected_SB.to(kernel_device, copy=True)
    store = memory.view(NUM_SLABS, -1)
    gather_slabs.reference(device_addresses(store, "cpu"), *listed_on("cpu", LISTS[listed]), expected_SB)
    with readable_by(kernel_device, memory):
        launch_gather_slabs(
            device_addresses(store, kernel_device),
            *listed_on(kernel_device, LISTS[listed]),
            slots_SB,
            num_programs=num_programs,
            unroll=unroll,
            num_warps=num_warps,
        )
        assert torch.equal(slots_SB.cpu(), expected_SB), (slots_SB.cpu() != expected_SB).nonzero()[:4]


@pytest.mark.parametrize("num_choices", [1, 2, 8, 17, 32])
def test_as_many_slabs_as_a_batch_wants(kernel_device: str, num_choices: int) -> None:
    memory = random_store(40, PAGE, num_choices)
    generator = torch.Generator().manual_seed(num_choices)
    count = int(torch.randint(1, num_choices + 1, (), generator=generator))
    slabs, slots = (torch.randperm(40, generator=generator)[:count].tolist() for _ in range(2))
    listed = (slabs + [-1] * (num_choices - count), slots + [-1] * (num_choices - count))
    expected_SB = torch.zeros(40, PAGE, dtype=torch.uint8)
    slots_SB = expected_SB.to(kernel_device, copy=True)
    store = memory.view(40, -1)
    expected_SB[slots] = store[slabs]
    with readable_by(kernel_device, memory):
        addresses_G = device_addresses(store, kernel_device)
        launch_gather_slabs(addresses_G, *listed_on(kernel_device, listed), slots_SB, num_programs=3, unroll=1)
        assert torch.equal(slots_SB.cpu(), expected_SB)


def test_every_load_and_store_of_a_slab_is_16_bytes_wide(compiler: None) -> None:
    from tests.engine.device.compiling import compiled

    pointers = {"addresses_G": "*i64", "copy_slab_N": "*i32", "copy_slot_N": "*i32", "slots": "*i64"}
    for unroll in (1, 4, 8):
        constants = {"num_choices": 3, "CHOICES": 4, "TILE": 8 * 32 * 2 * unroll}
        kernel = compiled(gather_kernel, {**pointers, "slab_words": "i32"}, constants, num_warps=8)
        ptx = kernel.asm["ptx"]
        assert ptx.count("ld.global.v2.b64") == ptx.count("st.global.v2.b64") == unroll, ptx
        assert ptx.rindex("ld.global.v2") < ptx.index("st.global.v2"), "a store waits before all loads are under way"


@pytest.mark.gpu
def test_memory_that_is_not_page_locked_is_refused() -> None:
    from pregate.config import UsageError

    with pytest.raises(UsageError, match="page-locked"):
        device_addresses([aligned_bytes(PAGE)], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("write_combined", [False, True])
def test_memory_of_the_drivers_own_making(write_combined: bool) -> None:
    memory = random_store(NUM_SLABS, 64 * PAGE, 0)
    with host_allocated(memory.numel(), write_combined=write_combined) as own:
        own.copy_(memory)
        slots_SB = torch.zeros(NUM_SLOTS, 64 * PAGE, dtype=torch.uint8, device="cuda")
        gather_slabs(device_addresses(own.view(NUM_SLABS, -1), "cuda"), *listed_on("cuda", LISTS["all"]), slots_SB)
        slabs, slots = LISTS["all"]
        assert torch.equal(slots_SB.cpu()[slots], memory.view(NUM_SLABS, -1)[slabs])


@pytest.mark.gpu
def test_in_a_cuda_graph_on_a_side_stream() -> None:
    """As the engine runs it: forked onto another stream inside a capture, joined before the slots are read."""
    memory = random_store(NUM_SLABS, 300 * PAGE, 5)
    store = memory.view(NUM_SLABS, -1)
    slots_SB = torch.zeros(NUM_SLOTS, store.shape[1], dtype=torch.uint8, device="cuda")
    result_SB = torch.zeros_like(slots_SB)
    fetch = listed_on("cuda", LISTS["none"])
    with readable_by("cuda", memory):
        addresses_G = device_addresses(store, "cuda")
        gather_slabs(addresses_G, *fetch, slots_SB)  # compiled before the capture
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                gather_slabs(addresses_G, *fetch, slots_SB)
            torch.cuda.current_stream().wait_stream(side)
            result_SB.copy_(slots_SB)
        for listed in ("all", "one", "none", "all"):
            slots_SB.zero_()
            for tensor, fresh in zip(fetch, listed_on("cuda", LISTS[listed]), strict=True):
                tensor.copy_(fresh)
            graph.replay()
            expected_SB = torch.zeros(NUM_SLOTS, store.shape[1], dtype=torch.uint8)
            for slab, slot in zip(*LISTS[listed], strict=True):
                if slab >= 0:
                    expected_SB[slot] = store[slab]
            assert torch.equal(result_SB.cpu(), expected_SB), listed
