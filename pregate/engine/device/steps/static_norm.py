"""A layer's root-mean-square norm as one launch.

Which norm of upstream's that is, is found out before any step, with numbers in host memory. Knows norms only.

Letters: N rows, D model width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from pregate.engine.device.ops.residual_and_norm import norm
from pregate.models.linear import has_hooks


def static_norm(module: Any, dtype: torch.dtype) -> Any:
    """A norm of one launch in the place of `module`, if that is a root-mean-square norm that `norm` computes in
    `dtype`; else `module`."""
    named = dict(module.named_parameters())
    is_like_it = named.keys() == {"weight"} and hasattr(module, "variance_epsilon")
    if not is_like_it or named["weight"].dtype != dtype or has_hooks(module):
        return module
    rounds_last = _rounds_last(type(module), dtype)
    if rounds_last is None:
        return module
    return lambda hidden: norm(hidden, module.weight, module.variance_epsilon, rounds_last=rounds_last)


@cache
def _rounds_last(kind: type[nn.Module], dtype: torch.dtype) -> bool | None:
    """Where norms of a class round, by what one makes of random numbers; None if that is not what `norm` computes."""
    draw = torch.Generator().manual_seed(0)
    hidden_ND, weight_D = (torch.randn(*shape, generator=draw, device="cpu").to(dtype) for shape in ((64, 64), (64,)))
    eps = 1e-3
    tried: Any = kind.__new__(kind)
    nn.Module.__init__(tried)
    tried.weight, tried.variance_epsilon = nn.Parameter(weight_D, requires_grad=False), eps
    try:
        found_ND = tried(hidden_ND)
    except (AttributeError, TypeError):
        return None  # it needs more than a norm has
    same = (n for n in (False, True) if torch.equal(norm.reference(hidden_ND, weight_D, eps, 1.0, n), found_ND))
    return next(same, None)
