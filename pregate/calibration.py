"""Gates fitted so that a pre-gated model routes as its conventional source does, with nothing else trained.

Knows which gate reads which states, and in which order gates can be fitted: each on the states that the pre-gated
model itself will hand it, towards what the source decides for the same tokens with the targets as input. How one
gate is fitted is `gate_fit`'s; how the result is written, `conversion`'s. Holds the whole model in memory, once.

Letters: B batch, S source length, T tokens, D model width, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pregate.config import CalibrationConfig, PreGateConfig, UsageError
from pregate.conversion import ConversionReport, FittedGates, convert
from pregate.conversion_plan import TensorPlan
from pregate.gate_fit import GateFit, Tokens, fit_gate
from pregate.models.adapter import STACKS, moe_blocks
from pregate.models.switch import PreGatedSwitchTransformersForConditionalGeneration as Model
from pregate.models.switch import load_resident
from pregate.models.switch_layers import EmbeddingGate, PreGatedSwitchTransformersConfig, SwitchGate
from pregate.tasks.base import Example
from pregate.tasks.text import IGNORED_LABEL, Collator

Agreement = dict[str, list[float]]
"""stack -> for each MoE block, the share of tokens for which both models' first choice is the same."""


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

    def account(self, settings: CalibrationConfig, task: str | None) -> dict[str, Any]:
        """For the manifest of the converted directory."""
        return {
            **({"task": task} if task else {}),
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
    source: str,
    output: Path,
    pregate: PreGateConfig,
    settings: CalibrationConfig,
    examples: Callable[[], Sequence[Example]],
    collate: Collator,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    task: str | None = None,
) -> tuple[ConversionReport, Calibration | None]:
    """Convert `source` into the new directory `output` as `convert` does, with gates fitted on `settings.examples` of
    `examples()`, drawn by `seed`. None instead of an account where lookahead is 0 and no gate moves.

    `task` names the examples in the manifest. Raises `UsageError` as `convert` does, before any example is read, and
    for fewer than two examples. Whatever fails leaves nothing behind.
    """
    done: list[Calibration] = []

    def fit(plan: TensorPlan, config: PreGatedSwitchTransformersConfig) -> FittedGates:
        began = time.perf_counter()
        fitting, held_out = _split(examples(), settings, seed)
        model = load_resident(source, revision, dtype=torch.float32)
        if device is not None:
            model.to(device)
        tensors, calibration = _calibrated(
            model, config, plan, _Batches.of(fitting, held_out, collate, settings, model.device, seed), settings.steps
        )
        seconds, count = time.perf_counter() - began, len(fitting) + len(held_out)
        done.append(Calibration(**calibration, num_examples=count, seconds=seconds))
        return FittedGates(tensors, done[-1].account(settings, task))

    report = convert(source, output, pregate, revision=revision, tokenizer=tokenizer, seed=seed, fit=fit)
    return report, done[-1] if done else None


def _split(
    examples: Sequence[Example], settings: CalibrationConfig, seed: int
) -> tuple[list[Example], list[Example]]:
    """A seeded draw to fit on and one to judge by, each ordered by length, which wastes the least padding."""
    drawn = random.Random(seed).sample(list(examples), min(settings.examples, len(examples)))
    if len(drawn) < 2:
        raise UsageError(f"Calibration needs at least 2 training examples, and the task has {len(drawn)}: add some.")
    cut = min(max(1, round(len(drawn) * settings.held_out)), len(drawn) - 1)
    return tuple(sorted(part, key=lambda example: len(example.source)) for part in (drawn[cut:], drawn[:cut]))


@dataclass
class _Batch:
    """Inputs of the models; which tokens count (stack -> mask_BT); and the encoder's output, once that is settled."""

    inputs: dict[str, Tensor]
    counted: dict[str, Tensor]
    encoded_BSD: Tensor | None = None


@dataclass
class _Batches:
    fit: list[_Batch]
    held_out: list[_Batch]

    @classmethod
    def of(
        cls,
        fitting: list[Example],
        held_out: list[Example],
        collate: Collator,
        settings: CalibrationConfig,
        device: torch.device,
        seed: int,
    ) -> _Batches:
        """Batches with at most `settings.max_tokens` counted tokens a stack, split as the examples are."""
        generator = torch.Generator().manual_seed(seed)
        most = round(settings.max_tokens * len(held_out) / (len(fitting) + len(held_out)))
        most = min(max(1, most), settings.max_tokens - 1)
        parts = []
        for part, limit in ((fitting, settings.max_tokens - most), (held_out, most)):
            batches = []
            for start in range(0, len(part), settings.batch_size):
                inputs = collate(part[start : start + settings.batch_size])
                counted = {"encoder": inputs["attention_mask"].bool(), "decoder": inputs["labels"] != IGNORED_LABEL}
                batches.append(_Batch(inputs, counted))
            for stack in STACKS:
                _thin([batch.counted[stack] for batch in batches], limit, generator)
            for batch in batches:
                batch.inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
                batch.counted = {name: tensor.to(device) for name, tensor in batch.counted.items()}
            parts.append(batches)
        return cls(*parts)

    def num_tokens(self, stack: str) -> tuple[int, int]:
        fit, held = (sum(int(batch.counted[stack].sum()) for batch in part) for part in (self.fit, self.held_out))
        return fit, held


def _thin(masks: list[Tensor], limit: int, generator: torch.Generator) -> None:
    """Leave `limit` of all true entries, drawn evenly, in place."""
    total = sum(int(mask.sum()) for mask in masks)
    if total <= limit:
        return
    keep = torch.zeros(total, dtype=torch.bool)
    keep[torch.randperm(total, generator=generator)[:limit]] = True
    for mask in masks:
        count = int(mask.sum())
        mask[mask.clone()] = keep[:count]
        keep = keep[count:]


@dataclass(frozen=True)
class _Seat:
    """A gate of the pre-gated model. `reads`: the module whose input it reads. `after`: how many blocks of the stack
    must be settled before that input is. `exact`: a copy reads, and decides, what it did in the source."""

    stack: str
    block: int
    after: int
    exact: bool
    gate: SwitchGate = field(repr=False)
    reads: nn.Module = field(repr=False)


def _seats(model: Model) -> list[_Seat]:
    """The gates that decide in another place than in the source or, as entry gates, possibly on other states."""
    gating, found = model.config.pregating, []
    for stack in (stack for stack in STACKS if gating.lookahead_of(stack)):
        undisturbed = stack == STACKS[0] or STACKS[0] not in gating.stacks
        for block, gate in getattr(model, stack).entry_gates.items():
            found.append(_Seat(stack, int(block), 0, False, gate, gate))
        for block in moe_blocks(model):
            if block.stack == stack:
                mlp = block.module
                if mlp.router is not None:
                    found.append(_Seat(stack, mlp.index, mlp.index, undisturbed, mlp.router, mlp))
                if mlp.pre_gate is not None:
                    found.append(_Seat(stack, mlp.target, mlp.index, False, mlp.pre_gate, mlp))
    return found


@torch.no_grad()
def _calibrated(
    source: Model, config: PreGatedSwitchTransformersConfig, plan: TensorPlan, batches: _Batches, steps: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the fitted gates, and all of a `Calibration` but what its caller knows."""
    model = _twin(source, config, plan)
    wanted = {"fit": _router_logits(source, batches.fit), "held_out": _router_logits(source, batches.held_out)}
    before = _agreement(_router_logits(model, batches.held_out), wanted["held_out"])
    fitted: list[FittedGate] = []
    originals = {seat: _weights(seat.gate) for seat in _seats(model)}
    for stack in STACKS:
        waiting = [seat for seat in originals if seat.stack == stack and not seat.exact]
        while waiting:
            settled = min(seat.block for seat in waiting)
            wave = [seat for seat in waiting if seat.after <= settled]
            waiting = [seat for seat in waiting if seat not in wave]
            fit_states, held_states = (_states(model, stack, wave, part) for part in (batches.fit, batches.held_out))
            for seat, fit_TD, held_TD in zip(wave, fit_states, held_states, strict=True):
                fit, held = (
                    Tokens(states_TD, wanted[part][stack][seat.block])
                    for part, states_TD in (("fit", fit_TD), ("held_out", held_TD))
                )
                with torch.enable_grad():
                    result = fit_gate(*_weights(seat.gate), fit, held, steps)
                _set_weights(seat.gate, (result.weight_ED, result.bias_E))
                fitted.append(FittedGate(stack, seat.block, result))
        if stack == STACKS[0]:
            for batch in (*batches.fit, *batches.held_out):
                batch.encoded_BSD = _encode(model, batch)
    after = _agreement(_router_logits(model, batches.held_out), wanted["held_out"])
    if _mean(after) < _mean(before):
        # each gate is no worse than a copy on the states that it met; this holds for the model as a whole
        for seat, weights in originals.items():
            _set_weights(seat.gate, weights)
        after = before
    names = {module: name for name, module in model.named_modules()}
    tensors: dict[str, Tensor] = {}
    for seat in originals:
        for part, tensor in zip(("weight", "bias"), _weights(seat.gate), strict=True):
            if tensor is not None and not seat.exact:
                tensors[f"{names[seat.gate]}.classifier.{part}"] = tensor
    fitted.sort(key=lambda gate: (STACKS.index(gate.stack), gate.block))
    tokens = {stack: batches.num_tokens(stack) for stack in STACKS}
    return tensors, {"gates": tuple(fitted), "before": before, "after": after, "tokens": tokens}


def _twin(source: Model, config: PreGatedSwitchTransformersConfig, plan: TensorPlan) -> Model:
    """The pre-gated model with copied gates. It shares all weights of `source` but those of the gates."""
    with torch.device("meta"):
        model = Model(config)
    renamed = {target: origin for move in plan.moves for target, origin in move.renamed().items()}
    for move in plan.moves:
        if move.norm is not None:
            renamed[f"{move.target.removesuffix('.classifier')}.layer_norm.weight"] = move.norm
    have, state = source.state_dict(), {}
    for name in model.state_dict():
        tensor = have[renamed.get(name, name)]
        state[name] = tensor.clone() if ".classifier." in name else tensor
    model.load_state_dict(state, assign=True)
    return model.eval()


def _weights(gate: SwitchGate) -> tuple[Tensor, Tensor | None]:
    bias_E = gate.classifier.bias
    return gate.classifier.weight.detach().clone(), None if bias_E is None else bias_E.detach().clone()


def _set_weights(gate: SwitchGate, weights: tuple[Tensor, Tensor | None]) -> None:
    gate.classifier.weight.copy_(weights[0])
    if weights[1] is not None:
        gate.classifier.bias.copy_(weights[1])


def _router_logits(model: Model, batches: Sequence[_Batch]) -> dict[str, list[Tensor]]:
    """stack -> the logits_TE of each MoE block for all counted tokens."""
    found: dict[str, list[list[Tensor]]] = {}
    for batch in batches:
        output = model(**batch.inputs, output_router_logits=True, use_cache=False)
        for stack in STACKS:
            blocks = getattr(output, f"{stack}_router_logits") or ()
            rows = found.setdefault(stack, [[] for _ in blocks])
            for row, logits_BTE in zip(rows, blocks, strict=True):
                row.append(logits_BTE[batch.counted[stack]].float())
    return {stack: [torch.cat(row) for row in rows] for stack, rows in found.items()}


def _encode(model: Model, batch: _Batch) -> Tensor:
    inputs = batch.inputs
    return model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state


class _Enough(Exception):
    """Raised within a forward pass when all states that were asked for have been seen."""


def _states(model: Model, stack: str, wave: Sequence[_Seat], batches: Sequence[_Batch]) -> list[Tensor]:
    """The states_TD that each gate of `wave` reads in `model`, of all counted tokens. Runs no deeper than needed."""
    caught: list[list[Tensor]] = [[] for _ in wave]
    mask_BT = torch.empty(0)
    left = 0

    def catcher(rows: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def catch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            states_BTD = module.layer_norm(arguments[0]) if isinstance(module, EmbeddingGate) else arguments[0]
            rows.append(states_BTD[mask_BT].float())
            left -= 1
            if not left:
                raise _Enough

        return catch

    handles = [seat.reads.register_forward_pre_hook(catcher(rows)) for seat, rows in zip(wave, caught, strict=True)]
    try:
        for batch in batches:
            mask_BT, left = batch.counted[stack], len(wave)
            try:
                if stack == STACKS[0]:
                    _encode(model, batch)
                else:
                    model(**batch.inputs, encoder_outputs=(batch.encoded_BSD,), use_cache=False)
            except _Enough:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in caught]


def _agreement(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> Agreement:
    return {
        stack: [
            a.argmax(-1).eq(b.argmax(-1)).double().mean().item() for a, b in zip(blocks, other[stack], strict=True)
        ]
        for stack, blocks in one.items()
    }


def _mean(agreement: Agreement) -> float:
    values = [value for blocks in agreement.values() for value in blocks]
    return sum(values) / len(values)
