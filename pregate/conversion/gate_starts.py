"""What a moved gate holds before any training: a copy, random numbers, or what a fit has found.

Knows tensors and their names; knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pregate.config import Init, UsageError
from pregate.conversion.made_tensors import drawn
from pregate.conversion.pregated_config import Target
from pregate.conversion.tensor_plan import TensorPlan


@dataclass(frozen=True)
class FittedGates:
    """Gates found otherwise than by copying: output tensors by name, and the account of it for the manifest."""

    tensors: dict[str, Tensor]
    account: dict[str, Any]


GateFitter = Callable[[TensorPlan, Any], FittedGates]
"""Given where tensors move and the config of the pre-gated model; called once nothing else can be refused."""

GateStart = Callable[[Tensor], Tensor]
"""Given the stored tensor of a gate, what the tensor of the gate ahead starts as, in the same shape and dtype."""


def gate_starts(
    plan: TensorPlan, target: Target, seed: int, fit: GateFitter | None
) -> tuple[dict[str, GateStart], dict[str, Any]]:
    """How each output tensor of a gate starts that is no copy, and what the manifest says of it."""
    init = Init(target.config.pregating.init)
    if init is Init.random:
        std = target.family.gate_std(target.config)
        moved = {name: origin for move in plan.moves for name, origin in move.renamed.items()}
        return {name: partial(_drawn, name=origin, std=std, seed=seed) for name, origin in moved.items()}, {}
    if init is not Init.calibrated or not target.config.pregating.lookahead:
        return {}, {}
    if fit is None:
        raise UsageError(
            "Gates are calibrated on examples of a task: run python -m pregate.convert pregate.init=calibrated "
            "task=NAME, or call pregate.conversion.calibrate.flow.calibrate."
        )
    fitted = fit(plan, target.config)
    starts = {name: partial(_as_stored, found) for name, found in fitted.tensors.items()}
    return starts, {"calibration": fitted.account}


def _drawn(like: Tensor, name: str, std: float, seed: int) -> Tensor:
    """A random gate of the shape and dtype of `like`. Depends on `seed` and `name` alone, not on the order of calls."""
    if like.ndim < 2:  # a bias of any kind
        return torch.zeros_like(like)
    return drawn(name, tuple(like.shape), like.dtype, std, seed)


def _as_stored(found: Tensor, like: Tensor) -> Tensor:
    assert found.shape == like.shape, (found.shape, like.shape)
    return found.detach().to("cpu", like.dtype).clone()
