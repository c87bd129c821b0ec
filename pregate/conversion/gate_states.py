"""What the gates of a model read, and decide, for the tokens of a few examples: the raw material of calibration.

Knows forward passes, targets as input and padding; knows nothing about how a gate is fitted or why.

Letters: B batch, S source length, T tokens, D model width, E experts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pregate.config import CalibrationConfig, UsageError
from pregate.models.family import family_of_model
from pregate.models.pregated import Gate
from pregate.tasks.base import Example
from pregate.tasks.tokens import Collator

Agreement = dict[str, list[float]]
"""stack -> for each MoE block, the share of tokens for which both models' first choice is the same."""


@dataclass
class Batch:
    """Inputs of the models; which tokens count (stack -> mask_BT); and what stacks that are settled give to later
    ones."""

    inputs: dict[str, Tensor]
    counted: dict[str, Tensor]
    settled: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batches:
    """The examples to fit on and those to judge by, in batches of like length."""

    fit: list[Batch]
    held_out: list[Batch]
    num_examples: int

    @classmethod
    def of(cls, examples: Sequence[Example], collate: Collator, settings: CalibrationConfig, seed: int) -> Batches:
        """Of a seeded draw of `examples`, see `CalibrationConfig`. Raises `UsageError` for fewer than two."""
        drawn = _drawn(examples, collate, settings, seed)
        if len(drawn) < 2:
            raise UsageError(f"Calibration needs at least 2 training examples, but there is {len(drawn)}: add more.")
        cut = min(max(1, round(len(drawn) * settings.held_out)), len(drawn) - 1)
        parts = []
        for part in (drawn[cut:], drawn[:cut]):
            part.sort(key=lambda example: len(example.source))
            batches = []
            for start in range(0, len(part), settings.batch_size):
                inputs = collate(part[start : start + settings.batch_size])
                batches.append(Batch(inputs, collate.objective.real_tokens(inputs)))
            parts.append(batches)
        return cls(*parts, num_examples=len(drawn))

    def to(self, device: torch.device) -> None:
        for batch in (*self.fit, *self.held_out):
            batch.inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
            batch.counted = {name: tensor.to(device) for name, tensor in batch.counted.items()}

    def num_tokens(self, stack: str) -> tuple[int, int]:
        """How many tokens of `stack` count: to fit on, held out."""
        fit, held = (sum(int(batch.counted[stack].sum()) for batch in part) for part in (self.fit, self.held_out))
        return fit, held


def _drawn(examples: Sequence[Example], collate: Collator, settings: CalibrationConfig, seed: int) -> list[Example]:
    """The first of a seeded order that fit into the token budget, and two whatever their length."""
    order = random.Random(seed).sample(list(examples), min(settings.examples, len(examples)))
    kept: list[Example] = []
    left = settings.tokens
    for start in range(0, len(order), settings.batch_size):
        part = order[start : start + settings.batch_size]
        lengths_B = torch.stack([mask.sum(1) for mask in collate.objective.real_tokens(collate(part)).values()]).sum(0)
        for example, length in zip(part, lengths_B.tolist(), strict=True):
            left -= length
            if left < 0 and len(kept) >= 2:
                return kept
            kept.append(example)
    return kept


@dataclass(frozen=True)
class GateSeat:
    """A gate of the pre-gated model. `reads`: the module whose input it reads. `after`: how many blocks of the stack
    must be settled before that input is. `exact`: a copy reads, and decides, what it did in the source."""

    stack: str
    block: int
    after: int
    exact: bool
    gate: Gate = field(repr=False)
    reads: nn.Module = field(repr=False)


def gate_seats(model: Any) -> list[GateSeat]:
    """The gates that decide in another place than in the source or, as entry gates, possibly on other states."""
    gating, found = model.config.pregating, []
    undisturbed = True
    for stack in family_of_model(model).stacks:
        if not gating.lookahead_of(stack):
            continue
        for number, gate in model.stack_module(stack).entry_gates.items():
            found.append(GateSeat(stack, int(number), 0, False, gate, gate))
        for gates in (block.gates for block in model.moe_blocks() if block.stack == stack):
            if gates.router is not None:
                found.append(GateSeat(stack, gates.index, gates.index, undisturbed, gates.router, gates))
            if gates.pre_gate is not None:
                found.append(GateSeat(stack, gates.target, gates.index, False, gates.pre_gate, gates))
        undisturbed = False  # what later stacks read is no longer what it was in the source
    return found


def router_logits(model: Any, batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    """stack -> the logits_TE of each MoE block for all counted tokens."""
    found: dict[str, list[list[Tensor]]] = {}
    for batch in batches:
        output = model(**batch.inputs, output_router_logits=True, use_cache=False)
        for stack, blocks in family_of_model(model).objective.router_logits(output).items():
            rows = found.setdefault(stack, [[] for _ in blocks])
            for row, logits_BTE in zip(rows, blocks, strict=True):
                row.append(logits_BTE[batch.counted[stack]].float())
    return {stack: [torch.cat(row) for row in rows] for stack, rows in found.items()}


class _EnoughError(Exception):
    """Raised within a forward pass when all states that were asked for have been seen."""


def states_read(model: Any, stack: str, wave: Sequence[GateSeat], batches: Sequence[Batch]) -> list[Tensor]:
    """The states_TD that each gate of `wave` reads in `model`, of all counted tokens. Runs no deeper than needed."""
    caught: list[list[Tensor]] = [[] for _ in wave]
    objective = family_of_model(model).objective
    mask_BT = torch.empty(0)
    left = 0

    def catcher(rows: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def catch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            states = module.read(arguments[0]) if isinstance(module, Gate) else arguments[0]
            rows.append(states.flatten(0, -2)[mask_BT.flatten()].float())
            left -= 1
            if not left:
                raise _EnoughError

        return catch

    handles = [seat.reads.register_forward_pre_hook(catcher(rows)) for seat, rows in zip(wave, caught, strict=True)]
    try:
        for batch in batches:
            mask_BT, left = batch.counted[stack], len(wave)
            try:
                objective.run_stack(model, stack, {**batch.inputs, **batch.settled})
            except _EnoughError:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in caught]


def agreement_of(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> Agreement:
    return {
        stack: [a.argmax(-1).eq(b.argmax(-1)).double().mean().item() for a, b in zip(blocks, other[stack], strict=True)]
        for stack, blocks in one.items()
    }


def mean_agreement(agreement: Agreement) -> float:
    values = [value for blocks in agreement.values() for value in blocks]
    return sum(values) / len(values)
