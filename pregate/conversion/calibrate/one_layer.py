"""One layer of a stack at a time: what every batch needs of a layer is computed while the layer's weights are there.

The stack's own forward runs each time, so masks, positions and what else a layer is given are upstream's. The layers
before give back what the last of them returned before, and the forward ends behind the layer that was asked for.
Knows nothing about gates, files or where experts are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pregate.models.family import family_of_model
from pregate.models.pregated_models import Gate
from pregate.models.routing import Routing


class EnoughError(Exception):
    """Raised within a forward pass behind the last thing that was asked for."""


def run_layer(model: Any, stack: str, layer: int, inputs: Mapping[str, Any], before: Any) -> Any:
    """What layer number `layer` returns for a batch. `before`: what the layer before it returned for that batch.
    `inputs`: of the model, and what earlier stacks gave (see `Objective.settled`). None if a gate was only listened to.
    """
    layers, returned = model.stack_layers(stack), []

    def end(module: nn.Module, arguments: Any, output: Any) -> None:
        returned.append(output)
        raise EnoughError

    handle = layers[layer].register_forward_hook(end)
    try:
        with returning(before, layers[:layer]):
            family_of_model(model).objective.run_stack(model, stack, inputs)
    except EnoughError:
        pass
    finally:
        handle.remove()
    return returned[0] if returned else None


def run_end(model: Any, stack: str, inputs: Mapping[str, Any], before: Any) -> dict[str, Any]:
    """What later stacks read of `stack`, whose last layer returned `before`."""
    with returning(before, model.stack_layers(stack)):
        return family_of_model(model).objective.settled(model, stack, inputs)


@contextmanager
def returning(output: Any, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, `layers` compute nothing and return `output`."""
    for layer in layers:
        layer.forward = lambda *_, **__: output
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class GateListener:
    """What the gates of a conventional model read and decide in a pass; `decide` may put another route there.

    states: what the last gate read, (B, T, D). embedded: the input embeddings of the stack, as its entry gates get
    them. logits: behind the route that was taken.
    """

    states: Tensor
    embedded: Tensor
    logits: Tensor

    def __init__(self, model: Any, stacks: Sequence[str]) -> None:
        self.decide: Any = None
        """From what the gate reads to a `Routing`; None leaves the gate's own."""
        self.weighs = False
        """Whether the gate weighs the experts of `decide`."""
        self.stop_at_gate = False
        """Whether a pass ends where it comes to a gate."""
        gates = [block.gates.router for block in model.moe_blocks()]
        tables = {id(table): (table, scale) for table, scale in map(_table_of, map(model.stack_module, stacks))}
        self._handles = [gate.register_forward_hook(self._on_gate) for gate in gates]
        self._handles += [table.register_forward_hook(self._on_table(scale)) for table, scale in tables.values()]

    def _on_gate(self, gate: Gate, arguments: tuple[Tensor, ...], routing: Routing) -> Routing:
        self.states = arguments[0]
        if self.stop_at_gate:
            raise EnoughError
        taken = routing if self.decide is None else self.decide(self.states)
        self.logits = taken.logits_BTE
        if self.weighs:
            taken = taken._replace(weights_BTK=gate.weigh(self.states, taken.expert_ids_BTK))
        return taken

    def _on_table(self, scale: float) -> Any:
        def listen(table: nn.Module, arguments: Any, embedded_BTD: Tensor) -> None:
            self.embedded = embedded_BTD * scale

        return listen

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _table_of(stack: Any) -> tuple[nn.Module, float]:
    """The embedding table of a stack, and what the stack multiplies the embeddings by."""
    return stack.get_input_embeddings(), getattr(stack, "embedding_multiplier", 1.0)
