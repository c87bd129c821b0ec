"""The one place where fetches of the host-driven computation begin: a policy is asked, and a scheduler does it.

Knows keys and experts' numbers; knows nothing about tensors, so that the planner can run it against a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pregate.config import Policy
from pregate.engine.fetch_policy import fetched_on_enter, fetched_on_route
from pregate.engine.scheduler import Scheduler
from pregate.models.experts import ExpertKey, ExpertSpec


class Fetcher:
    """Told of routes and of blocks that begin. `reads_routes`: whether the policy does anything with routes."""

    def __init__(self, policy: Policy, family: ExpertSpec, scheduler: Scheduler) -> None:
        self.reads_routes = policy is Policy.pre_gated
        self._policy, self._family, self._scheduler = policy, family, scheduler

    def on_route(self, stack: str, block: int, experts: Sequence[int]) -> None:
        """The route of (stack, block) is committed; `experts` are the ids that it uses, most urgent first."""
        self._scheduler.request(fetched_on_route(self._policy, stack, block, experts))

    def on_enter(self, stack: str, block: int, needed: Iterable[ExpertKey]) -> None:
        """(stack, block) begins. What it needs comes before everything that was announced earlier."""
        self._scheduler.request(needed, urgent=True)
        self._scheduler.request(fetched_on_enter(self._policy, self._family, stack, block))
