"""What memory an engine takes: slots and host buffers that a budget buys, and the sentence when it buys too few.

Knows sizes and policies; allocates slots, moves nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.config import Policy, Tier, UsageError
from pregate.config.validators import share_of
from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.experts import ExpertSpec
from pregate.system.byte_sizes import human_bytes, parse_bytes
from pregate.system.memory import is_out_of_memory


class DeviceFullError(UsageError):
    """The slots asked for do not fit on the compute device."""


def resolve_tier(tier: Tier, device: torch.device) -> Tier:
    """`auto`: page-locked host memory for a GPU; the disk where the compute device is host memory itself."""
    if tier is not Tier.auto:
        return tier
    return Tier.dram if device.type == "cuda" else Tier.disk


def slabs_within(setting: str, budget: str, num_experts: int, slab_bytes: int) -> int:
    """How many slabs `budget` holds: bytes ("4GB"), or a share of all experts ("25%"). At most all of them.

    Raises `UsageError` if it holds none, and for what is neither.
    """
    share = share_of(setting, budget)
    try:
        size = parse_bytes(budget) if share is None else share * num_experts * slab_bytes
    except UsageError as error:
        raise UsageError(f"{setting}: {error}") from error
    # a share is exact: 25 % of 768 experts must not lose one to the rounding of a float
    slabs = min(num_experts, int(size / slab_bytes + 1e-9))
    if slabs < 1:
        raise UsageError(
            f"{setting}={budget} is {human_bytes(size)}, less than one expert of {human_bytes(slab_bytes)}: "
            f"give at least {slab_bytes}B."  # not rounded: what is advised must be accepted
        )
    return slabs


def default_slots(policy: Policy, family: ExpertSpec) -> int:
    """Slots where the user sets no budget: all experts for `gpu_only`, two blocks for `prefetch_all`, else four
    experts for each block whose fetch can be under way at the same time."""
    total = len(family.keys())
    if policy is Policy.gpu_only:
        return total
    if policy is Policy.prefetch_all:
        return min(total, 2 * family.num_experts)
    return min(total, (family.lookahead + 1) * min(family.num_experts, 4 * family.top_k))


def slots_within(budget: str | None, policy: Policy, family: ExpertSpec, slab_bytes: int) -> int:
    """How many slots a device budget buys; None is the policy's default.

    Raises `UsageError` if it does not hold one expert, or not all of them for `gpu_only`.
    """
    total = len(family.keys())
    if budget is None:
        return default_slots(policy, family)
    slots = slabs_within("engine.device_budget", budget, total, slab_bytes)
    if policy is Policy.gpu_only and slots < total:
        raise UsageError(
            f"engine.device_budget={budget} holds {slots} of {total} experts, but gpu_only keeps all of them on the "
            f"device: give 100% ({human_bytes(total * slab_bytes)}) or another policy."
        )
    return slots


def host_buffers_within(budget: str | None, family: ExpertSpec, slab_bytes: int) -> int:
    """How many slabs of the disk tier a host budget keeps in host memory; None keeps none. Raises `UsageError`."""
    return 0 if budget is None else slabs_within("engine.host_budget", budget, len(family.keys()), slab_bytes)


def allocate_slots(num_slots: int, layout: SlabLayout, device: torch.device) -> Tensor:
    """Slots (num_slots, slab_bytes) on `device`, page-aligned. Raises `DeviceFullError` where memory has run out; any
    other fault of the device is raised as it is."""
    size = num_slots * layout.slab_bytes
    try:
        flat = aligned_bytes(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceFullError(
            f"{num_slots} slots need {human_bytes(size)} on {device}, which has not that much free: lower "
            "engine.device_budget."
        ) from error
    return flat.view(num_slots, layout.slab_bytes)
