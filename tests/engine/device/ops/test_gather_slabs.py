"""The gather's reference implementation copies the listed slabs and nothing else."""

from __future__ import annotations

import torch

from pregate.engine.device.host_memory import device_addresses
from pregate.engine.device.ops.assign_slots import assign_slots
from pregate.engine.device.ops.gather_slabs import gather_slabs
from pregate.engine.device.slots import DeviceSlots, Fetch
from pregate.engine.storage.memory import PAGE, aligned_bytes


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
