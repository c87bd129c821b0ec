"""Calibrated gates on tiny random models: what they read, what they reach, and what is written around them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import CalibrationConfig, Entry, GateKind, Init, PreGateConfig, Run, UsageError
from pregate.conversion import write as conversion
from pregate.conversion.calibrate import flow
from pregate.conversion.calibrate.examples import Batches
from pregate.conversion.calibrate.flow import calibrate
from pregate.conversion.calibrate.outcome import Calibration
from pregate.conversion.calibrate.states import Reached, gates_to_fit, router_logits, states_read
from pregate.conversion.manifest import MANIFEST
from pregate.conversion.write import convert
from pregate.models.checkpoint import open_checkpoint, read_config
from pregate.models.family import family_of_model
from pregate.models.loading import load_resident
from pregate.tasks.tokens import Collator
from tests.engine.olmoe import olmoe
from tests.models.test_objectives import CAUSAL
from tests.tiny import SEQ2SEQ, pregated_model, upstream_model
from tests.training.copying import FirstWords, short_run, word_tokenizer

BOTH = ["encoder", "decoder"]
DEPTH = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4}
CASES = {
    "paper": {},
    "two ahead": {"lookahead": 2},
    "three ahead": {"lookahead": 3, "entry": Entry.embedding},
    "embedding": {"entry": Entry.embedding},
    "encoder": {"stacks": ["encoder"]},
    "decoder": {"stacks": ["decoder"], "entry": Entry.embedding},
}


def settings(pregate: dict[str, Any] | None = None, **changes: Any) -> Run:
    run = short_run()
    run.pregate = PreGateConfig(**{"init": Init.calibrated, **(pregate or {})})
    run.calibration = CalibrationConfig(**{"steps": 5, "batch_size": 6, **changes})
    return run


def calibrated(run: Run, source: Path, output: Path) -> Calibration:
    return calibrate(run, str(source), output, FirstWords(), word_tokenizer())[1]  # type: ignore[arg-type]


def batches_of(run: Run, objective: Any = SEQ2SEQ) -> Batches:
    collate = Collator(word_tokenizer(), run.task.max_source_tokens, run.task.max_target_tokens, objective)
    return Batches.of(FirstWords().examples("train"), collate, run.calibration, run.seed)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "model"
    upstream_model(0, **DEPTH).save_pretrained(directory)
    return directory


def tensors(directory: Path) -> dict[str, Tensor]:
    opened = open_checkpoint(str(directory))
    return {name: tensor.clone() for name, tensor in opened.read(opened.names()).items()}


@pytest.mark.parametrize("case", CASES)
def test_only_gates_change_and_agreement_does_not_fall(case: str, source: Path, tmp_path: Path) -> None:
    run = settings(CASES[case])
    found = calibrated(run, source, tmp_path / "fitted")
    convert(str(source), tmp_path / "copied", replace(run.pregate, init=Init.source))
    fitted, copied = tensors(tmp_path / "fitted"), tensors(tmp_path / "copied")
    assert fitted.keys() == copied.keys()
    changed = {name for name in fitted if not torch.equal(fitted[name], copied[name])}
    assert changed and all(".classifier." in name for name in changed)
    assert {name.split(".")[0] for name in changed} <= set(run.pregate.stacks or ("encoder", "decoder"))

    # what is told is what the two directories do
    batches = batches_of(run)
    with torch.no_grad():
        first = {
            name: {
                stack: [logits.argmax(-1) for logits in blocks]
                for stack, blocks in router_logits(load_resident(place), batches.held_out).items()
            }
            for name, place in (("source", source), ("fitted", tmp_path / "fitted"), ("copied", tmp_path / "copied"))
        }
    for name, told in (("fitted", found.after), ("copied", found.before)):
        for stack in BOTH:
            shares = [
                a.eq(b).double().mean().item() for a, b in zip(first[name][stack], first["source"][stack], strict=True)
            ]
            assert told[stack] == pytest.approx(shares)
    mean = {name: sum(map(sum, told.values())) for name, told in (("a", found.after), ("b", found.before))}
    assert mean["a"] > mean["b"]
    for fit in (gate.fit for gate in found.gates):
        scores = {"copy": fit.copy, "ridge": fit.ridge, "temperature": fit.refined}
        assert scores[fit.chosen.split()[0]] == max(scores.values()), fit
    assert any(gate.fit.chosen != "copy" for gate in found.gates)


def test_a_source_whose_routes_can_be_read_one_block_ahead_is_followed_exactly(tmp_path: Path) -> None:
    """Layers that add nothing leave x_i = x_{i-1} but for the norms, so a gate one block ahead can know all."""
    model = upstream_model(1, **DEPTH)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path / "source")
    for lookahead, entry in ((1, "own"), (2, "own"), (3, "embedding")):
        run = settings({"lookahead": lookahead, "entry": Entry(entry)}, steps=40, held_out=0.3)
        found = calibrated(run, tmp_path / "source", tmp_path / f"out-{lookahead}")
        assert min(found.before["encoder"][lookahead:]) < 0.9
        assert min(min(blocks) for blocks in found.after.values()) > 0.97, found.after


@pytest.mark.parametrize("entry", ["own", "embedding"])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_states_are_those_that_the_gates_see(lookahead: int, entry: str) -> None:
    """The states caught, through each gate's weights, are the logits of its block, for unpadded tokens alone."""
    model = pregated_model(3, lookahead, entry=entry, router_bias=True, **DEPTH)
    batches = batches_of(settings())
    with torch.no_grad():
        logits = router_logits(model, batches.fit)
        gates = gates_to_fit(model)
        assert sorted((gate.stack, gate.block) for gate in gates) == [(s, b) for s in BOTH[::-1] for b in range(4)]
        for stack in BOTH:
            wave, reached = [gate for gate in gates if gate.stack == stack], [Reached() for _ in batches.fit]
            for gate, states_TD in zip(wave, states_read(model, stack, wave, batches.fit, reached), strict=True):
                torch.testing.assert_close(gate.gate.classifier(states_TD), logits[stack][gate.block])
    counted = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches.fit)
    assert len(logits["encoder"][0]) == counted == batches.num_tokens("encoder")[0]


@pytest.mark.parametrize(("lookahead", "entry"), [(1, "own"), (2, "embedding"), (3, "own")])
@pytest.mark.parametrize("objective", [SEQ2SEQ, CAUSAL])
@torch.no_grad()
def test_a_pass_begins_where_the_one_before_it_ended(objective: Any, lookahead: int, entry: str) -> None:
    """And reads what a pass through the whole model does, once all gates are what they were set to on the way."""
    if objective is SEQ2SEQ:
        model: Any = pregated_model(3, lookahead, entry=entry, **DEPTH)
    else:
        model = olmoe(num_hidden_layers=5, pregate={"lookahead": lookahead, "entry": entry})
    stacks, [batch, *_] = family_of_model(model).stacks, batches_of(settings(), objective).fit
    ran: list[tuple[str, int]] = []
    for block in model.moe_blocks():
        block.module.register_forward_hook(lambda *_, key=(block.stack, block.index): ran.append(key))
    found: list[tuple[Any, Tensor]] = []
    for stack in stacks:
        reached = [Reached()]
        for wave in flow._waves([gate for gate in gates_to_fit(model) if gate.stack == stack and not gate.exact]):
            found += zip(wave, states_read(model, stack, wave, [batch], reached), strict=True)
            for gate in wave:  # as a fit changes them
                gate.set_weights(torch.randn(gate.weights()[0].shape), None)
        once = [key for key in ran if key[0] == stack]
        assert len(once) == len(set(once)), "no block runs twice"
        batch.settled |= family_of_model(model).objective.settled(model, stack, batch.inputs)
    for gate, states_TD in found:
        [again_TD] = states_read(model, gate.stack, [gate], [batch], [Reached()])
        assert torch.equal(again_TD, states_TD) and again_TD.isfinite().all()
    assert ran and len(found) > len(stacks) and len({float(states_TD.sum()) for _, states_TD in found}) > len(stacks)


def test_padding_does_not_count(source: Path, tmp_path: Path) -> None:
    """Batches of one have no padding, and give the same gates as batches of many lengths."""
    one = calibrated(settings(batch_size=1, steps=0), source, tmp_path / "one")
    many = calibrated(settings(batch_size=40, steps=0), source, tmp_path / "many")
    assert one.tokens == many.tokens
    for name, tensor in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensor, tensors(tmp_path / "many")[name], atol=1e-3, rtol=1e-3)


def test_examples_are_drawn_up_to_both_limits_and_kept_apart() -> None:
    def sizes(**changes: Any) -> tuple[int, int]:
        found = batches_of(settings(**changes))
        fit, held = ([row for b in part for row in b.inputs["labels"]] for part in (found.fit, found.held_out))
        assert found.num_examples == len(fit) + len(held)
        return len(fit), len(held)

    assert sizes() == (32, 8)
    assert sizes(examples=10) == (8, 2)
    assert sizes(tokens=1) == (1, 1)
    for budget in (60, 150):
        found = batches_of(settings(tokens=budget))
        used = sum(sum(found.num_tokens(stack)) for stack in BOTH)
        assert budget - 14 < used <= budget, (budget, used)
    assert sizes(tokens=150) == sizes(tokens=150, batch_size=1)


def test_what_the_directory_says(source: Path, tmp_path: Path) -> None:
    run = settings({"lookahead": 2})
    run.seed = 3
    found = calibrated(run, source, tmp_path / "out")
    config, manifest = read_config(str(tmp_path / "out")), json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert config["pregate"]["init"] == manifest["init"] == "calibrated"
    told = manifest["calibration"]
    assert told["settings"] == asdict(run.calibration) and told["settings"]["steps"] == 5
    assert (told["num_examples"], told["task"], manifest["seed"]) == (40, "squad", 3)
    assert told["agreement"] == {"before": found.before, "after": found.after}
    assert told["seconds"] > 0 and told["num_tokens"]["encoder"]["held_out"] > 8
    # the encoder's entry gates read what they always did; the decoder's read a changed encoder
    assert [(gate["stack"], gate["block"]) for gate in told["gates"]] == [
        *(("encoder", block) for block in (2, 3)),
        *(("decoder", block) for block in range(4)),
    ]
    assert "encoder block 0: 100.0% -> 100.0%" in found.table()


def test_a_router_with_bias_in_half_precision(tmp_path: Path) -> None:
    upstream_model(2, router_bias=True, **DEPTH).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    calibrated(settings(), tmp_path / "source", tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert any(name.endswith("pre_gate.classifier.bias") and tensor.any() for name, tensor in found.items())


def test_gates_that_do_worse_together_are_not_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad_fit(weight_ED: Tensor, bias_E: Tensor | None, *rest: Any) -> Any:
        return replace(fit_gate(weight_ED, bias_E, *rest), weight_ED=torch.zeros_like(weight_ED))

    fit_gate = flow.fit_gate
    monkeypatch.setattr(flow, "fit_gate", bad_fit)
    found = calibrated(settings(), source, tmp_path / "out")
    assert found.after == found.before and {gate.fit.chosen for gate in found.gates} == {"copy"}
    convert(str(source), tmp_path / "copied", PreGateConfig())
    copied = tensors(tmp_path / "copied")
    assert all(torch.equal(tensor, copied[name]) for name, tensor in tensors(tmp_path / "out").items())


def test_the_linear_part_of_a_gate_is_fitted_as_that_of_a_linear_one(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is beside it stays as it starts."""
    found = {kind: calibrated(settings({"gate": kind}), source, tmp_path / kind) for kind in GateKind}
    assert found["mlp"].after == found["linear"].after != found["linear"].before
    assert "".join(capsys.readouterr()).replace("\n", " ").count("adds nothing until it is trained") == 1
    linear, mlp = (tensors(tmp_path / kind) for kind in ("linear", "mlp"))
    assert all(torch.equal(mlp[name], tensor) for name, tensor in linear.items())
    made = {name: tensor for name, tensor in mlp.items() if name not in linear}
    assert made and all(".pre_gate.nonlinear." in name for name in made)
    assert all(tensor.any() == name.endswith(".up") for name, tensor in made.items())


@pytest.mark.parametrize("where", ["fit_gate", "router_logits"])
def test_whole_or_not_at_all(where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(flow, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(settings(), source, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setattr(conversion, "_write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(settings(), source, tmp_path / "new" / "out")
    # the weights are written by now, and the same command goes on with them
    (left,) = (tmp_path / "new").iterdir()
    assert ".partial-" in left.name
    monkeypatch.undo()
    calibrated(settings(), source, tmp_path / "new" / "out")
    assert [place.name for place in (tmp_path / "new").iterdir()] == ["out"]


def test_refusals_come_before_any_example_is_read(source: Path, tmp_path: Path) -> None:
    class Unread(FirstWords):
        def examples(self, split: str, limit: int | None = None) -> Any:
            raise AssertionError("read")

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    upstream_model(0).save_pretrained(tmp_path / "shallow")
    for run, model, output, said in (
        (settings(), source, tmp_path / "used", "exists already"),
        (settings({"lookahead": 3}), tmp_path / "shallow", tmp_path / "out", "lookahead=3 needs at least 4 MoE blocks"),
        (settings({"stacks": ["middle"]}), source, tmp_path / "out", "names middle, but the model has encoder"),
    ):
        with pytest.raises(UsageError, match=said):
            calibrate(run, str(model), output, Unread(), word_tokenizer())  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"call pregate\.conversion\.calibrate\.flow\.calibrate"):
        convert(str(source), tmp_path / "out", PreGateConfig(init=Init.calibrated))
    assert not (tmp_path / "out").exists()


def test_one_example_is_too_few(source: Path, tmp_path: Path) -> None:
    run = settings()
    run.data.max_train_examples = 1
    with pytest.raises(UsageError, match="at least 2 training examples"):
        calibrated(run, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_lookahead_0_has_nothing_to_calibrate(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", PreGateConfig(0, init=Init.calibrated))
    original = tensors(source)
    assert all(torch.equal(tensor, original[name]) for name, tensor in tensors(tmp_path / "out").items())
    assert "calibration" not in json.loads((tmp_path / "out" / MANIFEST).read_text())
