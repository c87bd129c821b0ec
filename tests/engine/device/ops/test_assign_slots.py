"""The slot table's kernel holds to its reference implementation, table and fetch alike, fetch after fetch."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.engine.device.ops.assign_slots import (
    MAX_CHOICES,
    MAX_SLOTS,
    assign_kernel,
    assign_slots,
    launch_assign_slots,
)
from pregate.engine.device.slots import DeviceSlots, Fetch, minimum_slots
from tests.engine.device.naive import assert_consistent, assert_tables_equal, random_wanted


def hold_to_reference(
    device: str, num_slabs: int, num_slots: int, fetches: Iterable[Tensor], *, keep: bool, protected: int
) -> DeviceSlots:
    table, expected = (DeviceSlots.empty(num_slabs, num_slots, place) for place in (device, "cpu"))
    for number, wanted_N in enumerate(fetches):
        fetch, fetch_expected = (Fetch.empty(len(wanted_N), place) for place in (device, "cpu"))
        assign_slots.reference(*expected, wanted_N, *fetch_expected, keep, protected)
        launch_assign_slots(*table, wanted_N.to(device), *fetch, keep, protected)
        assert_tables_equal((table, fetch), (expected, fetch_expected), f"fetch {number}, {wanted_N}:")
    assert_consistent(table)
    return expected


def numbers(*wanted: int) -> Tensor:
    return torch.tensor(wanted, dtype=torch.int32)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 17, 32])
def test_random_fetches(kernel_device: str, batch: int, keep: bool) -> None:
    generator = torch.Generator().manual_seed(batch)
    for case in range(2):
        blocks = int(torch.randint(2, 7, (), generator=generator))
        num_slabs = blocks * int(torch.randint(2, 40, (), generator=generator))
        num_slots = int(torch.randint(1, num_slabs + 1, (), generator=generator))
        fetches = [random_wanted(generator, num_slabs, batch, step=step, blocks=blocks) for step in range(10)]
        hold_to_reference(kernel_device, num_slabs, num_slots, fetches, keep=keep, protected=case)


def test_all_hits(kernel_device: str) -> None:
    expected = hold_to_reference(kernel_device, 9, 9, [numbers(*range(9))] * 4, keep=True, protected=1)
    assert expected.counters.tolist() == [27, 9, 0, 0]


def test_all_misses(kernel_device: str) -> None:
    fetches = [numbers(*range(first, first + 4)) for first in range(0, 24, 4)] * 2
    expected = hold_to_reference(kernel_device, 24, 8, fetches, keep=True, protected=1)
    assert expected.counters.tolist() == [0, 48, 40, 0]


def test_repeated_and_dropped_choices(kernel_device: str) -> None:
    fetches = [numbers(3, 3, -1, 3, 5), numbers(-1, -1, -1, -1, -1), numbers(5, 7, 5, 7, -1), numbers(7, 3, 3, 7, 7)]
    for keep in (True, False):
        hold_to_reference(kernel_device, 8, 4, fetches, keep=keep, protected=1)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_minimum_slots(kernel_device: str, lookahead: int) -> None:
    num_experts, blocks, num_choices = 6, 5, 4
    num_slots = minimum_slots(num_choices, num_experts, lookahead)
    generator = torch.Generator().manual_seed(lookahead)
    fetches = [
        (torch.randperm(num_experts, generator=generator)[:num_choices] + step % blocks * num_experts).int()
        for step in range(24)
    ]
    num_slabs = num_experts * blocks
    expected = hold_to_reference(kernel_device, num_slabs, num_slots, fetches, keep=True, protected=lookahead)
    assert expected.counters[3] == 0
    expected = hold_to_reference(kernel_device, num_slabs, num_slots - 1, fetches, keep=True, protected=lookahead)
    assert expected.counters[3] > 0


def test_one_slot_and_many(kernel_device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_slots, protected in ((1, 0), (1, 1), (1500, 1)):
        fetches = [random_wanted(generator, 3000, 2, step=step, blocks=6) for step in range(12)]
        hold_to_reference(kernel_device, 3000, num_slots, fetches, keep=True, protected=protected)


def test_more_than_a_program_looks_at_is_refused(kernel_device: str) -> None:
    for num_slots, num_choices in ((MAX_SLOTS + 1, 1), (4, MAX_CHOICES + 1)):
        table, fetch = DeviceSlots.empty(8, num_slots, "cpu"), Fetch.empty(num_choices, "cpu")
        wanted_N = torch.zeros(num_choices, dtype=torch.int32)
        with pytest.raises(UsageError, match="slots and"):
            launch_assign_slots(*table, wanted_N, *fetch, True, 0)


def test_what_one_thread_writes_the_others_read_behind_a_barrier(compiler: None) -> None:
    """The interpreter is one thread, so it cannot miss one: ages before victims are chosen, evictions once all have
    read what they evict, the table before slots are looked up, and the tick when all have read it."""
    from tests.engine.device.compiling import compiled

    tables = {"slot_of_G": "*i32", "slab_in_S": "*i32", "last_use_S": "*i64", "tick_1": "*i64", "counters_4": "*i64"}
    fetches = dict.fromkeys(("wanted_N", "slot_N", "copy_slab_N", "copy_slot_N"), "*i32")
    constants = {"num_choices": 3, "num_slots": 40, "protected_fetches": 1, "KEEP": True, "CHOICES": 16, "SLOTS": 64}
    kernel = compiled(assign_kernel, {**tables, **fetches}, constants, num_warps=4)
    found = re.findall(r"tt\.load|tt\.store|\w+\.barrier", kernel.asm["ttgir"])
    order = "".join({"tt.load": "L", "tt.store": "S"}.get(operation, "B") for operation in found)
    assert re.fullmatch(r"L+SBL+BSSSSBLS.*BS", order), order


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Captured once, replayed with other choices in the same memory."""
    table, expected = DeviceSlots.empty(40, 12, "cuda"), DeviceSlots.empty(40, 12, "cpu")
    fetch, fetch_expected = Fetch.empty(4, "cuda"), Fetch.empty(4, "cpu")
    wanted_N = torch.full((4,), -1, dtype=torch.int32, device="cuda")
    launch_assign_slots(*table, wanted_N, *fetch, True, 1)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_assign_slots(*table, wanted_N, *fetch, True, 1)
    table.clear()
    generator = torch.Generator().manual_seed(0)
    for step in range(200):
        chosen_N = random_wanted(generator, 40, 4, step=step, blocks=5)
        wanted_N.copy_(chosen_N)
        graph.replay()
        assign_slots.reference(*expected, chosen_N, *fetch_expected, True, 1)
        assert_tables_equal((table, fetch), (expected, fetch_expected), f"replay {step}:")
