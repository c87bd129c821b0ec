"""How many experts a block uses at once: counted, or forced to a number for a study of it.

Both watch the gates themselves, before a route is announced, so that whole models and engines see the same routes.
Knows gates and routes; knows nothing about engines or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pregate.models.family import family_of_model
from pregate.models.pregated_models import Gate
from pregate.models.routing import DROPPED, Routing


@contextmanager
def forced_experts(model: Any, num_active: int | None) -> Iterator[None]:
    """While it lasts, every route uses the first `num_active` experts in turn, as far as its choices go; None changes
    nothing.

    The K choices of a token are K experts in a row, and the next token goes on behind them. Combine weights stay the
    gate's.
    """

    def spread(routing: Routing) -> Routing:
        assert num_active is not None
        ids_BTK = routing.expert_ids_BTK
        order = torch.arange(ids_BTK.numel(), device=ids_BTK.device).view_as(ids_BTK)
        return routing._replace(expert_ids_BTK=order % num_active)

    with _after_decisions(model.gates() if num_active is not None else (), spread):
        yield


@contextmanager
def counted_experts(model: Any) -> Iterator[list[int]]:
    """While it lasts, the distinct experts of each route of the last stack, one number for each block and decoding
    step."""
    counts: list[int] = []

    def count(routing: Routing) -> Routing:
        ids = routing.expert_ids_BTK
        if ids.shape[1] == 1:  # a prompt may pass through the last stack too
            counts.append(ids[ids != DROPPED].unique().numel())
        return routing

    with _after_decisions(model.gates(family_of_model(model).stacks[-1]), count):
        yield counts


@contextmanager
def _after_decisions(gates: Iterable[Gate], change: Callable[[Routing], Routing]) -> Iterator[None]:
    def changed(_: Any, __: Any, routing: Any) -> Any:
        return change(routing)

    hooks = [gate.register_forward_hook(changed) for gate in gates]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
