"""The slot table against a simulation that was written from its description."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pregate.engine.device.ops.assign_slots import assign_slots
from pregate.engine.device.slots import ERRORS, HITS, MISSES, DeviceSlots, Fetch, minimum_slots
from tests.engine.device.naive import NaiveTable, assert_consistent, random_wanted

# slabs, slots, choices, blocks, fetches protected, keep: few slots and many, one slot, one choice, too few for all
SHAPES = [
    (24, 24, 4, 3, 1, True),
    (24, 8, 4, 3, 1, True),
    (24, 8, 4, 3, 1, False),
    (24, 5, 4, 3, 1, True),
    (24, 3, 4, 3, 1, False),
    (12, 2, 1, 6, 1, True),
    (12, 1, 1, 6, 0, True),
    (40, 12, 6, 5, 0, True),
    (40, 30, 8, 5, 2, True),
    (64, 40, 32, 4, 0, True),
]
STEPS = 1000


def run_against_simulation(shape: tuple, device: str, steps: int) -> None:
    num_slabs, num_slots, num_choices, blocks, protected, keep = shape
    generator = torch.Generator().manual_seed(num_slabs * num_slots)
    table, fetch = DeviceSlots.empty(num_slabs, num_slots, device), Fetch.empty(num_choices, device)
    naive = NaiveTable(num_slots)
    for step in range(steps):
        wanted_N = random_wanted(generator, num_slabs, num_choices, step=step, blocks=blocks)
        slots, copies = naive.fetch(wanted_N.tolist(), keep, protected)
        assign_slots(*table, wanted_N.to(device), *fetch, keep, protected)
        padding = [(-1, -1)] * (num_choices - len(copies))
        listed = list(zip(fetch.copy_slab_N.tolist(), fetch.copy_slot_N.tolist(), strict=True))
        assert fetch.slot_N.tolist() == slots, f"step {step}, {wanted_N}: {fetch.slot_N} is not {slots}"
        assert listed == copies + padding, f"step {step}, {wanted_N}: {listed} is not {copies}"
        if step % 50 == 0:
            assert_consistent(table)
    counted = table.counters.tolist()
    expected = [naive.hits, naive.misses, naive.evictions, naive.errors]  # HITS, MISSES, EVICTIONS, ERRORS
    assert counted == expected, f"{counted} is not {expected}"
    assert table.tick.tolist() == [steps]
    assert counted[MISSES] > 0
    assert (counted[HITS] > 0) is keep


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ten_thousand_steps_as_in_the_simulation(shape: tuple) -> None:
    assert len(SHAPES) * STEPS == 10_000
    run_against_simulation(shape, "cpu", STEPS)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_in_the_simulation_on_a_gpu(shape: tuple) -> None:
    run_against_simulation(shape, "cuda", STEPS)


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
@pytest.mark.parametrize("num_choices", [1, 3, 32])
@pytest.mark.parametrize("keep", [True, False])
def test_minimum_slots_are_enough_and_one_less_is_not(lookahead: int, num_choices: int, keep: bool) -> None:
    """Blocks that want as much as they can, `lookahead` of them under way at a time."""
    num_experts, blocks = 8, 6
    num_slots = minimum_slots(num_choices, num_experts, lookahead)
    assert num_slots == (lookahead + 1) * min(num_experts, num_choices)
    for slots, enough in ((num_slots, True), (num_slots - 1, False)):
        if slots == 0:
            continue
        table, fetch = DeviceSlots.empty(num_experts * blocks, slots, "cpu"), Fetch.empty(num_choices, "cpu")
        for step in range(40):
            wanted_N = (torch.arange(num_choices) + step) % num_experts + step % blocks * num_experts
            assign_slots(*table, wanted_N.int(), *fetch, keep, lookahead)
            if enough:
                assert (fetch.slot_N >= 0).all(), fetch.slot_N
        assert (table.counters[ERRORS].item() == 0) is enough, table.counters


def test_what_earlier_fetches_wanted_is_never_overwritten() -> None:
    table, fetch = DeviceSlots.empty(100, 9, "cpu"), Fetch.empty(3, "cpu")
    generator = torch.Generator().manual_seed(1)
    safe: list[set[int]] = []
    for _ in range(500):
        wanted_N = torch.randint(100, (3,), generator=generator).int()
        assign_slots(*table, wanted_N, *fetch, True, 2)
        written = {slot for slot in fetch.copy_slot_N.tolist() if slot >= 0}
        assert not written & set().union(*safe), f"{written} of {safe}"
        safe = [*safe, set(fetch.slot_N.tolist())][-2:]


def test_clear_forgets_in_place() -> None:
    table, fetch = DeviceSlots.empty(6, 3, "cpu"), Fetch.empty(2, "cpu")
    places = [tensor.data_ptr() for tensor in table]
    assign_slots(*table, torch.tensor([4, 5], dtype=torch.int32), *fetch, True, 0)
    assert table.counters.tolist() == [0, 2, 0, 0] and table.slab_in_S.tolist() == [4, 5, -1]
    table.clear()
    for name, fresh in DeviceSlots.empty(6, 3, "cpu")._asdict().items():
        assert torch.equal(getattr(table, name), fresh), name
    assert [tensor.data_ptr() for tensor in table] == places


def test_nothing_wanted_changes_nothing_but_the_tick() -> None:
    table, fetch = DeviceSlots.empty(6, 3, "cpu"), Fetch.empty(2, "cpu")
    assign_slots(*table, torch.tensor([4, 5], dtype=torch.int32), *fetch, True, 0)
    before = {name: tensor.clone() for name, tensor in table._asdict().items()}
    assign_slots(*table, torch.tensor([-1, -1], dtype=torch.int32), *fetch, True, 0)
    assert all((tensor == -1).all() for tensor in fetch), fetch
    assert table.tick.item() == before.pop("tick").item() + 1
    for name, tensor in before.items():
        assert torch.equal(getattr(table, name), tensor), name


def test_the_reference_reads_no_number_back() -> None:
    """Tensors without values: anything that depends on one raises."""
    with FakeTensorMode():
        table, fetch = DeviceSlots.empty(12, 4, "cpu"), Fetch.empty(3, "cpu")
        for keep in (True, False):
            wanted_N = torch.empty(3, dtype=torch.int32)
            assign_slots.reference(*table, wanted_N, *fetch, keep, 1)
    assert fetch.slot_N.shape == (3,)
