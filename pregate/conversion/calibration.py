"""Gates fitted so that a pre-gated model routes as its conventional source does, with nothing else trained.

Knows in which order gates can be fitted: each on the states that the pre-gated model itself will hand it, towards what
the source decides for the same tokens with the targets as input. How states are caught is `gate_states`'s, how one
gate is fitted `gate_fit`'s, how the result is written `conversion`'s. Holds the whole model in memory, once.

Letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pregate.config import CalibrationConfig, Init, Run, UsageError
from pregate.conversion.gate_fit import GateFit, Tokens, fit_gate
from pregate.conversion.gate_states import (
    Agreement,
    Batches,
    agreement_of,
    gate_seats,
    mean_agreement,
    router_logits,
    states_read,
)
from pregate.conversion.plan import TensorPlan
from pregate.conversion.write import ConversionReport, FittedGates, convert_for
from pregate.models.checkpoint import TOKENIZER_FILES, read_config, side_files
from pregate.models.family import family_named, family_of_model
from pregate.models.loading import load_resident
from pregate.models.pregated import compute_buffers
from pregate.system.machine import pick_device
from pregate.tasks.base import Task
from pregate.tasks.registry import build_task
from pregate.tasks.tokens import Collator, check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class FittedGate:
    """One gate: where it decides, and its agreement on held-out tokens as a copy, after ridge, and refined."""

    stack: str
    block: int
    fit: GateFit

    def account(self) -> dict[str, Any]:
        fit = self.fit
        return {
            "stack": self.stack,
            "block": self.block,
            "chosen": fit.chosen,
            "agreement": {"copy": fit.copy, "ridge": fit.ridge, "refined": fit.refined},
        }


@dataclass(frozen=True)
class Calibration:
    """What a calibration did. `before` and `after`: agreement of the model with copied and with fitted gates, each on
    its own states, over held-out tokens. `tokens`: stack -> how many were fitted on and held out."""

    gates: tuple[FittedGate, ...]
    before: Agreement
    after: Agreement
    tokens: dict[str, tuple[int, int]]
    num_examples: int
    seconds: float

    def account(self, settings: CalibrationConfig, task: str) -> dict[str, Any]:
        """For the manifest of the converted directory."""
        return {
            "task": task,
            "settings": asdict(settings),
            "num_examples": self.num_examples,
            "num_tokens": {stack: {"fit": fit, "held_out": held} for stack, (fit, held) in self.tokens.items()},
            "agreement": {"before": self.before, "after": self.after},
            "gates": [gate.account() for gate in self.gates],
            "seconds": round(self.seconds, 2),
        }

    def table(self) -> str:
        """Agreement before and after, a line a stack."""
        lines = [f"calibrated on {self.num_examples:,} examples in {self.seconds:.1f} s; routing agreement, held out:"]
        for stack, before in self.before.items():
            pairs = zip(before, self.after[stack], strict=True)
            shown = "  ".join(f"{block}: {b:.1%} -> {a:.1%}" for block, (b, a) in enumerate(pairs))
            lines.append(f"  {stack} block {shown}")
        return "\n".join(lines)


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
        collate = Collator(tokenizer, run.task.max_source_tokens, run.task.max_target_tokens, objective)
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
    model = _twin(source, config, plan)
    wanted_fit, wanted_held = router_logits(source, batches.fit), router_logits(source, batches.held_out)
    before = agreement_of(router_logits(model, batches.held_out), wanted_held)
    fitted: list[FittedGate] = []
    originals = {seat: _weights(seat.gate) for seat in gate_seats(model)}
    family = family_of_model(model)
    for stack in family.stacks:
        waiting = [seat for seat in originals if seat.stack == stack and not seat.exact]
        while waiting:
            settled = min(seat.block for seat in waiting)
            wave = [seat for seat in waiting if seat.after <= settled]
            waiting = [seat for seat in waiting if seat not in wave]
            fit_states = states_read(model, stack, wave, batches.fit)
            held_states = states_read(model, stack, wave, batches.held_out)
            for seat, fit_TD, held_TD in zip(wave, fit_states, held_states, strict=True):
                fit = Tokens(fit_TD, wanted_fit[stack][seat.block])
                held = Tokens(held_TD, wanted_held[stack][seat.block])
                with torch.enable_grad():
                    result = fit_gate(*_weights(seat.gate), fit, held, steps)
                _set_weights(seat.gate, (result.weight_ED, result.bias_E))
                fitted.append(FittedGate(stack, seat.block, result))
        for batch in (*batches.fit, *batches.held_out):
            batch.settled |= family.objective.settled(model, stack, batch.inputs)
    after = agreement_of(router_logits(model, batches.held_out), wanted_held)
    if mean_agreement(after) < mean_agreement(before):
        # each gate is no worse than a copy on the states that it met; this holds for the model as a whole
        for seat, weights in originals.items():
            _set_weights(seat.gate, weights)
        after = before
        fitted = [replace(gate, fit=replace(gate.fit, chosen="copy")) for gate in fitted]
    fitted_gates = {
        id(parameter) for seat in originals if not seat.exact for parameter in seat.gate.linear.parameters()
    }
    tensors = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if id(parameter) in fitted_gates
    }
    fitted.sort(key=lambda gate: (family.stacks.index(gate.stack), gate.block))
    tokens = {stack: batches.num_tokens(stack) for stack in family.stacks}
    return tensors, {"gates": tuple(fitted), "before": before, "after": after, "tokens": tokens}


def _twin(source: Any, config: Any, plan: TensorPlan) -> Any:
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


def _weights(gate: Any) -> tuple[Tensor, Tensor | None]:
    bias_E = getattr(gate.linear, "bias", None)
    return gate.linear.weight.detach().clone(), None if bias_E is None else bias_E.detach().clone()


def _set_weights(gate: Any, weights: tuple[Tensor, Tensor | None]) -> None:
    gate.linear.weight.copy_(weights[0])
    if weights[1] is not None:
        gate.linear.bias.copy_(weights[1])
