"""A gate's decision for the tokens of a decoding step, in as few launches as it takes.

Knows logits and routes; knows nothing about slots or experts. Letters: B rows, D model width, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pregate.engine.device.ops.first_choice import first_choice
from pregate.engine.device.ops.gate_logits import gate_logits
from pregate.models.families.switch_router import EmbeddingGate, SwitchGate
from pregate.models.linear import has_hooks, is_plain
from pregate.models.routing import Routing, router_logits


def decide(gate: Any, hidden_B1D: Tensor) -> Routing:
    """What `gate` decides where the model calls it. `perturb`, which in evaluation changes nothing but the dtype, is
    left out where nothing else happens in that call."""
    return gate(hidden_B1D) if is_called(gate) else gate.decide(hidden_B1D, hidden_B1D.dtype)


def is_called(gate: nn.Module) -> bool:
    """Whether a gate has to be called as the model calls it: its `forward` is another than the family's, or hooks watch
    it."""
    if not isinstance(gate, SwitchGate):
        return True
    family = EmbeddingGate.forward if isinstance(gate, EmbeddingGate) else SwitchGate.forward
    other = _is_other(gate, "forward", family) or _is_other(gate, "perturb", SwitchGate.perturb)
    return other or has_hooks(gate)


def _is_other(module: nn.Module, name: str, method: Any) -> bool:
    return name in vars(module) or getattr(type(module), name) is not method


def for_steps(gate: SwitchGate) -> SwitchGate:
    """Have `gate` decide a step's tokens by `gate_logits` and `first_choice`, and keep its weights in the dtype it
    routes in for good, instead of converting them at every step; the same logits and the same routes."""
    for part in filter(None, (gate.classifier, gate.nonlinear)):
        for name, parameter in list(part.named_parameters()):
            converted = parameter.detach().to(gate.dtype)
            setattr(part, name, nn.Parameter(converted, requires_grad=False))
    gate.score = partial(_score, gate)  # type: ignore[method-assign]
    gate.choose = partial(_choose, gate)  # type: ignore[method-assign]
    return gate


def _score(gate: SwitchGate, seen_BTD: Tensor) -> Tensor:
    if not is_plain(gate.classifier):
        return SwitchGate.score(gate, seen_BTD)
    weight, bias = gate.classifier.weight, gate.classifier.bias
    if seen_BTD.shape[1] > 1 or weight.dtype != gate.dtype:
        logits_BTE = router_logits(seen_BTD, weight, bias, gate.dtype)
    else:
        logits_BTE = gate_logits(seen_BTD, weight, bias)
    return gate.with_nonlinear(logits_BTE, seen_BTD)


def _choose(gate: SwitchGate, logits_BTE: Tensor, dtype: torch.dtype) -> Routing:
    if logits_BTE.shape[1] > 1 or gate.capacity < 1:
        return SwitchGate.choose(gate, logits_BTE, dtype)
    return Routing(*first_choice(logits_BTE, dtype), logits_BTE)
