"""Experts that are a gated linear unit of three matrices, as in most decoder-only models, and where checkpoints hold
them.

Letters: D model width, F expert hidden width, E experts of a block, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers.activations import ACT2FN

from pregate.models.expert_math import Factor, project
from pregate.models.experts import ExpertLayout, TensorSlice

MATRICES = ("gate_proj", "up_proj", "down_proj")
"""As upstream's dense layers name the matrices, and most checkpoints those of an expert."""


def shapes(D: int, F: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of the matrices of one expert."""
    return {"gate": (F, D), "up": (F, D), "down": (D, F)}


JOINED = ("up",)
"""One product gives both sides, as in upstream's fused tensor."""


def fused(experts: str, E: int, D: int, F: int) -> ExpertLayout:
    """All experts of a block in two tensors, as in memory. `experts`: their prefix, with {layer} in it."""

    def layout(stack: str, layer: int, expert: int) -> list[TensorSlice]:
        within = experts.format(layer=layer)
        gate_up, down = f"{within}.gate_up_proj", f"{within}.down_proj"
        return [
            TensorSlice(gate_up, (expert, slice(0, F)), shape=(E, 2 * F, D)),
            TensorSlice(gate_up, (expert, slice(F, None)), shape=(E, 2 * F, D)),
            TensorSlice(down, (expert,), shape=(E, D, F)),
        ]

    return layout


def apart(experts: str, names: Sequence[str] = MATRICES) -> ExpertLayout:
    """Three tensors for each expert, as on disk. `names`: of the gate's, the up and the down projection."""

    def layout(stack: str, layer: int, expert: int) -> list[TensorSlice]:
        return [TensorSlice(f"{experts.format(layer=layer)}.{expert}.{name}.weight") for name in names]

    return layout


def clamped_product(gate_NF: Tensor, up_NF: Tensor, alpha: float, limit: float) -> Tensor:
    """What is between matrices whose results are clamped: (up + 1) * gate * sigmoid(alpha * gate)."""
    gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(min=-limit, max=limit)
    return (up_NF + 1) * (gate_NF * (gate_NF * alpha).sigmoid())


def gated_unit(activation: str) -> Callable[[Sequence[Factor], Tensor], Tensor]:
    """What one expert computes: down(activation(gate x) * up x). `activation`: as upstream's configs name it. Gate and
    up are given as one matrix or as two."""
    act = ACT2FN[activation]

    def apply(matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
        *sides, down_DF = matrices
        both = [project(hidden_ND, side) for side in sides]
        gate_NF, up_NF = both if len(both) == 2 else both[0].chunk(2, -1)
        return project(act(gate_NF) * up_NF, down_DF)

    return apply
