"""Copies the slabs of a fetch plan from page-locked host memory into slots, on the device's own initiative.

Knows addresses, slots and bytes; knows nothing about which slab is whose. The store's memory must stay registered
and where it is for as long as its addresses are used.

Letters: G slabs of the store, S slots, B bytes of a slab.
"""

from __future__ import annotations

import ctypes

from torch import Tensor

from pregate.engine.device.slots import FetchPlan

NUM_PROGRAMS = 16
"""Multiprocessors given to copying; enough loads in flight for a PCIe 5.0 link, by its latency. Not yet measured."""
UNROLL = 4
"""16-byte loads that each thread has in flight. Not yet measured."""


def gather_slabs(
    addresses_G: Tensor,
    plan: FetchPlan,
    slots_SB: Tensor,
    *,
    num_programs: int = NUM_PROGRAMS,
    unroll: int = UNROLL,
) -> None:
    """Copy the slabs that `plan` lists into their slots; nothing where it lists none.

    addresses_G: int64, where the device sees each slab (`pregate.engine.device.host_memory`), on the device. slots_SB:
    uint8, whole 4 KiB pages a slot. `num_programs`: thread blocks that share the work; `unroll`: loads in flight.
    """
    if slots_SB.device.type == "cuda":
        from pregate.engine.device.ops.kernels_gather import launch_gather_slabs

        launch_gather_slabs(addresses_G, plan, slots_SB, num_programs=num_programs, unroll=unroll)
    else:
        gather_slabs_twin(addresses_G, plan, slots_SB)


def gather_slabs_twin(addresses_G: Tensor, plan: FetchPlan, slots_SB: Tensor) -> None:
    """`gather_slabs` for slots in host memory."""
    addresses = addresses_G.numpy()
    for slab, slot in zip(plan.copy_slab_N.numpy(), plan.copy_slot_N.numpy(), strict=True):
        if slab >= 0:
            ctypes.memmove(slots_SB[slot].data_ptr(), int(addresses[slab]), slots_SB.shape[1])
