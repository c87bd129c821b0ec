"""How far ahead the gates of a model decide: one object, validated in one place.

Knows the `pregate` section of a config and the `pregate` settings of a run. Stacks are names to it. Knows nothing about
modules or tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from pregate.config import Entry, GateKind, PreGateConfig, Run, UsageError, Weights

SETTINGS = ("lookahead", "stacks", "entry", "init", "weights", "start", "gate", "gate_width")


class GatePlacement(NamedTuple):
    """Which gates sit in one MoE block. own: one for the block itself. target: the later block that a pre-gate there
    decides for, or None. weighs: the block's own gate chooses nothing, it weighs the experts that another has chosen.
    """

    own: bool
    target: int | None
    weighs: bool = False


@dataclass(frozen=True)
class PreGating:
    """The `pregate` section of a model's config. `stacks`: those that are pre-gated; an empty tuple means all stacks
    that a model has, until `within` names them. `weights`: `early`, the combine weights are those of the gate that
    chooses, or `late`, those of the block's own router. `start`: the first block of a stack that is pre-gated.
    `gate`: `linear`, or `mlp` for gates that decide for another block with `gate_width` hidden numbers too."""

    lookahead: int = 0
    stacks: tuple[str, ...] = ()
    entry: str = "own"
    init: str = "source"
    weights: str = "early"
    start: int = 0
    gate: str = "linear"
    gate_width: int = 256

    @classmethod
    def from_dict(cls, section: Mapping[str, Any] | None) -> PreGating:
        """Raises `UsageError` for a section that cannot be used."""
        section = dict(section or {})
        unknown = sorted(set(section) - set(SETTINGS))
        if unknown:
            raise UsageError(f"The pregate section of config.json has unknown keys {unknown}: remove them.")
        gating = cls(**{**section, "stacks": tuple(section.get("stacks") or ())})
        known = gating.entry in list(Entry) and gating.weights in list(Weights) and gating.gate in list(GateKind)
        none_ahead = gating.has_mlp and not gating.lookahead
        if not known or none_ahead or min(gating.lookahead, gating.start, gating.gate_width - 1) < 0:
            raise UsageError(f"The pregate section of config.json cannot be used: {section}.")
        return gating

    @classmethod
    def of_config(cls, gate: PreGateConfig) -> PreGating:
        """What the `pregate` settings of a run ask for."""
        named = {name: str(getattr(gate, name)) for name in ("entry", "init", "weights", "gate")}
        return cls(gate.lookahead, tuple(gate.stacks or ()), start=gate.start, gate_width=gate.gate_width, **named)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stacks": list(self.stacks)}

    def within(self, num_blocks: Mapping[str, int]) -> PreGating:
        """The same for a model whose stacks have so many MoE blocks, its stacks named in the model's order.

        Raises `UsageError` for a stack that the model does not have, and for a lookahead or a start that a stack has
        too few MoE blocks for.
        """
        unknown = [stack for stack in self.stacks if stack not in num_blocks]
        if unknown:
            raise UsageError(
                f"pregate.stacks={_shown(self.stacks)} names {unknown[0]}, but the model has {', '.join(num_blocks)}: "
                "name some of these, each once, or leave the setting out."
            )
        named = tuple(stack for stack in num_blocks if not self.stacks or stack in self.stacks)
        for stack in named if self.lookahead else ():
            if self.lookahead >= num_blocks[stack]:
                raise UsageError(
                    f"pregate.lookahead={self.lookahead} needs at least {self.lookahead + 1} MoE blocks in the "
                    f"{stack}, which has {num_blocks[stack]}: choose a smaller lookahead, or leave the {stack} out of "
                    "pregate.stacks."
                )
            if self.start + self.lookahead >= num_blocks[stack]:
                raise UsageError(
                    f"pregate.start={self.start} with pregate.lookahead={self.lookahead} needs at least "
                    f"{self.min_blocks} MoE blocks in the {stack}, which has {num_blocks[stack]}: "
                    f"choose a smaller start, or leave the {stack} out of pregate.stacks."
                )
        return replace(self, stacks=named)

    def naming(self, stacks: Sequence[str]) -> PreGating:
        """The same, where "all stacks" becomes the names of the model's `stacks`."""
        return self if self.stacks else replace(self, stacks=tuple(stacks))

    def lookahead_of(self, stack: str) -> int:
        return self.lookahead if not self.stacks or stack in self.stacks else 0

    def gates_at(self, stack: str, block: int, num_blocks: int) -> GatePlacement:
        """The gates of MoE block `block` of `stack`: from the start on, the gate of block i sits in block i -
        lookahead."""
        ahead = self.lookahead_of(stack)
        if not ahead:
            return GatePlacement(True, None)
        chooses = block < self.start or (block < self.start + ahead and self.entry == Entry.own)
        weighs = not chooses and self.weights == Weights.late
        target = block + ahead if block >= self.start and block + ahead < num_blocks else None
        return GatePlacement(chooses or weighs, target, weighs)

    def embedding_entries(self, stack: str, num_blocks: int) -> range:
        """The blocks whose route is decided from the stack's input embeddings."""
        ahead = self.lookahead_of(stack) if self.entry == Entry.embedding else 0
        return range(self.start, min(self.start + ahead, num_blocks)) if ahead else range(0)

    @property
    def has_mlp(self) -> bool:
        """Whether the gates that decide for another block have a network beside their linear map."""
        return self.gate == GateKind.mlp

    @property
    def min_blocks(self) -> int:
        """The fewest MoE blocks that a pre-gated stack can have."""
        return self.start + self.lookahead + 1

    def differences(self, other: PreGating) -> list[str]:
        """The names of the settings in which two gatings differ. The order of stacks means nothing, and neither do
        stacks that only one of the two names. For conventional models, lookahead 0, nothing else means anything, and
        for linear gates the width of others."""
        if not self.lookahead and not other.lookahead:
            return []
        either_open = not self.stacks or not other.stacks
        mine, theirs = (
            {**asdict(gating), "stacks": set() if either_open else set(gating.stacks)} for gating in (self, other)
        )
        if not self.has_mlp and not other.has_mlp:
            mine["gate_width"] = theirs["gate_width"]
        return [name for name, value in mine.items() if value != theirs[name]]

    def other_settings(self, stacks: Sequence[str]) -> str | None:
        """The settings beside lookahead and entry that change what is computed, in words; None for their defaults.
        `stacks`: all that the model has."""
        if not self.lookahead:
            return None
        some = self.stacks and set(self.stacks) != set(stacks)
        parts = [f"{' and '.join(self.stacks)} alone"] if some else []
        parts += [f"weights {self.weights}"] if self.weights != Weights.early else []
        parts += [f"start {self.start}"] if self.start else []
        parts += [f"gate {self.gate} of width {self.gate_width}"] if self.has_mlp else []
        return ", ".join(parts) or None

    def refuse_other(self, asked: PreGating, names: Collection[str], whose: str, advice: str) -> None:
        """Raises `UsageError` for the first setting among `names` in which this gating, of the model `whose`, is not
        what was asked for. `advice` may name the setting as {name} and its value here as {has}."""
        for name in self.differences(asked):
            if name in names:
                has, wanted = (_shown(getattr(gating, name)) for gating in (self, asked))
                raise UsageError(
                    f"{whose} has {name} {has}, but pregate.{name}={wanted} was asked for: "
                    f"{advice.format(name=name, has=has)}."
                )


def settings_asked_for(run: Run) -> set[str]:
    """The names of the `pregate` settings that the user named on the command line, one by one or as a group."""
    given = {override.lstrip("+").partition("=")[0] for override in run.overrides}
    # a group member says which gates there are; how they start is said by name
    as_group = set(SETTINGS) - {"init"} if "pregate" in given else set()
    return as_group | {name for name in SETTINGS if f"pregate.{name}" in given}


def settings_chosen(run: Run) -> set[str]:
    """`settings_asked_for`, and what an experiment has set: every setting that is not the default, and what an arm of
    the study stands for."""
    by_arm = {"lookahead", "init"} if any(override.lstrip("+").startswith("arm=") for override in run.overrides) else ()
    default, chosen = PreGating.of_config(PreGateConfig()), PreGating.of_config(run.pregate)
    stacks = {"stacks"} if chosen.lookahead and chosen.stacks != default.stacks else ()
    return settings_asked_for(run).union(by_arm, stacks, default.differences(chosen))


def _shown(value: Any) -> str:
    """As it is written on the command line."""
    return f"[{','.join(value)}]" if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
