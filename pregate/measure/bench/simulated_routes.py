"""Which experts the tokens of a simulated request choose: every expert is equally likely, as with random weights."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What is served: `batch` tokens a step, each block's experts drawn evenly, or exactly `active_experts` of them."""

    batch: int = 1
    active_experts: int | None = None

    def route(self, num_experts: int, top_k: int, draw: random.Random) -> list[int]:
        """The distinct experts of one block in one step."""
        if self.active_experts is not None:
            return list(range(self.active_experts))
        chosen = [expert for _ in range(self.batch) for expert in draw.sample(range(num_experts), top_k)]
        return list(dict.fromkeys(chosen))
