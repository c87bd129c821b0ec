"""Registers the operations of a decoding step with torch, as `torch.ops.pregate.NAME`.

torch chooses the implementation by the device of the tensors: the reference implementation in plain torch on a CPU, a
Triton kernel on CUDA, and for fake and meta tensors one that gives shapes alone.

`torch.library.custom_op` would add bookkeeping for autograd, in Python, to every call: measured on a CPU, 8 µs instead
of 2. These operations run under `inference_mode` and have no gradients, so they are registered one level below it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("pregate", "DEF")


def _returns_nothing(*_: Any) -> None:
    return None


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    fake: Callable[..., Any] = _returns_nothing,
) -> Callable[..., Any]:
    """The operation of `schema`, as torch writes one: arguments that it writes to are marked, and no result shares
    memory with an argument. The implementations take the arguments by position. `fake` makes empty results."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"pregate::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.pregate, name).default
