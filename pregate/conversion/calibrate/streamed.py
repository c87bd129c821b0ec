"""Gates fitted as `flow.fit_gates` does it, with the experts of the source streamed by the engine.

All tokens pass through layer l before any passes through layer l+1, so a pass over the model reads each expert once,
as long as the slots hold one block. Three models share that pass, because they differ in their gates alone: the
conventional source, the pre-gated model with the gates fitted so far, and the one with copied gates, for held-out
tokens. What tokens are between two layers lies in a `WorkDir`.

Letters: B batch, T tokens, D model width, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any, NamedTuple

import torch
from rich.progress import TaskProgressColumn
from torch import Tensor

from pregate.conversion.calibrate.examples import Batches
from pregate.conversion.calibrate.gate_fit import GateFit, Tokens, fit_gate
from pregate.conversion.calibrate.gates_alone import GatesAlone
from pregate.conversion.calibrate.one_layer import GateListener, run_end, run_layer
from pregate.conversion.calibrate.states import GateToFit, rules_of
from pregate.conversion.calibrate.work_dir import WorkDir
from pregate.engine.engine import OffloadEngine
from pregate.models.family import family_of_model
from pregate.models.routing import logits_agreement
from pregate.system.console import progress
from pregate.system.memory import return_free_memory

MODELS = SOURCE, FITTED, COPIED = "source", "fitted", "copied"
FRESH: dict[str, Any] = {"output": None, "settled": {}, "reads": {}}
"""Of one batch in one model: what the last layer returned, what earlier stacks gave to later ones, and what gates of
later blocks read, by block. So it is ahead of the first layer of a stack."""


class Place(NamedTuple):
    """A layer of a stack, and the number of its MoE block if it is one; no layer: what comes behind the last."""

    stack: str
    layer: int | None
    block: int | None = None


class StreamedFit:
    """One pass over the layers of the source in `engine`, which fits the gates of `gates`[FITTED]; `gates`[COPIED] stay
    as they are. `fits`, `agreement` (of each model, by stack and block), `bytes_read`, `peak_bytes` and `seconds` say
    what was found; those of a pass that is taken up again count too. `highest`: the most memory of this process so far.
    """

    def __init__(
        self,
        engine: OffloadEngine,
        gates: dict[str, GatesAlone],
        batches: Batches,
        steps: int,
        work: WorkDir,
        highest: Callable[[], int | None],
    ) -> None:
        self._engine, self._gates, self._steps, self._work = engine, gates, steps, work
        self._batches, self._num_held = [*batches.fit, *batches.held_out], len(batches.held_out)
        self._model, self._family = engine.model, family_of_model(engine.model)
        self._rules = rules_of(engine.model)
        self._advance: Callable[[int], None] = lambda _: None
        self._listener = GateListener(engine.model, self._family.stacks)
        done = work.progress
        self.fits: dict[tuple[str, int], GateFit] = {key: GateFit(**fit) for key, fit in done.get("fits", {}).items()}
        self.agreement: dict[str, dict[str, list[float]]] = done.get(
            "agreement", {name: {stack: [] for stack in self._family.stacks} for name in (FITTED, COPIED)}
        )
        self.bytes_read, self.seconds = done.get("bytes_read", 0), done.get("seconds", 0.0)
        self.peak_bytes, self._highest = done.get("peak_bytes"), highest
        for key, fit in self.fits.items():
            gates[FITTED].to_fit[key].set_weights(fit.weight_ED, fit.bias_E)

    @torch.no_grad()
    def run(self) -> None:
        """To the end, from where the work directory says. Afterwards `gates`[FITTED] are the fitted ones."""
        places = list(self._places())
        counters, began = self._engine.host.counters, time.perf_counter()
        seconds, bytes_read = self.seconds, self.bytes_read - counters.bytes_read
        passes = [0 if place.layer is None else sum(len(self._numbers(name)) for name in MODELS) for place in places]
        try:
            with progress("calibrating", sum(passes), TaskProgressColumn()) as self._advance:
                self._advance(sum(passes[: self._work.num_done]))
                for place in places[self._work.num_done :]:
                    self._run(place)
                    self.seconds = seconds + time.perf_counter() - began
                    self.bytes_read = bytes_read + counters.bytes_read
                    self._finish_step()
        finally:
            self._listener.close()

    def _places(self) -> Iterator[Place]:
        blocks = {(block.stack, block.layer): block.index for block in self._model.moe_blocks()}
        for stack in self._family.stacks:
            for layer in range(len(self._model.stack_layers(stack))):
                yield Place(stack, layer, blocks.get((stack, layer)))
            yield Place(stack, None)

    def _run(self, place: Place) -> None:
        if place.layer is None:
            self._end_stack(place.stack)
        elif place.block is None:
            for name in MODELS:
                self._each(name, place, lambda _: None)
        else:
            self._run_block(place)

    def _finish_step(self) -> None:
        return_free_memory()
        if (highest := self._highest()) is not None:
            self.peak_bytes = max(self.peak_bytes or 0, highest)
        self._work.finish_step(
            {
                "fits": {key: asdict(fit) for key, fit in self.fits.items()},
                "agreement": self.agreement,
                "bytes_read": self.bytes_read,
                "peak_bytes": self.peak_bytes,
                "seconds": self.seconds,
            }
        )

    # -- a layer with experts

    def _run_block(self, place: Place) -> None:
        """The source decides what its gate would for these tokens; the gate ahead is fitted; then the others run."""
        assert place.block is not None
        stack, gate = place.stack, self._gates[FITTED].to_fit.get((place.stack, place.block))
        waiting = None if gate is None or gate.exact else gate
        embedded: list[Tensor] = []

        def decided(number: int) -> Tensor:
            if waiting is not None and waiting.reads_embeddings:
                embedded.append(self._counted(stack, number, waiting.gate.read(self._listener.embedded)))
            return self._counted(stack, number, self._listener.logits)

        wanted = self._each(SOURCE, place, decided)
        if waiting is not None:
            self._fit(waiting, embedded or self._states_read(waiting, place), wanted)
        for name in (FITTED, COPIED):
            found = self._each(name, place, lambda n: self._counted(stack, n, self._listener.logits))
            held, wanted_held = (torch.cat(logits[-self._num_held :]) for logits in (found, wanted))
            self.agreement[name][stack].append(logits_agreement(held, wanted_held, self._rules[stack][place.block]))

    def _fit(self, gate: GateToFit, states: list[Tensor], wanted: list[Tensor]) -> None:
        """`states` (T, D) and `wanted` (T, E) of each batch."""
        cut = len(wanted) - self._num_held
        return_free_memory()  # the passes leave much, in pieces of other sizes than a fit takes
        held = Tokens(torch.cat(states[cut:]), torch.cat(wanted[cut:]))
        fit = Tokens(torch.cat(states[:cut]), torch.cat(wanted[:cut]))
        states.clear()
        with torch.enable_grad():
            rule = self._rules[gate.stack][gate.block]
            found = fit_gate(*gate.weights(), fit, held, self._steps, rule, self._family.scores)
        gate.set_weights(found.weight_ED, found.bias_E)
        self.fits[gate.stack, gate.block] = found

    def _states_read(self, gate: GateToFit, place: Place) -> list[Tensor]:
        """What a gate that reads the input of a block reads, of each batch."""
        if gate.after < gate.block:
            states = (self._load(FITTED, number)["reads"][gate.block] for number in self._numbers(FITTED))
            return [self._counted(gate.stack, number, states_BTD) for number, states_BTD in enumerate(states)]
        self._listener.stop_at_gate = True
        try:
            return self._each(FITTED, place, lambda n: self._counted(gate.stack, n, self._listener.states), keep=False)
        finally:
            self._listener.stop_at_gate = False

    def _end_stack(self, stack: str) -> None:
        for name in MODELS:
            for number in self._numbers(name):
                state = self._load(name, number)
                inputs = {**self._batches[number].inputs, **state["settled"]}
                settled = self._engine.host.run(
                    run_end, {"model": self._model, "stack": stack, "inputs": inputs, "before": state["output"]}
                )
                self._save(name, number, {**FRESH, "settled": {**state["settled"], **settled}})

    # -- all batches of one model

    def _each(self, name: str, place: Place, note: Callable[[int], Any], keep: bool = True) -> list[Any]:
        """Every batch of the model `name` through a layer, or without `keep` up to its gate; what `note` says of each,
        told its number."""

        def passes() -> list[Any]:
            self._look_ahead(place)
            return [(self._pass(name, number, place, keep), note(number))[1] for number in self._numbers(name)]

        return self._engine.host.run(passes, {})

    def _pass(self, name: str, number: int, place: Place, keep: bool) -> None:
        state, (stack, layer, block) = self._load(name, number), place
        assert layer is not None
        self._listener.decide = None if name == SOURCE or block is None else self._decider(name, stack, block, state)
        self._listener.weighs = name != SOURCE and (stack, block) in self._gates[name].weighing
        inputs = {**self._batches[number].inputs, **state["settled"]}
        output = run_layer(self._model, stack, layer, inputs, state["output"])
        if not keep:
            return
        reads = {target: states for target, states in state["reads"].items() if target != block}
        if name != SOURCE and block is not None:
            reads |= {gate.block: self._listener.states for gate in self._gates[name].sitting_in(stack, block)}
        self._save(name, number, {**state, "output": output, "reads": reads})
        self._advance(1)

    def _decider(self, name: str, stack: str, block: int, state: dict[str, Any]) -> Callable[[Tensor], Any] | None:
        """How the model `name` decides for a block, given what the block itself reads; None: as the source does."""
        gate = self._gates[name].to_fit.get((stack, block))
        if gate is None:
            return None
        if gate.reads_embeddings:
            return lambda _: gate.gate(self._listener.embedded)
        return gate.gate if gate.after == block else lambda _: gate.gate(state["reads"][block])

    def _look_ahead(self, place: Place) -> None:
        """Have the experts of the next layers with any read, from this layer on, as many as there are slots."""
        layers, order = self._engine.family.layers, self._family.stacks
        here = order.index(place.stack), place.layer
        keys = self._engine.family.keys()
        coming = (key for key in keys if (order.index(key.stack), layers[key.stack][key.block]) >= here)
        self._engine.host.scheduler.request(islice(coming, self._engine.num_slots))

    def _numbers(self, name: str) -> range:
        """The batches that a model sees: those held out come last, and are all that the copied gates are asked."""
        return range(len(self._batches) - self._num_held if name == COPIED else 0, len(self._batches))

    def _counted(self, stack: str, number: int, rows_BTX: Tensor) -> Tensor:
        return rows_BTX.flatten(0, -2)[self._batches[number].counted[stack].flatten()].float()

    def _load(self, name: str, number: int) -> dict[str, Any]:
        return self._work.load(f"{name}-{number}", self._model.device) or FRESH

    def _save(self, name: str, number: int, state: dict[str, Any]) -> None:
        self._work.save(f"{name}-{number}", state)
