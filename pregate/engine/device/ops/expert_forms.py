"""The forms of experts that the kernels compute: which matrices and biases there are, and what is between them.

Knows names, shapes and activations; knows nothing about slots or kernels.

Letters: N choices, D model width, F expert hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pregate.config import UsageError
from pregate.engine.storage.slabs import MatrixPlace, SlabLayout
from pregate.models.gated_experts import clamped_product


class Activation(NamedTuple):
    """What is between an expert's matrices. apply: of the results (N, F) of the matrices that read the input, and of
    the family's constants. gated: these are a gate and an up matrix, else one. biased: every matrix has a bias.
    constants: how many there are."""

    apply: Callable[..., Tensor]
    gated: bool
    biased: bool = False
    constants: int = 0


def _gated_silu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    return F.silu(gate_NF) * up_NF


ACTIVATIONS = {
    "relu": Activation(torch.relu, gated=False),
    "gated_silu": Activation(_gated_silu, gated=True),
    "gated_clamped": Activation(clamped_product, gated=True, biased=True, constants=2),
}
"""By the names of `ExpertSpec.activation`."""


class Linear(NamedTuple):
    """What the kernel computes in one launch: matrices of the same shape over the same input, and the bias of each,
    or none."""

    matrices: Sequence[MatrixPlace]
    biases: Sequence[MatrixPlace]


def into_and_out(layout: SlabLayout, activation: str) -> tuple[Linear, Linear]:
    """The matrices (F, D) of an expert that read its input, gate first where there is one, and the one (D, F) that
    makes its output. Raises `UsageError` for experts of another form."""
    check_activation(activation)
    form, places = ACTIVATIONS[activation], layout.matrices
    num_matrices = 2 + form.gated
    matrices, biases = places[:num_matrices], places[num_matrices:]
    shapes = [place.shape for place in matrices]
    fits = len(shapes) == num_matrices and len(shapes[0]) == 2 and len({*shapes[:-1], shapes[-1][::-1]}) == 1
    if not fits or [place.shape for place in biases] != [shape[:1] for shape in shapes if form.biased]:
        named = ", ".join(f"{place.name} {place.shape}" for place in places)
        wanted = "a gate, an up and a down matrix" if form.gated else "an up and a down matrix"
        wanted += ", and then a bias for each" if form.biased else ""
        raise UsageError(f"Experts of {named} cannot be computed on the device, only {wanted}: use the host engine.")
    return Linear(matrices[:-1], biases[:-1]), Linear(matrices[-1:], biases[-1:])


def check_activation(activation: str) -> None:
    """Raises `UsageError` for an activation, by its name in a model's config, that no kernel has."""
    if activation not in ACTIVATIONS:
        raise UsageError(
            f"Experts with the activation {activation!r} cannot be computed on the device, only "
            f"{', '.join(ACTIVATIONS)}: use the host engine."
        )
