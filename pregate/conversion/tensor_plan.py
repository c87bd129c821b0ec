"""Which tensor of a conventional checkpoint becomes which tensor of the pre-gated one, and which the source lacks.

Knows names and how much goes into a file; reads no weights and writes nothing. What a source must hold is `loading`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pregate.conversion.made_tensors import MadeTensor
from pregate.models.checkpoint import Encoding, SourceCheckpoint, TensorInfo
from pregate.models.family import Family, family_named
from pregate.models.loading import parameter_shapes
from pregate.models.nonlinear import NAME
from pregate.models.pregating import PreGating

PART = f".{NAME}."
"""In the names of tensors that no source has."""


@dataclass(frozen=True)
class GateMove:
    """One gate that changes its place: it decides for `block` of `stack`.

    renamed: output tensor -> source tensor of the gate itself, for every tensor that a gate may have. copied: output
    tensor -> source tensor of what an entry gate starts from a copy of, the norm before its block; empty for other
    gates. leaves: the gate of `block` has left its place; else it stays there too, as a router that weighs.
    """

    stack: str
    block: int
    renamed: dict[str, str]
    copied: dict[str, str]
    leaves: bool = True


@dataclass(frozen=True)
class TensorPlan:
    """origins: output tensor -> source tensor, in model order, behind them the extra ones. moves: the gates that change
    places. dropped: source tensors that nothing needs. made: tensors that no source has, which are drawn when they are
    read; each is its own origin."""

    origins: dict[str, str]
    moves: tuple[GateMove, ...]
    dropped: tuple[str, ...]
    made: Mapping[str, MadeTensor] = field(default_factory=dict)

    def with_made(self, checkpoint: SourceCheckpoint) -> SourceCheckpoint:
        """`checkpoint`, which reads as if it held the tensors that are made too: then it has all origins."""
        infos = {
            name: TensorInfo(Path(), made.shape, made.dtype, encoding=Encoding((), lambda _, made=made: made.draw()))
            for name, made in self.made.items()
        }
        return replace(checkpoint, tensors=checkpoint.tensors | infos)


def plan_moves(family: Family, layers: dict[str, list[int]], gating: PreGating) -> list[GateMove]:
    """Which gates move where; `layers` gives the layer numbers of the MoE blocks of each stack, in order."""
    moves: list[GateMove] = []

    def renamed(target: str, source: str) -> dict[str, str]:
        return {f"{target}.{part}": f"{source}.{part}" for part in family.gate_parts}

    for stack, numbers in layers.items():
        names = [family.gate_names(stack, layer, block) for block, layer in enumerate(numbers)]
        places = [gating.gates_at(stack, block, len(names)) for block in range(len(names))]
        for block in gating.embedding_entries(stack, len(names)):
            here = names[block]
            norm = {here.entry_norm: here.norm}
            moves.append(GateMove(stack, block, renamed(here.entry, here.own), norm, not places[block].own))
        for block, here in enumerate(names):
            target = places[block].target
            if target is not None:
                origins = renamed(here.ahead, names[target].own)
                moves.append(GateMove(stack, target, origins, {}, not places[target].own))
    return moves


def plan_tensors(checkpoint: SourceCheckpoint, target: Any, seed: int = 0) -> TensorPlan:
    """Map a conventional source, opened and checked by `open_model`, onto the architecture of the config `target`.
    `seed`: of the tensors that are made."""
    family = family_named(target.model_type)
    origins = {name: name for name in checkpoint.names()}
    experts = family.experts(target).as_found_in(origins)
    moves = plan_moves(family, experts.layers, target.pregating)
    for move in moves:
        for name, source in move.renamed.items():
            if source in origins:  # a gate without a bias has none to move
                origins[name] = origins.pop(source) if move.leaves else source
        origins |= move.copied
    order = parameter_shapes(family, target, experts)
    made = _made({name: shape for name, shape in order.items() if PART in name}, checkpoint, moves, seed)
    origins |= {name: name for name in made}
    assert set(origins) | {*family.input_tables, family.output_table} == set(order), set(origins) ^ set(order)
    origins = {name: origins[name] for name in order if name in origins} | {name: name for name in checkpoint.extras}
    return TensorPlan(origins, tuple(moves), checkpoint.ignored, made)


def _made(
    shapes: dict[str, tuple[int, ...]], checkpoint: SourceCheckpoint, moves: list[GateMove], seed: int
) -> dict[str, MadeTensor]:
    """The tensors of gates beside their linear maps, each in the dtype of its gate's weight in the source."""
    sources = {name: source for move in moves for name, source in move.renamed.items() if source in checkpoint.tensors}
    made = {}
    for name, shape in shapes.items():
        gate = name.rpartition(PART)[0]
        dtype = next(checkpoint.dtype(source) for beside, source in sources.items() if beside.startswith(f"{gate}."))
        made[name] = MadeTensor(name, shape, dtype, seed)
    return made


def spelling(checkpoint: SourceCheckpoint, family: Family) -> Callable[[str], str]:
    """From the name of an output tensor to its name in a file: as in the files of the source, where the family has
    other names for parts of it (`Family.renames`). An extra tensor keeps its name."""
    stored = [info.key or name for name, info in checkpoint.tensors.items()]
    used = [(old, new) for old, new in family.renames if any(old in name for name in stored)]
    extras = {name: info.key or name for name, info in checkpoint.extras.items()}

    def spelt(name: str) -> str:
        if name in extras:
            return extras[name]
        for old, new in used:
            name = name.replace(new, old)
        return name

    return spelt
