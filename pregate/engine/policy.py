"""When which slab moves: the paper's four policies as pure functions of what is known at a moment.

Each policy answers two questions with the slabs to fetch, most urgent first: what follows from a route that has
just been committed, and what follows from a block about to run. What a block needs to run is always fetched,
whatever the policy says. Knows nothing about slots, tensors or time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pregate.config import Policy
from pregate.models.family import ExpertKey, ExpertSpec


class MovePolicy(Protocol):
    def on_route(self, stack: str, block: int, experts: Sequence[int]) -> list[ExpertKey]:
        """Fetches to start when the route of (stack, block) is committed; `experts` are the ids it uses."""
        ...

    def on_enter(self, stack: str, block: int) -> list[ExpertKey]:
        """Fetches to start when (stack, block) begins, behind those it needs itself."""
        ...


class OnDemand:
    """Nothing moves before the block that needs it runs. Also serves `gpu_only`, where everything is there."""

    def on_route(self, stack: str, block: int, experts: Sequence[int]) -> list[ExpertKey]:
        return []

    def on_enter(self, stack: str, block: int) -> list[ExpertKey]:
        return []


class PreGated:
    """A committed route is fetched at once, while the blocks before it still compute."""

    def on_route(self, stack: str, block: int, experts: Sequence[int]) -> list[ExpertKey]:
        return [ExpertKey(stack, block, expert) for expert in experts]

    def on_enter(self, stack: str, block: int) -> list[ExpertKey]:
        return []


class PrefetchAll:
    """While a block runs, all experts of the next one move, needed or not (the paper's Prefetch-All)."""

    def __init__(self, family: ExpertSpec) -> None:
        self._family = family

    def on_route(self, stack: str, block: int, experts: Sequence[int]) -> list[ExpertKey]:
        return []

    def on_enter(self, stack: str, block: int) -> list[ExpertKey]:
        blocks = [b for b in (block, block + 1) if b < len(self._family.layers[stack])]
        return [ExpertKey(stack, b, expert) for b in blocks for expert in range(self._family.num_experts)]


def make_policy(policy: Policy, family: ExpertSpec) -> MovePolicy:
    if policy is Policy.pre_gated:
        return PreGated()
    if policy is Policy.prefetch_all:
        return PrefetchAll(family)
    return OnDemand()


def default_slots(policy: Policy, family: ExpertSpec) -> int:
    """Slots where the user sets no budget: all experts for `gpu_only`, two blocks for `prefetch_all`, else four
    experts for each block whose fetch can be under way at the same time."""
    total = len(family.keys())
    if policy is Policy.gpu_only:
        return total
    if policy is Policy.prefetch_all:
        return min(total, 2 * family.num_experts)
    return min(total, (family.lookahead + 1) * min(family.num_experts, 4 * family.top_k))
