"""When a linear layer may be computed from its weight, and how to compute it where that is not so.

What hooks, wraps or replaces a module (offloading, adapters, quantisation, sharding) acts when the module is called:
a weight that is read beside it may be a placeholder, or half of the story. Knows nothing about gates or heads.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

ROWS = 32
"""Rows of a product in a short dtype on a CPU come in multiples of this. A product is compiled for its sizes when they
are first met, which takes longer than most products do, and other numbers of rows are slower besides."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def active_autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of matrix products under the autocast that is in force, `None` where none is. Some kinds of device have
    no autocast, the meta device among them; asking torch whether theirs is on raises an error."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `layer` is exactly `F.linear(x, layer.weight, layer.bias)`, and nothing else happens."""
    return (
        type(layer) is nn.Linear
        # a weight of another kind (quantised, sharded) knows by itself how it is multiplied
        and type(layer.weight) in (nn.Parameter, Tensor)
        # offloading and quantising tools put another forward on the instance
        and "forward" not in vars(layer)
        and layer._compiled_call_impl is None
        and not has_hooks(layer)
        and not _has_any_global_hook()
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether something of its own happens when `module` is called, or gradients pass it."""
    return any(getattr(module, name) for name in HOOKS)


def linear_in(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`layer` of `x`, computed in `dtype` whatever autocast says.

    A plain layer of another dtype keeps its weights as they are. Any other one stays converted, as upstream
    does with its routers: only the module itself knows how its weights come about.
    """
    with torch.autocast(x.device.type, enabled=False):
        if not is_plain(layer):
            return layer.to(dtype)(x.to(dtype))
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), layer.weight.to(dtype), bias)
