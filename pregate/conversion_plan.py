"""Which tensor of a conventional checkpoint becomes which tensor of the pre-gated one.

Knows names, shapes and tied embeddings; reads no weights (but for comparing embedding tables) and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.models.adapter import PreGating
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.switch import PreGatedSwitchTransformersForConditionalGeneration as TargetModel
from pregate.models.switch_layers import PreGatedSwitchTransformersConfig
from pregate.runtime import first_of

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LM_HEAD = "lm_head.weight"
TABLES = (*EMBEDDINGS, LM_HEAD)
# written by early T5-style exporters; the architecture has no such parameter and never reads it
LEFTOVERS = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})


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


def parameter_shapes(config: PreGatedSwitchTransformersConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model that `config` describes; nothing is allocated."""
    with torch.device("meta"):
        model = TargetModel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def plan_tensors(
    checkpoint: SourceCheckpoint,
    conventional: PreGatedSwitchTransformersConfig,
    target: PreGatedSwitchTransformersConfig,
    blocks: dict[str, list[int]],
) -> TensorPlan:
    """Match the source against the architecture of `conventional` and map it onto that of `target`.

    Raises `UsageError` naming the first few tensors that are missing, unknown or of another shape.
    """
    wanted = parameter_shapes(conventional)
    have = set(checkpoint.names())
    _refuse("lacks", checkpoint, [name for name in wanted if name not in have and name not in TABLES])
    _refuse("holds unknown tensors, namely", checkpoint, sorted(have - set(wanted) - LEFTOVERS))
    for name in sorted(have - LEFTOVERS):
        if checkpoint.shape(name) != wanted[name]:
            raise UsageError(
                f"{checkpoint.directory} holds {name} of shape {checkpoint.shape(name)} where its config.json asks for "
                f"{wanted[name]}: use the config.json and the weights of one and the same model."
            )
    origins = {name: name for name in wanted if name not in TABLES}
    origins |= _plan_tables(checkpoint, bool(target.tie_word_embeddings))
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
    return TensorPlan(origins, tuple(moves), tuple(sorted(have - set(origins.values()))))


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


def _plan_tables(checkpoint: SourceCheckpoint, tied: bool) -> dict[str, str]:
    """The embedding tables of the output.

    A tied model stores one, and another only where its bits differ, which is how upstream reads such a file. An
    untied model has four parameters of their own, but older exports share one table between the first three, so
    a missing one is filled from those that are there.
    """
    have = set(checkpoint.names())
    found = [name for name in (TABLES if tied else EMBEDDINGS) if name in have]
    _refuse("lacks", checkpoint, [] if found else [EMBEDDINGS[0]])
    if not tied:
        _refuse("lacks", checkpoint, [] if LM_HEAD in have else [LM_HEAD])
        return {**{name: name if name in have else found[0] for name in EMBEDDINGS}, LM_HEAD: LM_HEAD}
    first, *others = found
    tables = checkpoint.read(found)
    return {EMBEDDINGS[0]: first} | {name: name for name in others if not _same_bits(tables[first], tables[name])}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.data_ptr() == other.data_ptr() or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _refuse(what: str, checkpoint: SourceCheckpoint, names: list[str]) -> None:
    if names:
        raise UsageError(
            f"{checkpoint.directory} {what} {first_of(names, 3)}: use the complete weights of the model that its "
            "config.json describes."
        )
