"""Gates fitted so that a pre-gated model routes as its conventional source does, with nothing else trained.

Each gate is fitted on the states that the pre-gated model itself will hand it, towards what the source decides for the
same tokens with the targets as input. The steps: draw `examples`, catch the `states` that gates read, `fit` one gate
after the other, give an `account`; `conversion.write` writes the result. Holds the whole model in memory, once.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.config import Init, Run, UsageError
from pregate.conversion.calibrate.account import Calibration, FittedGate
from pregate.conversion.calibrate.examples import Batches
from pregate.conversion.calibrate.fit import Tokens, fit_gate
from pregate.conversion.calibrate.states import (
    GateToFit,
    agreement_of,
    gates_to_fit,
    mean_agreement,
    router_logits,
    states_read,
)
from pregate.conversion.gate_starts import FittedGates
from pregate.conversion.plan import TensorPlan
from pregate.conversion.write import ConversionReport, convert_for
from pregate.models.checkpoint import TOKENIZER_FILES, read_config, side_files
from pregate.models.family import family_named, family_of_model
from pregate.models.loading import load_resident
from pregate.models.pregated_models import compute_buffers
from pregate.system.machine import pick_device
from pregate.tasks.base import Task
from pregate.tasks.registry import build_task
from pregate.tasks.tokens import Collator, check_vocabulary, load_tokenizer


def calibrate(
    run: Run, source: str, output: Path, task: Task, tokenizer: Any, device: torch.device | None = None
) -> tuple[ConversionReport, Calibration]:
    """Convert `source` into the new directory `output` as `convert` does, with gates fitted on training examples.

    `run` says how: `pregate` (whose `init` must be calibrated and whose lookahead not 0), `calibration`, `seed`, which
    draws the examples, and the task's lengths. Raises `UsageError` as `convert` does, before any example is read, and
    for fewer than two examples. Whatever fails leaves nothing behind.
    """
    assert run.pregate.init is Init.calibrated and run.pregate.lookahead, run.pregate
    done: list[Calibration] = []

    def fit(plan: TensorPlan, config: Any) -> FittedGates:
        began = time.perf_counter()
        examples = task.examples(run.task.train_split, run.data.max_train_examples)
        objective = family_named(config.model_type).objective
        collate = Collator.for_task(run.task, tokenizer, objective)
        batches = Batches.of(examples, collate, run.calibration, run.seed)
        model = load_resident(source, run.model.revision, dtype=torch.float32)
        if device is not None:
            model.to(device)  # pyright: ignore[reportArgumentType]
        batches.to(model.device)
        tensors, found = fit_gates(model, config, plan, batches, run.calibration.steps)
        done.append(Calibration(**found, num_examples=batches.num_examples, seconds=time.perf_counter() - began))
        return FittedGates(tensors, done[-1].account(run.calibration, run.task.name))

    report = convert_for(run, source, output, fit)
    return report, done[-1]


def calibrate_source(run: Run, source: str, output: Path) -> tuple[ConversionReport, Calibration]:
    """`calibrate` with the task of `run`, in the tokens of `model.tokenizer` or else of the source.

    Raises `UsageError` also where there is no tokenizer, or not one that the source could have been trained with.
    """
    task, chosen = build_task(run), run.model.tokenizer
    held = side_files(source, run.model.revision, TOKENIZER_FILES)
    if not held and chosen is None and run.task.generated is None:
        # transformers would make up a tokenizer that knows no words
        raise UsageError(f"{source} holds no tokenizer to calibrate with: set model.tokenizer=DIRECTORY_OR_HUB_ID.")
    own = source if held and chosen is None and Path(source).is_dir() else None
    tokenizer = load_tokenizer(replace(run, checkpoint=own, model=replace(run.model, source=source)))
    check_vocabulary(tokenizer, source, read_config(source, run.model.revision))
    return calibrate(run, source, output, task, tokenizer, pick_device(run.engine.device))


@torch.no_grad()
def fit_gates(
    source: Any, config: Any, plan: TensorPlan, batches: Batches, steps: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the fitted gates, and all of a `Calibration` but what its caller knows."""
    model = _copied(source, config, plan)
    wanted_fit, wanted_held = router_logits(source, batches.fit), router_logits(source, batches.held_out)
    gates = gates_to_fit(model)
    copies = [(gate, gate.weights()) for gate in gates]
    family = family_of_model(model)
    top_k = family.experts(config).top_k
    before = agreement_of(router_logits(model, batches.held_out), wanted_held, top_k)
    fitted: list[FittedGate] = []
    for stack in family.stacks:
        for wave in _waves([gate for gate in gates if gate.stack == stack and not gate.exact]):
            fit_states = states_read(model, stack, wave, batches.fit)
            held_states = states_read(model, stack, wave, batches.held_out)
            for gate, fit_TD, held_TD in zip(wave, fit_states, held_states, strict=True):
                fit = Tokens(fit_TD, wanted_fit[stack][gate.block])
                held = Tokens(held_TD, wanted_held[stack][gate.block])
                with torch.enable_grad():
                    found = fit_gate(*gate.weights(), fit, held, steps, top_k)
                gate.set_weights(found.weight_ED, found.bias_E)
                fitted.append(FittedGate(stack, gate.block, found))
        for batch in (*batches.fit, *batches.held_out):
            batch.settled |= family.objective.settled(model, stack, batch.inputs)
    after = agreement_of(router_logits(model, batches.held_out), wanted_held, top_k)
    if mean_agreement(after) < mean_agreement(before):
        # each gate is no worse than a copy on the states that it met; this holds for the model as a whole
        for gate, weights in copies:
            gate.set_weights(*weights)
        after = before
        fitted = [replace(gate, fit=replace(gate.fit, chosen="copy")) for gate in fitted]
    fitted.sort(key=lambda gate: (family.stacks.index(gate.stack), gate.block))
    tokens = {stack: batches.num_tokens(stack) for stack in family.stacks}
    found = {"gates": tuple(fitted), "before": before, "after": after, "tokens": tokens}
    return _tensors_of(model, [gate for gate in gates if not gate.exact]), found


def _waves(waiting: list[GateToFit]) -> Iterator[list[GateToFit]]:
    """Gates of one stack that can be fitted together, because the blocks before what they read are settled."""
    while waiting:
        settled = min(gate.block for gate in waiting)
        yield [gate for gate in waiting if gate.after <= settled]
        waiting = [gate for gate in waiting if gate.after > settled]


def _tensors_of(model: Any, gates: list[GateToFit]) -> dict[str, Tensor]:
    """The weights and biases of `gates` by their names in `model`."""
    wanted = {id(parameter) for gate in gates for parameter in gate.gate.linear.parameters()}
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if id(tensor) in wanted}


def _copied(source: Any, config: Any, plan: TensorPlan) -> Any:
    """The pre-gated model with copied gates. It shares all weights of `source` but those of the gates."""
    with torch.device("meta"):
        model = family_named(config.model_type).model_class(config)
    origins = {target: origin for move in plan.moves for target, origin in (move.renamed | move.copied).items()}
    of_gates = {id(parameter) for gate in model.gates() for parameter in gate.linear.parameters()}
    owned = {name for name, parameter in model.named_parameters() if id(parameter) in of_gates}
    have, state = source.state_dict(), {}
    for name in model.state_dict():
        tensor = have[origins.get(name, name)]
        state[name] = tensor.clone() if name in owned else tensor
    model.load_state_dict(state, assign=True)
    compute_buffers(model, source.device)
    return model.eval()
