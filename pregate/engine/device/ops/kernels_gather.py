"""The Triton kernel behind `gather_slabs`: wide loads from host memory by a few persistent programs.

The link is fast only with many loads in flight, and the computation needs the multiprocessors: so few programs, each
with several 16-byte loads a thread under way before the first of them is stored. Knows addresses and bytes only.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pregate.engine.device.slots import FetchPlan

NUM_WARPS = 8
WARP = 32
WIDTH = 16
"""Bytes of the widest load a thread can do."""


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


def launch_gather_slabs(
    addresses_G: Tensor,
    plan: FetchPlan,
    slots_SB: Tensor,
    *,
    num_programs: int,
    unroll: int,
    num_warps: int = NUM_WARPS,
) -> None:
    """See `gather_slabs`."""
    slots_SW = slots_SB.view(torch.int64)
    num_choices = plan.copy_slab_N.shape[0]
    launch: Any = gather_kernel[(num_programs,)]
    launch(
        addresses_G,
        plan.copy_slab_N,
        plan.copy_slot_N,
        slots_SW,
        slots_SW.shape[1],
        num_choices=num_choices,
        CHOICES=1 << (num_choices - 1).bit_length(),
        TILE=num_warps * WARP * WIDTH // 8 * unroll,
        num_warps=num_warps,
    )
