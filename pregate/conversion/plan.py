"""Which tensor of a conventional checkpoint becomes which tensor of the pre-gated one.

Knows names and how much goes into a file; reads no weights and writes nothing. What a source must hold is `loading`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.families.switch_layers import PreGatedSwitchTransformersConfig
from pregate.models.loading import TABLES, parameter_shapes
from pregate.models.pregating import PreGating


@dataclass(frozen=True)
class GateMove:
    """One gate that changes its place: `block` of `stack` was decided at `source` and is decided at `target`.

    Both are prefixes of parameter names. `norm` names the layer norm that an entry gate on embeddings starts from
    a copy of; it is None for other gates.
    """

    stack: str
    block: int
    source: str
    target: str
    norm: str | None = None

    def renamed(self) -> dict[str, str]:
        """Output tensor -> source tensor of the gate itself, bias included whether or not the model has one."""
        return {f"{self.target}.{part}": f"{self.source}.{part}" for part in ("weight", "bias")}


@dataclass(frozen=True)
class TensorPlan:
    """origins: output tensor -> source tensor, in model order. moves: the gates that change places. dropped: source
    tensors that nothing needs."""

    origins: dict[str, str]
    moves: tuple[GateMove, ...]
    dropped: tuple[str, ...]


def plan_moves(blocks: dict[str, list[int]], gating: PreGating) -> list[GateMove]:
    """Which gates move where; `blocks` gives the layer numbers of the MoE blocks of each stack, in order."""
    moves: list[GateMove] = []
    for stack, layers in blocks.items():
        part = 1 if stack == "encoder" else 2
        sublayers = [f"{stack}.block.{layer}.layer.{part}" for layer in layers]
        for block in gating.embedding_entries(stack, len(layers)):
            norm = f"{sublayers[block]}.layer_norm.weight"
            source, target = f"{sublayers[block]}.mlp.router.classifier", f"{stack}.entry_gates.{block}.classifier"
            moves.append(GateMove(stack, block, source, target, norm))
        for seat, sublayer in enumerate(sublayers):
            target = gating.gates_at(stack, seat, len(layers)).target
            if target is not None:
                source = f"{sublayers[target]}.mlp.router.classifier"
                moves.append(GateMove(stack, target, source, f"{sublayer}.mlp.pre_gate.classifier"))
    return moves


def plan_tensors(
    checkpoint: SourceCheckpoint, target: PreGatedSwitchTransformersConfig, blocks: dict[str, list[int]]
) -> TensorPlan:
    """Map a conventional source, opened and checked by `open_model`, onto the architecture of `target`."""
    origins = {name: name for name in checkpoint.names()}
    moves = plan_moves(blocks, target.pregating)
    for move in moves:
        for name, source in move.renamed().items():
            if source in origins:  # a router without bias has no bias to move
                origins[name] = origins.pop(source)
        if move.norm is not None:
            origins[f"{move.target.removesuffix('.classifier')}.layer_norm.weight"] = move.norm
    order = parameter_shapes(target)
    assert set(origins) | set(TABLES) == set(order), set(origins) ^ set(order)
    origins = {name: origins[name] for name in order if name in origins}
    return TensorPlan(origins, tuple(moves), checkpoint.ignored)


def plan_shards(checkpoint: SourceCheckpoint, plan: TensorPlan, max_shard_bytes: int) -> dict[str, list[str]]:
    """Output file -> the output tensors in it, in model order. A file is larger than `max_shard_bytes` only where a
    single tensor is."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, origin in plan.origins.items():
        size = checkpoint.num_bytes(origin)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}
