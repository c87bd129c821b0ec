"""The experts of one block for the few tokens of a decoding step, their weights read from slots.

The slot of each choice is known to the device alone, so nothing here depends on it but addresses. Knows slabs and
their arithmetic; knows nothing about routers, tables or moving.

Letters: B tokens (one of each sequence), K experts a token, N = B * K choices, S slots, D model width, F expert
hidden width. Choice n belongs to token n // K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pregate.config import UsageError
from pregate.engine.storage.slabs import MatrixPlace, SlabLayout

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu}
"""By the names that a model's config gives them."""


def up_and_down(layout: SlabLayout) -> tuple[MatrixPlace, MatrixPlace]:
    """The two matrices of an expert, (F, D) and (D, F). Raises `UsageError` for experts of another form."""
    shapes = [place.shape for place in layout.matrices]
    if len(shapes) != 2 or len(shapes[0]) != 2 or shapes[1] != shapes[0][::-1]:
        named = ", ".join(f"{place.name} {place.shape}" for place in layout.matrices)
        raise UsageError(
            f"Experts of {named} cannot be computed on the device, only an up and a down matrix: use the host engine."
        )
    return layout.matrices[0], layout.matrices[1]


def check_activation(activation: str) -> None:
    """Raises `UsageError` for an activation, by its name in a model's config, that no kernel has."""
    if activation not in ACTIVATIONS:
        raise UsageError(
            f"Experts with the activation {activation!r} cannot be computed on the device, only "
            f"{', '.join(ACTIVATIONS)}: use the host engine."
        )


@dataclass(frozen=True)
class ExpertScratch:
    """Room for what lies between an expert's matrices, made once. hidden_NF: after the activation. weighted_ND: each
    choice's weighted result, before a token's are added up. Both in the compute dtype."""

    hidden_NF: Tensor
    weighted_ND: Tensor

    @classmethod
    def empty(cls, num_choices: int, layout: SlabLayout, device: torch.device | str) -> ExpertScratch:
        width_F, width_D = up_and_down(layout)[0].shape
        return cls(
            torch.empty(num_choices, width_F, dtype=layout.dtype, device=device),
            torch.empty(num_choices, width_D, dtype=layout.dtype, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return self.hidden_NF.nbytes + self.weighted_ND.nbytes


def expert_outputs(
    hidden_BD: Tensor,
    slot_N: Tensor,
    weights_N: Tensor,
    slots_SB: Tensor,
    layout: SlabLayout,
    scratch: ExpertScratch,
    out_BD: Tensor,
    activation: str = "relu",
) -> None:
    """Into `out_BD`: for each token the sum over its choices of weight * down(activation(up(hidden))).

    hidden_BD, weights_N, out_BD: in the layout's dtype. slot_N: int32, where each choice's slab is; a choice with -1
    adds nothing. Rounds to the dtype where the resident expert does: after each matrix, after weighting, after the
    sum; dequantised weights are rounded to it as well. Raises `UsageError` for an activation or experts it lacks.
    """
    check_activation(activation)
    if hidden_BD.device.type == "cuda":
        from pregate.engine.device.ops.kernels_experts import launch_expert_outputs

        launch_expert_outputs(hidden_BD, slot_N, weights_N, slots_SB, layout, scratch, out_BD, activation)
    else:
        expert_outputs_twin(hidden_BD, slot_N, weights_N, slots_SB, layout, scratch, out_BD, activation)


def expert_outputs_twin(
    hidden_BD: Tensor,
    slot_N: Tensor,
    weights_N: Tensor,
    slots_SB: Tensor,
    layout: SlabLayout,
    scratch: ExpertScratch,
    out_BD: Tensor,
    activation: str = "relu",
) -> None:
    """`expert_outputs` in plain torch, one choice after the other, without reading a slot's number back."""
    up_and_down(layout)
    num_tokens, num_choices = hidden_BD.shape[0], slot_N.shape[0]
    top_k = num_choices // num_tokens
    for choice in range(num_choices):
        token = choice // top_k
        slot_1 = slot_N[choice : choice + 1]
        slab_B = slots_SB.index_select(0, slot_1.clamp_min(0).long())[0]
        up_FD, down_DF = layout.decode(slab_B)
        hidden_1F = ACTIVATIONS[activation](F.linear(hidden_BD[token : token + 1], up_FD))
        weighted_1D = F.linear(hidden_1F, down_DF) * weights_N[choice]
        scratch.weighted_ND[choice : choice + 1] = torch.where(slot_1[:, None] >= 0, weighted_1D, 0)
    weighted_ND = scratch.weighted_ND[:num_choices]
    out_BD.copy_(weighted_ND if top_k == 1 else weighted_ND.view(num_tokens, top_k, -1).sum(1))
