"""Registers the operations of a decoding step with torch, as `torch.ops.pregate.NAME`.

torch chooses the implementation by the device of the tensors: the reference implementation in plain torch on a CPU, a
Triton kernel on CUDA, and for fake and meta tensors one that gives shapes alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K", bound=Callable[..., Any])

OPERATIONS: dict[str, Operation[..., Any]] = {}
"""All of them, by name."""
_LIBRARY = torch.library.Library("pregate", "DEF")


class Operation(Generic[P, R]):
    """Called like its reference implementation.

    `torch.library.custom_op` would add bookkeeping for autograd, in Python, to every call: measured on a CPU, 8 µs
    instead of 2. These operations run under `inference_mode` and have no gradients, so they are registered below it.
    """

    def __init__(self, reference: Callable[P, R], writes: tuple[str, ...], fake: Callable[..., Any]) -> None:
        self.name, self.reference = reference.__name__, reference
        self.kernel: Callable[..., Any] | None = None
        reference.__annotations__ = inspect.get_annotations(reference, eval_str=True)
        _LIBRARY.define(self.name + torch.library.infer_schema(reference, mutates_args=writes))
        _LIBRARY.impl(self.name, reference, "CPU")
        torch.library.register_fake(f"pregate::{self.name}", fake, lib=_LIBRARY)
        self.chosen: Callable[..., Any] = getattr(torch.ops.pregate, self.name).default
        functools.update_wrapper(self, reference)
        OPERATIONS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.chosen(*args, **kwargs)

    def on_cuda(self, kernel: K) -> K:
        """Decorates the function that launches the kernel."""
        _LIBRARY.impl(self.name, kernel, "CUDA")
        self.kernel = kernel
        return kernel


def operation(
    *writes: str, fake: Callable[..., Any] = lambda *_, **__: None
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Makes an operation of its reference implementation. `writes`: the arguments that it changes; no result may share
    memory with an argument. `fake`: its results with right shapes and any numbers."""
    return lambda reference: Operation(reference, writes, fake)
