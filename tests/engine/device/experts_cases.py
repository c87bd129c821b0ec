"""Random experts in slots, and the choices of a decoding step, for the tests of the operation and of its kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pregate.config import SlabDtype
from pregate.engine.device.ops.expert_outputs import ExpertScratch
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.expert_math import Factor, grouped_experts, project
from pregate.models.experts import ExpertSpec, TensorSlice
from pregate.models.families.gpt_oss import clamped_unit
from pregate.models.gated_experts import gated_unit

NOT_A_NUMBER = 255
"""As a byte, in every place: NaN in all dtypes, or a scale of NaN."""


CLAMP = (1.702, 0.7)
"""A limit that every third number of these cases is beyond."""


def family_of(activation: str = "relu", **matrices: tuple[int, ...]) -> ExpertSpec:
    return ExpertSpec(
        num_experts=2,
        top_k=1,
        lookahead=0,
        matrices=dict(matrices),
        layers={"decoder": [0]},
        layouts=(lambda _, __, expert: [TensorSlice(f"{expert}.{matrix}") for matrix in matrices],),
        activation=activation,
        constants=CLAMP if activation == "gated_clamped" else (),
        apply={"relu": relu_unit, "gated_silu": gated_unit("silu"), "gated_clamped": clamped_unit(*CLAMP)}[activation],
    )


def relu_unit(matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
    return project(torch.relu(project(hidden_ND, matrices[0])), matrices[1])


def shapes_of(activation: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    into = ("wi",) if activation == "relu" else ("gate", "up")
    matrices = {**dict.fromkeys(into, (hidden, width)), "wo": (width, hidden)}
    biases = {f"{name}_bias": shape[:1] for name, shape in matrices.items() if activation == "gated_clamped"}
    return {**matrices, **biases}


@dataclass(frozen=True)
class ExpertsCase:
    """Everything `expert_outputs` takes; slots that no choice names, the scratch and the output hold NaN."""

    family: ExpertSpec
    layout: SlabLayout
    hidden_BD: Tensor
    slot_N: Tensor
    weights_N: Tensor
    slots_SB: Tensor
    scratch: ExpertScratch
    out_BD: Tensor

    @classmethod
    def random(
        cls,
        seed: int,
        slots: list[int],
        *,
        width: int,
        hidden: int,
        dtype: torch.dtype = torch.float32,
        stored: SlabDtype = SlabDtype.source,
        top_k: int = 1,
        activation: str = "relu",
        weighed: torch.dtype | None = None,
    ) -> ExpertsCase:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, spread: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator) * spread

        family = family_of(activation, **shapes_of(activation, width, hidden))
        layout = SlabLayout.of(family, dtype, stored)
        slots_SB = torch.full((max(*slots, 0, 1) + 2, layout.slab_bytes), NOT_A_NUMBER, dtype=torch.uint8)
        for slot in set(slots) - {-1}:
            shapes = family.matrices.values()
            matrices = [normal(*shape, spread=shape[-1] ** -0.5 if shape[1:] else 0.5) for shape in shapes]
            layout.encode([matrix.to(dtype) for matrix in matrices], slots_SB[slot])
        num_tokens = len(slots) // top_k
        scratch = ExpertScratch.empty(len(slots), layout, "cpu")
        for tensor in scratch:
            tensor.fill_(float("nan"))
        return cls(
            family,
            layout,
            normal(num_tokens, width).to(dtype),
            torch.tensor(slots, dtype=torch.int32),
            torch.rand(len(slots), generator=generator).to(weighed or dtype),
            slots_SB,
            scratch,
            torch.full((num_tokens, width), float("nan"), dtype=dtype),
        )

    def converted(self, convert: Callable[[Tensor], Tensor]) -> ExpertsCase:
        """With every tensor replaced by what `convert` makes of it."""
        tensors = {name: convert(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        scratch = ExpertScratch(*map(convert, self.scratch))
        return replace(self, scratch=scratch, **tensors)

    def copied_to(self, device: str) -> ExpertsCase:
        return self.converted(lambda tensor: tensor.to(device, copy=True))

    @property
    def arguments(self) -> tuple[Any, ...]:
        tensors = self.hidden_BD, self.slot_N, self.weights_N, self.slots_SB, *self.scratch, self.out_BD
        return *tensors, self.layout.text, self.family.activation, self.family.constants

    def resident(self) -> Tensor:
        """What the resident experts of a model make of it, each slot an expert."""
        num_tokens = self.hidden_BD.shape[0]
        return grouped_experts(
            self.hidden_BD,
            self.slot_N.long().view(num_tokens, -1),
            self.weights_N.view(num_tokens, -1),
            self.slots_SB.shape[0],
            lambda slot, hidden_ND: self.family.apply(self.layout.decode(self.slots_SB[slot]), hidden_ND),
        )


def assert_close(got: Tensor, expected: Tensor, note: object = "") -> None:
    """Within a few roundings of the largest number: sums in another order, and what that moves across a rounding."""
    got, expected = got.cpu(), expected.cpu()
    steps = 64 if expected.dtype is torch.float32 else 4
    bound = steps * torch.finfo(expected.dtype).eps * max(expected.abs().max().item(), 1e-3)
    worst = (got.double() - expected.double()).abs().max().item()
    assert worst <= bound, f"{note} {worst} is above {bound}\n{got}\n{expected}"
