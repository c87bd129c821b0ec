"""The settings of pre-gating: how far ahead gates decide, which stacks, and what kind of gate."""

from __future__ import annotations

from dataclasses import dataclass

from pregate.config.choices import Entry, GateKind, Init, Weights
from pregate.config.validators import Limit, at_least, need, setting

LOOKAHEADS = Limit(lambda n: 0 <= n <= 3, "is outside 0 to 3: 0 is conventional, 1 the paper's choice")


@dataclass
class PreGateConfig:
    """How routers are re-attached; `lookahead: 0` is the conventional model, `stacks: null` all stacks that it has.
    `weights`: who weighs the experts that a gate ahead has chosen. `start`: so many MoE blocks of each stack stay
    conventional. `gate`: whether gates that decide for another block are linear, or have beside it a network of two
    layers with `gate_width` hidden numbers."""

    lookahead: int = setting(1, LOOKAHEADS)
    stacks: list[str] | None = None
    entry: Entry = Entry.own
    init: Init = Init.source
    weights: Weights = Weights.early
    start: int = setting(0, at_least(0))
    gate: GateKind = GateKind.linear
    gate_width: int = setting(256, at_least(1))

    def check(self, prefix: str) -> None:
        need(
            self.lookahead > 0 or self.gate == GateKind.linear,
            f"{prefix}gate={self.gate} needs a gate that decides ahead, and {prefix}lookahead=0 has none: set "
            f"{prefix}lookahead=1, or leave {prefix}gate out.",
        )
        named = self.stacks
        need(
            named is None or 0 < len(named) == len(set(named)),
            f"{prefix}stacks={named} must name at least one stack, each once, or be null for all.",
        )
