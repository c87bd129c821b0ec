"""The routes of one forward call of one stack, handed from MoE block to MoE block.

A stack makes one `Routes` for each call and gives it to its layers. A block commits what its gates decide and takes the
route that was decided for it. Nothing of it outlives the call, so two models in one process, re-entrant calls and
recomputed layers cannot mix routes up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pregate.models.pregating import GatePlacement
from pregate.models.routing import Routing, straight_through

RouteListener = Callable[[str, int, Routing], None]
"""Gets (stack, block, routing) at the moment when the route of that block is committed."""


class Routes:
    """block -> its route, for the blocks of `stack` that are decided so far."""

    def __init__(self, stack: str, listener: RouteListener | None = None) -> None:
        self.stack, self._listener = stack, listener
        self._decided: dict[int, Routing] = {}
        self._unused: set[int] = set()

    def commit(self, block: int, routing: Routing) -> None:
        """The route of `block` is decided. Only the first decision counts: a layer that is recomputed for its gradients
        decides the same again."""
        if block in self._decided:
            return
        self._decided[block] = routing
        self._unused.add(block)
        if self._listener is not None:
            self._listener(self.stack, block, routing)

    def of(self, block: int) -> Routing:
        """The route of `block`, for the block itself."""
        self._unused.discard(block)
        return self._decided[block]

    def end(self) -> tuple[Tensor, ...]:
        """The stack has run. Every route must have been used. Returns the experts (B, T, K) of each block, in order."""
        assert not self._unused, f"routes of blocks {sorted(self._unused)} were never used"
        return tuple(self._decided[block].expert_ids_BTK for block in sorted(self._decided))


def _call(gate: Any, hidden_BTD: Tensor) -> Routing:
    return gate(hidden_BTD)


class BlockGates(nn.Module):
    """The module of the gates that sit in one MoE block. A subclass makes them; it may be the whole block.

    index: the number of the block in `stack`. router: the block's own gate, or None; with `weighs` it only weighs the
    experts that another gate has chosen for the block. pre_gate: the gate of the later block `target`, or None. A gate
    maps hidden states (B, T, D) to a `Routing`.
    """

    router: Any
    pre_gate: Any

    def __init__(self, stack: str, index: int, placed: GatePlacement, *args: Any) -> None:
        """`args`: of the class that a subclass also derives from."""
        super().__init__(*args)
        self.stack, self.index, self.target, self.weighs = stack, index, placed.target, placed.weighs

    def route(self, hidden_BTD: Tensor, routes: Routes, call: Callable[[Any, Tensor], Routing] = _call) -> Routing:
        """Evaluate the gates that sit here, commit what they decide, and return the route of this block. `call`
        evaluates a gate."""
        # the block's own route first: it is needed first
        if self.router is not None and not self.weighs:
            routes.commit(self.index, call(self.router, hidden_BTD))
        if self.pre_gate is not None:
            assert self.target is not None
            routes.commit(self.target, call(self.pre_gate, hidden_BTD))
        routing = routes.of(self.index)
        if not self.weighs:
            return routing
        assert self.router is not None
        weights_BTK = self.router.weigh(hidden_BTD, routing.expert_ids_BTK)
        return routing._replace(weights_BTK=straight_through(weights_BTK, routing.weights_BTK))
