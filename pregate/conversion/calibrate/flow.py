"""Gates fitted so that a pre-gated model routes as its conventional source does, with nothing else trained.

Each gate is fitted on the states that the pre-gated model itself will hand it, towards what the source decides for the
same tokens with the targets as input. The steps: draw `examples`, catch the `states` that gates read, fit one gate
after the other (`gate_fit`), give the `outcome`; `conversion.write` writes the result. Holds the whole model in
memory, once.

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

from pregate.config import CalibrationData, GateKind, Init, Run, Through, UsageError
from pregate.conversion.calibrate.examples import Batches, answered_rows, rows_of, within_budget
from pregate.conversion.calibrate.gate_fit import Tokens, fit_gate
from pregate.conversion.calibrate.outcome import Calibration, FittedGate, outcome
from pregate.conversion.calibrate.states import (
    GateToFit,
    Reached,
    agreement_of,
    gates_to_fit,
    mean_agreement,
    router_logits,
    rules_of,
    states_read,
    tensors_of,
)
from pregate.conversion.calibrate.through_engine import fit_through_engine, work_of
from pregate.conversion.gate_starts import FittedGates
from pregate.conversion.tensor_plan import TensorPlan
from pregate.conversion.write import ConversionReport, convert_for
from pregate.models.checkpoint import read_config
from pregate.models.family import family_named, family_of_model
from pregate.models.loading import load_resident, open_model
from pregate.models.pregated_models import compute_buffers
from pregate.models.side_files import TOKENIZER_FILES, side_files
from pregate.system.console import say
from pregate.system.durable import remove
from pregate.system.machine import pick_device
from pregate.tasks.base import Task
from pregate.tasks.registry import build_task
from pregate.tasks.tokens import Collator, check_vocabulary, load_tokenizer


def calibrate(
    run: Run, source: str, output: Path, task: Task | None, tokenizer: Any, device: torch.device | None = None
) -> tuple[ConversionReport, Calibration]:
    """Convert `source` into the new directory `output` as `convert` does, with gates fitted on training examples.

    `run` says how: `pregate` (whose `init` must be calibrated and whose lookahead not 0), `calibration`, `seed`, which
    draws the examples, and the task's lengths. Raises `UsageError` as `convert` does, before any example is read, and
    for fewer than two examples. Whatever fails leaves nothing behind, except that a calibration through the engine
    leaves its work directory beside `output`, from which the same call goes on.
    """
    assert run.pregate.init is Init.calibrated and run.pregate.lookahead, run.pregate
    if run.pregate.gate is GateKind.mlp:
        say("Calibration fits the linear map of each gate. The network beside it adds nothing until it is trained.")
    done: list[Calibration] = []
    device = device or torch.device("cpu")

    def fit(plan: TensorPlan, config: Any) -> FittedGates:
        objective = family_named(config.model_type).objective
        collate = Collator.for_task(run.task, tokenizer, objective)
        if run.calibration.through is Through.engine:
            opened = open_model(source, run.model.revision)
            tensors, found = fit_through_engine(run, opened, config, plan, task, collate, work_of(output), device)
        else:
            tensors, found = _fit_in_memory(run, source, config, plan, task, collate, device)
        done.append(Calibration(**found))
        return FittedGates(tensors, done[-1].account(run.calibration, run.task.name if task else None))

    report = convert_for(run, source, output, fit)
    remove(work_of(output))
    return report, done[-1]


def _fit_in_memory(
    run: Run, source: str, config: Any, plan: TensorPlan, task: Task | None, collate: Collator, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the fitted gates, and what makes a `Calibration`."""
    began = time.perf_counter()
    rows, settings = rows_of(run, task, collate), run.calibration
    model = load_resident(source, run.model.revision, dtype=torch.float32).to(device)
    if settings.data is CalibrationData.generations:
        answers = answered_rows(rows, model, model.generate, collate, settings)
        rows = within_budget(answers, collate, settings)
    batches = Batches.of_rows(rows, collate, settings)
    batches.to(device)
    tensors, found = fit_gates(model, config, plan, batches, run.calibration.steps)
    return tensors, {**found, "seconds": time.perf_counter() - began}


def calibrate_source(run: Run, source: str, output: Path) -> tuple[ConversionReport, Calibration]:
    """`calibrate` with the task of `run`, or the text that it names, in the tokens of `model.tokenizer` or else of the
    source.

    Raises `UsageError` also where there is no tokenizer, or not one that the source could have been trained with.
    """
    chosen = run.model.tokenizer
    task = None if run.calibration.text is not None else build_task(run)
    held = side_files(source, run.model.revision, TOKENIZER_FILES)
    if not held and chosen is None and (run.task.generated is None or task is None):
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
    rules = rules_of(source)
    before = agreement_of(router_logits(model, batches.held_out), wanted_held, rules)
    fitted: list[FittedGate] = []
    for stack in family.stacks:
        fit_reached, held_reached = ([Reached() for _ in part] for part in (batches.fit, batches.held_out))
        for wave in _waves([gate for gate in gates if gate.stack == stack and not gate.exact]):
            fit_states = states_read(model, stack, wave, batches.fit, fit_reached)
            held_states = states_read(model, stack, wave, batches.held_out, held_reached)
            for gate, fit_TD, held_TD in zip(wave, fit_states, held_states, strict=True):
                fit = Tokens(fit_TD, wanted_fit[stack][gate.block])
                held = Tokens(held_TD, wanted_held[stack][gate.block])
                with torch.enable_grad():
                    found = fit_gate(*gate.weights(), fit, held, steps, rules[stack][gate.block], family.scores)
                gate.set_weights(found.weight_ED, found.bias_E)
                fitted.append(FittedGate(stack, gate.block, found))
        for batch in (*batches.fit, *batches.held_out):
            batch.settled |= family.objective.settled(model, stack, batch.inputs)
    after = agreement_of(router_logits(model, batches.held_out), wanted_held, rules)
    kept = mean_agreement(after) >= mean_agreement(before)
    for gate, weights in () if kept else copies:
        gate.set_weights(*weights)
    tensors = tensors_of(model, [gate for gate in gates if not gate.exact])
    return tensors, outcome(family.stacks, fitted, batches, before, after, kept)


def _waves(waiting: list[GateToFit]) -> Iterator[list[GateToFit]]:
    """Gates of one stack that can be fitted together, because the blocks before what they read are settled."""
    while waiting:
        settled = min(gate.block for gate in waiting)
        yield [gate for gate in waiting if gate.after <= settled]
        waiting = [gate for gate in waiting if gate.after > settled]


def _copied(source: Any, config: Any, plan: TensorPlan) -> Any:
    """The pre-gated model with copied gates. It shares all weights of `source` but those of the gates."""
    with torch.device("meta"):
        model = family_named(config.model_type).model_class(config)
    origins = {target: origin for move in plan.moves for target, origin in (move.renamed | move.copied).items()}
    of_gates = {id(parameter) for gate in model.gates() for parameter in gate.linear.parameters()}
    owned = {name for name, parameter in model.named_parameters() if id(parameter) in of_gates}
    made = {name: tensor.draw().to(source.device) for name, tensor in plan.made.items()}
    have, state = {**source.state_dict(), **made}, {}
    for name in model.state_dict():
        tensor = have[origins.get(name, name)]
        state[name] = tensor.clone() if name in owned else tensor
    model.load_state_dict(state, assign=True)
    compute_buffers(model, source.device)
    return model.eval()
