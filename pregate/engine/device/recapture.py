"""What a captured step has for good. Where the model no longer has it, the step has to be captured anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn


def state_of(gates: Iterable[nn.Module], parts: Iterable[nn.Module]) -> list[Any]:
    """What a captured step has for good: which gates there are and how each decides, and where the weights of `parts`
    of the model lie. The numbers in a weight are read in every step and are not in it."""
    state: list[Any] = []
    for gate in gates:
        for module in gate.modules():
            state += [module, *_settings(module)]
    for part in parts:
        for tensor in (*part.parameters(), *part.buffers()):
            state += [tensor, tensor.data_ptr()]
    return state


def _settings(module: nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if name in ("_forward_hooks", "_forward_pre_hooks"):
            yield from value.values()
        elif not name.startswith("_"):
            yield from (name, value)


def is_same(state: list[Any], other: list[Any]) -> bool:
    """Whether two states of `state_of` are the same objects and the same numbers."""
    plain = (bool, int, float, str)
    return len(state) == len(other) and all(
        one is two or (isinstance(one, plain) and type(one) is type(two) and one == two)
        for one, two in zip(state, other, strict=True)
    )
