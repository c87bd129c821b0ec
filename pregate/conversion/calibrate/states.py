"""What the gates of a model read and decide for the tokens of given batches.

Knows forward passes and which gates wait for which; knows nothing about how a gate is fitted.

Letters: B batch, T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pregate.conversion.calibrate.examples import Batch
from pregate.conversion.calibrate.one_layer import EnoughError, returning
from pregate.models.family import family_of_model
from pregate.models.pregated_models import Gate
from pregate.models.route_handover import Routes
from pregate.models.routing import Choose, logits_agreement

Agreement = dict[str, list[float]]
"""stack -> for each MoE block, the slot agreement of both models."""


@dataclass(frozen=True)
class GateToFit:
    """A gate of the pre-gated model that may decide otherwise than the source does.

    block: the one that it decides for. reads: the module whose input it reads. after: how many blocks of the stack must
    be settled before that input is. exact: a copy reads, and decides, what it did in the source.
    """

    stack: str
    block: int
    after: int
    exact: bool
    gate: Gate = field(repr=False)
    reads: nn.Module = field(repr=False)

    @property
    def reads_embeddings(self) -> bool:
        """Whether it is an entry gate that reads the stack's input embeddings."""
        return self.reads is self.gate

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Copies of the weight (E, D) and the bias (E)."""
        bias_E = getattr(self.gate.linear, "bias", None)
        return self.gate.linear.weight.detach().clone(), None if bias_E is None else bias_E.detach().clone()

    def set_weights(self, weight_ED: Tensor, bias_E: Tensor | None) -> None:
        self.gate.linear.weight.copy_(weight_ED)
        if bias_E is not None:
            self.gate.linear.bias.copy_(bias_E)


def gates_to_fit(model: Any) -> list[GateToFit]:
    """The gates that decide in another place than in the source or, as entry gates, possibly on other states."""
    gating, found = model.config.pregating, []
    undisturbed = True
    for stack in family_of_model(model).stacks:
        if not gating.lookahead_of(stack):
            continue
        for number, gate in model.stack_module(stack).entry_gates.items():
            found.append(GateToFit(stack, int(number), 0, False, gate, gate))
        for gates in (block.gates for block in model.moe_blocks() if block.stack == stack):
            if gates.router is not None and not gates.weighs:
                found.append(GateToFit(stack, gates.index, gates.index, undisturbed, gates.router, gates))
            if gates.pre_gate is not None:
                found.append(GateToFit(stack, gates.target, gates.index, False, gates.pre_gate, gates))
        undisturbed = False  # what later stacks read is no longer what it was in the source
    return found


def tensors_of(model: Any, gates: Sequence[GateToFit]) -> dict[str, Tensor]:
    """The weights and biases of `gates` by their names in `model`."""
    wanted = {id(parameter) for gate in gates for parameter in gate.gate.linear.parameters()}
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if id(tensor) in wanted}


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


@dataclass
class Reached:
    """How far one batch has come in a stack whose blocks are settled one after the other, so that a pass begins where
    the one before it ended.

    num_layers: so many layers are passed for good. output: what the last of them returned. reads: what the gates read
    that sit there and decide for a block behind, with the gate, by that block.
    """

    num_layers: int = 0
    output: Any = None
    reads: dict[int, tuple[Gate, Tensor]] = field(default_factory=dict)

    @contextmanager
    def going_on(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, a pass through `layers` computes those alone that were not passed."""

        def decide(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            [routes] = (one for one in (*arguments, *named.values()) if isinstance(one, Routes))
            for block, (gate, states_BTD) in self.reads.items():
                routes.commit(block, gate(states_BTD))

        handle = layers[self.num_layers].register_forward_pre_hook(decide, with_kwargs=True)
        try:
            with returning(self.output, layers[: self.num_layers]):
                yield
        finally:
            handle.remove()


def states_read(
    model: Any, stack: str, wave: Sequence[GateToFit], batches: Sequence[Batch], reached: Sequence[Reached]
) -> list[Tensor]:
    """The states_TD that each gate of `wave` reads in `model`, of all counted tokens. Runs no deeper than needed.

    `reached`: of each batch, brought up to date. All blocks before those of the wave must be settled.
    """
    caught: list[list[Tensor]] = [[] for _ in wave]
    layers, layer_of = model.stack_layers(stack), {b.index: b.layer for b in model.moe_blocks() if b.stack == stack}
    objective = family_of_model(model).objective
    here, mask_BT, left = Reached(), torch.empty(0), 0

    def catcher(gate: GateToFit, rows: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def catch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            states = module.read(arguments[0]) if isinstance(module, Gate) else arguments[0]
            states_BTD = states.view(*mask_BT.shape, -1)
            rows.append(states_BTD[mask_BT].float())
            if gate.after < gate.block and not gate.reads_embeddings:
                here.reads[gate.block] = gate.gate, states_BTD
            left -= 1
            if not left:
                raise EnoughError

        return catch

    def passer(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def passed(module: nn.Module, arguments: Any, output: Any) -> None:
            here.num_layers, here.output = number, output

        return passed

    handles = [
        gate.reads.register_forward_pre_hook(catcher(gate, rows)) for gate, rows in zip(wave, caught, strict=True)
    ]
    # layers that compute nothing say again what they said before
    handles += [layer.register_forward_hook(passer(number)) for number, layer in enumerate(layers, 1)]
    try:
        for batch, here in zip(batches, reached, strict=True):
            mask_BT, left = batch.counted[stack], len(wave)
            with here.going_on(layers), suppress(EnoughError):
                objective.run_stack(model, stack, {**batch.inputs, **batch.settled})
            here.reads = {block: read for block, read in here.reads.items() if layer_of[block] >= here.num_layers}
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in caught]


def rules_of(source: Any) -> dict[str, list[Choose]]:
    """stack -> how the router of each MoE block of a conventional model chooses. A gate that decides for the block
    elsewhere chooses in the same way."""
    rules: dict[str, list[Choose]] = {}
    for block in source.moe_blocks():
        rules.setdefault(block.stack, []).append(block.gates.router.choices)
    return rules


def agreement_of(
    one: dict[str, list[Tensor]], other: dict[str, list[Tensor]], rules: dict[str, list[Choose]]
) -> Agreement:
    """Of what the rule of each block chooses by its logits_TE."""
    return {
        stack: [logits_agreement(*block) for block in zip(blocks, other[stack], rules[stack], strict=True)]
        for stack, blocks in one.items()
    }


def mean_agreement(agreement: Agreement) -> float:
    values = [value for blocks in agreement.values() for value in blocks]
    return sum(values) / len(values)
