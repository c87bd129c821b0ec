"""What an MLP gate has beside its linear map: a small network, whose output is added to the expert logits.

Knows nothing about router rules or where a gate sits.

Letters: D model width, E experts, H hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pregate.models.pregating import PreGating

NAME = "nonlinear"
"""The attribute of a gate that holds its `Nonlinear`."""


class Nonlinear(nn.Module):
    """down(silu(up x)). While `down` is zero it adds nothing, so a gate decides by its linear map alone."""

    def __init__(self, width: int, num_experts: int, hidden: int) -> None:
        super().__init__()
        # no linear layers: nothing but this module is asked for its weights, as upstream's routers have it
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.zeros(num_experts, hidden))

    @classmethod
    def of(cls, gating: PreGating, weight_ED: Tensor) -> Nonlinear | None:
        """For a gate whose linear map has the weight `weight_ED` and that decides for another block than its own; None
        for a linear gate."""
        E, D = weight_ED.shape
        return cls(D, E, gating.gate_width) if gating.has_mlp else None

    def forward(self, seen: Tensor) -> Tensor:
        """The logits (..., E) to add, from states (..., D); in their dtype, whatever autocast is set to."""
        with torch.autocast(seen.device.type, enabled=False):
            return F.linear(F.silu(F.linear(seen, self.up.to(seen.dtype))), self.down.to(seen.dtype))


def up_std(width: int) -> float:
    """The standard deviation of the random `up`: numbers of about unit size from normalised states."""
    return float(width**-0.5)
