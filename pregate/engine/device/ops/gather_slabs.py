"""Copies the slabs of a fetch from page-locked host memory into slots, on the device's own initiative.

The store's memory must stay registered and where it is for as long as its addresses are used. The link is fast only
with many loads in flight, and the computation needs the multiprocessors: so few programs, each with several 16-byte
loads a thread under way before the first of them is stored.

Letters: G slabs of the store, S slots, B bytes of a slab, N choices.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.registry import operation

NUM_PROGRAMS = 16
"""Multiprocessors given to copying; enough loads in flight for a PCIe 5.0 link, by its latency. Not yet measured."""
UNROLL = 4
"""16-byte loads that each thread has in flight. Not yet measured."""
NUM_WARPS = 8
WARP = 32
WIDTH = 16
"""Bytes of the widest load a thread can do."""


@operation("slots_SB")
def gather_slabs(
    addresses_G: Tensor,
    copy_slab_N: Tensor,
    copy_slot_N: Tensor,
    slots_SB: Tensor,
    num_programs: int = NUM_PROGRAMS,
    unroll: int = UNROLL,
) -> None:
    """Copy the slabs that a `Fetch` lists into their slots; nothing where it lists none.

    addresses_G: int64, where the device sees each slab (`device_addresses.py`), on the device. slots_SB: uint8,
    whole 4 KiB pages a slot. `num_programs`: thread blocks that share the work; `unroll`: loads in flight.
    """
    addresses = addresses_G.numpy()
    for slab, slot in zip(copy_slab_N.numpy(), copy_slot_N.numpy(), strict=True):
        if slab >= 0:
            ctypes.memmove(slots_SB[slot].data_ptr(), int(addresses[slab]), slots_SB.shape[1])


@triton.jit
def gather_kernel(
    addresses_G,
    copy_slab_N,
    copy_slot_N,
    slots,
    slab_words,
    num_choices: tl.constexpr,
    CHOICES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Words of 8 bytes; `slots` is (S, slab_words). All tiles of all listed slabs, dealt out to the programs."""
    order = tl.arange(0, CHOICES)
    listed = tl.load(copy_slab_N + order, mask=order < num_choices, other=-1)
    # those to copy come first in the list
    num_copies = tl.sum((listed >= 0).to(tl.int32), axis=0)
    tiles = tl.cdiv(slab_words, TILE)
    for work in range(tl.program_id(0), num_copies * tiles, tl.num_programs(0)):
        copy = work // tiles
        address = tl.load(addresses_G + tl.load(copy_slab_N + copy))
        slot = tl.load(copy_slot_N + copy).to(tl.int64)
        words = (work % tiles) * TILE + tl.arange(0, TILE)
        inside = words < slab_words
        # nothing else tells the compiler that a number read from memory is the address of a whole page
        source = tl.multiple_of(address.to(tl.pointer_type(tl.int64)) + words, 16)
        tl.store(slots + slot * slab_words + words, tl.load(source, mask=inside), mask=inside)


@gather_slabs.on_cuda
def launch_gather_slabs(
    addresses_G: Tensor,
    copy_slab_N: Tensor,
    copy_slot_N: Tensor,
    slots_SB: Tensor,
    num_programs: int = NUM_PROGRAMS,
    unroll: int = UNROLL,
    num_warps: int = NUM_WARPS,
) -> None:
    slots_SW = slots_SB.view(torch.int64)
    num_choices = copy_slab_N.shape[0]
    gather_kernel[(num_programs,)](
        addresses_G,
        copy_slab_N,
        copy_slot_N,
        slots_SW,
        slots_SW.shape[1],
        num_choices=num_choices,
        CHOICES=1 << (num_choices - 1).bit_length(),
        TILE=num_warps * WARP * WIDTH // 8 * unroll,
        num_warps=num_warps,
    )
