"""Which slabs the rows that live need for a block.

Letters: B rows, T places of a row, K experts a token, N = B * T * K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.registry import operation
from pregate.engine.device.slots import NONE


@operation("wanted_N")
def want_slabs(expert_ids_BTK: Tensor, live_B: Tensor, first_slab: int, wanted_N: Tensor) -> None:
    """Into `wanted_N` (int32, B*K of one place a row): the slab of each choice of a block whose expert 0 is
    `first_slab`; -1 for a dropped choice and for all of a row that does not live."""
    # masked_fill: its value is an argument of the launch, where `torch.where` would make a tensor of it
    unneeded = (expert_ids_BTK < 0) | ~live_B[:, None, None]
    wanted_N.copy_((expert_ids_BTK + first_slab).masked_fill(unneeded, NONE).view(-1))


@triton.jit
def want_kernel(
    expert_ids_N, live_B, wanted_N, first_slab, num_choices: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr
):
    """CHOICES: the power of two at or above `num_choices`. Flags are bytes."""
    order = tl.arange(0, CHOICES)
    inside = order < num_choices
    expert = tl.load(expert_ids_N + order, mask=inside, other=-1).to(tl.int32)
    is_live = tl.load(live_B + order // TOP_K, mask=inside, other=0) != 0
    tl.store(wanted_N + order, tl.where((expert >= 0) & is_live, expert + first_slab, -1), mask=inside)


@want_slabs.on_cuda
def launch_want_slabs(expert_ids_BTK: Tensor, live_B: Tensor, first_slab: int, wanted_N: Tensor) -> None:
    num_choices = wanted_N.shape[0]
    assert expert_ids_BTK.numel() == num_choices, (expert_ids_BTK.shape, num_choices)
    want_kernel[(1,)](
        expert_ids_BTK.contiguous(),
        live_B.view(torch.uint8),
        wanted_N,
        first_slab,
        num_choices=num_choices,
        TOP_K=num_choices // live_B.shape[0],
        CHOICES=1 << (num_choices - 1).bit_length(),
        num_warps=1,
    )
