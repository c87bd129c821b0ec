"""The experts of a model: how many there are, where checkpoints hold them, and what one computes.

Knows names, shapes and slices of tensors; knows nothing about modules or files.

Letters: N tokens of one expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor


class ExpertKey(NamedTuple):
    """One expert of one MoE block of one stack."""

    stack: str
    block: int
    expert: int

    @property
    def label(self) -> str:
        """As traces and messages name it."""
        return f"{self.stack} block {self.block} expert {self.expert}"


@dataclass(frozen=True)
class TensorSlice:
    """One matrix or bias of one expert in a checkpoint: `tensor[index]`, transposed if the checkpoint has it the other
    way round. `shape`: of the whole tensor; None where the slice is the whole tensor."""

    tensor: str
    index: tuple[int | slice, ...] = ()
    transposed: bool = False
    shape: tuple[int, ...] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the whole tensor."""
        part = tensor[self.index] if self.index else tensor
        return part.mT if self.transposed else part


ExpertLayout = Callable[[str, int, int], Sequence[TensorSlice]]
"""(stack, layer, expert) to the slices of the expert's matrices, in the order of `ExpertSpec.matrices`."""


@dataclass(frozen=True)
class ExpertSpec:
    """The experts of a model: how many, of which matrices, where checkpoints keep them, and what one computes.

    top_k: experts of one token in one block. lookahead: of the model; so many blocks ahead experts are asked for.
    matrices: name and shape of each matrix or bias of one expert. layers: the layer numbers of the MoE blocks of each
    stack, in order. layouts: every way in which checkpoints hold experts; the model's own parameters have the first.
    apply: (matrices, hidden_ND) to (N, D), with the arithmetic of the resident expert in evaluation. activation: the
    name of that arithmetic among the kernels of the device-driven engine. constants: the numbers that it takes. joined:
    names of matrices that `apply` takes as one with the matrix before them, their rows behind its rows. dropout: the
    rate of a resident expert's own dropout in training; `apply` then takes a third argument, the function that drops.
    None for experts without one.
    """

    num_experts: int
    top_k: int
    lookahead: int
    matrices: dict[str, tuple[int, ...]]
    layers: dict[str, list[int]]
    layouts: tuple[ExpertLayout, ...]
    apply: Callable[..., Tensor]
    activation: str
    constants: tuple[float, ...] = ()
    joined: tuple[str, ...] = ()
    dropout: float | None = None

    @cached_property
    def products(self) -> tuple[tuple[str, ...], ...]:
        """Names of the matrices, those that are joined together."""
        found: list[tuple[str, ...]] = []
        for name in self.matrices:
            found.append((*found.pop(), name) if name in self.joined else (name,))
        return tuple(found)

    @cached_property
    def _keys(self) -> tuple[ExpertKey, ...]:
        return tuple(
            ExpertKey(stack, block, expert)
            for stack, layers in self.layers.items()
            for block in range(len(layers))
            for expert in range(self.num_experts)
        )

    def keys(self) -> list[ExpertKey]:
        """All experts, in the order of execution."""
        return list(self._keys)

    def slices(self, key: ExpertKey) -> Sequence[TensorSlice]:
        """Where the matrices of an expert are, in the layout that comes first."""
        return self.layouts[0](key.stack, self.layers[key.stack][key.block], key.expert)

    def tensor_names(self, key: ExpertKey) -> list[str]:
        """The tensors that hold an expert, each once."""
        return list(dict.fromkeys(part.tensor for part in self.slices(key)))

    def tensors_of(self, stack: str, block: int) -> dict[str, tuple[int, ...]]:
        """Name and whole shape of every tensor that holds experts of one MoE block."""
        return {
            part.tensor: part.shape or shape
            for expert in range(self.num_experts)
            for part, shape in zip(self.slices(ExpertKey(stack, block, expert)), self.matrices.values(), strict=True)
        }

    def as_found_in(self, names: Mapping[str, Any]) -> ExpertSpec:
        """The same with a layout first that gives each block the layout whose tensors are among `names`, or where there
        is none, the model's own; unchanged where all have that."""
        own = self.layouts[0]
        chosen = {
            (stack, layer): next(
                (at for at in self.layouts if all(part.tensor in names for part in at(stack, layer, 0))), own
            )
            for stack, layers in (self.layers.items() if self.num_experts else ())
            for layer in layers
        }
        if all(layout is own for layout in chosen.values()):
            return self

        def found(stack: str, layer: int, expert: int) -> Sequence[TensorSlice]:
            return chosen[stack, layer](stack, layer, expert)

        return replace(self, layouts=(found, *self.layouts))
