"""When which slab moves: the paper's four policies as pure functions of what is known at a moment.

A policy answers two questions with the slabs to fetch, most urgent first: what follows from a route that has just been
committed, and what follows from a block about to run. What a block needs to run is always fetched, whatever the policy
says; with `gpu_only` it is always there. Knows nothing about slots, tensors or time.
"""

from __future__ import annotations

from collections.abc import Sequence

from pregate.config import Policy
from pregate.models.experts import ExpertKey, ExpertSpec


def fetched_on_route(policy: Policy, stack: str, block: int, experts: Sequence[int]) -> list[ExpertKey]:
    """What to fetch when the route of (stack, block) is committed; `experts` are the ids that it uses. With `pre_gated`
    all of them at once, while the blocks before still compute."""
    if policy is not Policy.pre_gated:
        return []
    return [ExpertKey(stack, block, expert) for expert in experts]


def fetched_on_enter(policy: Policy, family: ExpertSpec, stack: str, block: int) -> list[ExpertKey]:
    """What to fetch when (stack, block) begins, behind what it needs itself. With `prefetch_all` all experts of this
    block and the next, needed or not (the paper's Prefetch-All)."""
    if policy is not Policy.prefetch_all:
        return []
    blocks = [b for b in (block, block + 1) if b < len(family.layers[stack])]
    return [ExpertKey(stack, b, expert) for b in blocks for expert in range(family.num_experts)]
