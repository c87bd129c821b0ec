"""Upstream's router rules, asked for less than a route, or for more: what they choose by given logits, how they weigh
experts that were chosen elsewhere, and a route by more than their linear map.

The rule is always the `forward` of upstream's own class, which is given here as `rule`. Knows nothing about gates or
blocks.

Letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pregate.config import UsageError


def choices_by(router: nn.Module, rule: type[nn.Module], logits_TE: Tensor) -> Tensor:
    """The experts (T, K) that the rule chooses by these logits: it is asked of a router that reads logits, and whose
    linear map is the identity."""
    E = logits_TE.shape[-1]
    reader: Any = copy.copy(router)
    bias = {name: logits_TE.new_zeros(E) for name in router._parameters if name != "weight"}
    reader._parameters = {"weight": torch.eye(E, dtype=logits_TE.dtype, device=logits_TE.device), **bias}
    reader.hidden_dim = E
    return rule.forward(reader, logits_TE)[2]


class _ChosenElsewhere(TorchFunctionMode):
    """Inside, a router's choice among the scores of all experts gives `expert_ids_TK` and their scores. So all else of
    upstream's rule applies to them: which scores become weights, what they are divided by, scales, dtypes."""

    def __init__(self, expert_ids_TK: Tensor, num_experts: int) -> None:
        super().__init__()
        self._ids_TK, self._shape = expert_ids_TK, (len(expert_ids_TK), num_experts)
        self.num_choices = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # groups of experts are chosen among scores of another shape
        if func in (torch.topk, Tensor.topk) and args[0].shape == self._shape:
            self.num_choices += 1
            return torch.return_types.topk((args[0].gather(-1, self._ids_TK), self._ids_TK))
        return func(*args, **kwargs or {})


class _MoreThanLinear(TorchFunctionMode):
    """Inside, a router's linear map gives its own logits and what `added` makes of its input. So all of upstream's rule
    applies to the sum, and `added` sees the dtype that the family routes in."""

    def __init__(self, weight_shape: torch.Size, added: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._shape, self._added = weight_shape, added
        self.num_maps = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func is nn.functional.linear and args[1].shape == self._shape:
            self.num_maps += 1
            found = found + self._added(args[0]).to(found.dtype)
        return found


def route_with(router: nn.Module, added: Callable[[Tensor], Tensor], hidden_TD: Tensor) -> Any:
    """What upstream's router gives for its logits and those that are `added`, a function of what its linear map reads.
    Raises `UsageError` for a router that does not compute its logits by one `linear`."""
    with _MoreThanLinear(router.get_parameter("weight").shape, added) as mode:
        route = router(hidden_TD)
    if mode.num_maps != 1:
        raise UsageError(
            "pregate.gate=mlp needs a router that computes its logits once, by torch.nn.functional.linear, and "
            f"{type(router).__name__} does not: set pregate.gate=linear."
        )
    return route


def check_linear(router: nn.Module) -> None:
    """Raises `UsageError` for a router that `route_with` cannot ask, before any work."""
    weight_ED = router.get_parameter("weight").detach()
    route_with(router, lambda seen: seen.new_zeros(len(weight_ED)), torch.zeros_like(weight_ED[:1]))


def weights_by(router: nn.Module, rule: type[nn.Module], hidden_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """The combine weights (T, K) that upstream's own rule, the class `rule`, gives to experts chosen elsewhere. Raises
    `UsageError` for a rule that does not choose once, by `topk`, among the scores of all experts."""
    num_experts = len(router.get_parameter("weight"))
    with _ChosenElsewhere(expert_ids_TK, num_experts) as chosen:
        _, weights_TK, _ = rule.forward(router, hidden_TD)
    if chosen.num_choices != 1:
        raise UsageError(
            f"pregate.weights=late needs a router that chooses its experts once, by topk, and {rule.__name__} does "
            "not: set pregate.weights=early."
        )
    return weights_TK
