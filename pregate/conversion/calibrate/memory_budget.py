"""What a calibration through the engine may take of `calibration.memory`, and what follows from it.

Knows sizes; allocates nothing. The figures for activations and fits are upper estimates of what torch takes.

Letters: T tokens, D model width, F expert hidden width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pregate.config import CalibrationConfig, Tier, UsageError
from pregate.engine.budget import resolve_tier
from pregate.engine.offloaded_experts import HALVES
from pregate.engine.opening import Opened
from pregate.engine.storage.slabs import SlabLayout
from pregate.system.byte_sizes import human_bytes, parse_bytes
from pregate.system.memory import bytes_in_use

FIT_BYTES, FIT_SQUARES = 16, 64
"""What a fit takes: for each token and feature, and for each pair of features."""
STATES = 16
"""How many (T, D) tensors a layer holds at once beside those of its experts."""
COPIES = 6
"""How many (T, K, D) tensors the experts of a block hold at once."""


KERNELS = 128 << 20
"""What the libraries below torch compile and keep on a CPU while passes run: about 1 MB for each shape of a product in
half precision."""


@dataclass(frozen=True)
class Room:
    """num_slots: for experts on the compute device. batch_size: examples that pass through a layer at once."""

    num_slots: int
    batch_size: int


def room_for(
    settings: CalibrationConfig,
    opened: Opened,
    layout: SlabLayout,
    tier: Tier,
    longest: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Room:
    """`longest`: tokens of the longest example. `dtype`: that passes compute in. One block of experts in slots comes
    first, because then each is read once; what is left goes to larger batches and to the next block. Raises
    `UsageError` for too little memory."""
    family = opened.family
    total, block = len(family.keys()), family.num_experts
    if settings.memory is None:
        return Room(min(total, 2 * block), settings.batch_size)
    given, slab = parse_bytes(settings.memory), layout.slab_bytes
    in_memory = total if device.type == "cpu" and resolve_tier(tier, device) is Tier.dram else 0
    beside = _numbers_beside_experts(opened)
    weights, loading = sum(beside) * dtype.itemsize + in_memory * slab, max(beside) * dtype.itemsize
    if dtype != opened.dtype:  # an expert is cast while it computes
        weights += sum(torch.Size(shape).numel() for shape in family.matrices.values()) * dtype.itemsize
    fit, example = _fit_bytes(settings, opened), longest * _numbers_per_token(opened) * dtype.itemsize
    fixed = bytes_in_use(device) + weights + (KERNELS if device.type == "cpu" and dtype in HALVES else 0)
    # a tensor is there twice while it is loaded, and no slot is there yet
    left = given - fixed - max(fit, example, loading - slab)
    if left < slab:
        raise UsageError(
            f"calibration.memory={settings.memory} is too little: the process and the weights that are not experts "
            f"take {human_bytes(fixed)}, a fit on {settings.tokens:,} tokens {human_bytes(fit)}, an example of "
            f"{longest:,} tokens {human_bytes(example)}, an expert {human_bytes(slab)}: give at least "
            f"{human_bytes(1.01 * (given - left + slab))}, or lower calibration.tokens or the task's lengths."
        )
    num_slots = min(total, block, left // slab)
    fitting = max(1, min(settings.batch_size, (given - fixed - num_slots * slab) // example))
    spare = given - fixed - max(fit, fitting * example)
    return Room(max(num_slots, min(total, 2 * block, spare // slab)), fitting)


def _numbers_beside_experts(opened: Opened) -> list[int]:
    """The sizes of the tensors that are not experts."""
    names = {name for key in opened.family.keys() for name in opened.family.tensor_names(key)}  # noqa: SIM118
    return [torch.Size(info.shape).numel() for name, info in opened.source.tensors.items() if name not in names]


def _fit_bytes(settings: CalibrationConfig, opened: Opened) -> int:
    D, E = opened.config.hidden_size, opened.family.num_experts
    history = 2 * settings.steps * E * D * torch.float32.itemsize
    return FIT_BYTES * settings.tokens * D + FIT_SQUARES * D**2 + history


def _numbers_per_token(opened: Opened) -> int:
    D, K = opened.config.hidden_size, opened.family.top_k
    F = max(torch.Size(shape).numel() for shape in opened.family.matrices.values()) // D
    return (STATES + COPIES * K) * D + 3 * K * F
