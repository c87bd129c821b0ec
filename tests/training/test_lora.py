"""Adapters learn beside the gates and nothing else does; checkpoints hold them merged, states apart and exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pregate.config import LoraConfig, LoraTarget, Run, TaskConfig, Trainable, TrainConfig, UsageError
from pregate.models.families.olmoe import FAMILY, PreGatedOlmoeConfig, PreGatedOlmoeForCausalLM
from pregate.models.family import family_of
from pregate.models.loading import load_resident
from pregate.training import lora
from pregate.training.checks import check_memory_savers, trained_config
from tests.models.families.test_decoder_only import Row, every_family, upstream_model
from tests.tiny import batch, pregated_model
from tests.training.copying import OLMOE, SHALLOW, Recorder, train_tiny

pytest.importorskip("peft")  # not on every machine that runs the GPU tests
BOTH = LoraConfig(rank=2, alpha=16, targets=[LoraTarget.attention, LoraTarget.experts])


def switch() -> Any:
    return pregated_model(**SHALLOW)


def olmoe() -> Any:
    """Its experts are two tensors a block."""
    torch.manual_seed(0)
    gating = {"lookahead": 1, "stacks": [], "entry": "embedding", "init": "source"}
    settings = FAMILY.from_scratch(OLMOE, 67)
    return PreGatedOlmoeForCausalLM(PreGatedOlmoeConfig(**settings, pregate=gating)).eval()


MODELS = {"switch": switch, "olmoe": olmoe}


def trained(
    out_dir: Path, model: Any, resume: bool = False, tracker: Recorder | None = None, **changes: Any
) -> Recorder:
    options = {"trainable": Trainable.lora, "lora": BOTH, "precision": "fp32", "save_every": 2, "keep": "last"}
    settings = {**options, "eval_every": 4, **changes}
    return train_tiny(out_dir, resume=resume, tracker=tracker, model=model, **settings)[1]


def logits(model: Any) -> Tensor:
    inputs = batch(1) if model.config.is_encoder_decoder else {"input_ids": batch(1, padded=False)["input_ids"]}
    with torch.inference_mode():
        found = model.eval()(**inputs, use_cache=False).logits
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_gates_and_adapters_learn_and_a_checkpoint_holds_both(kind: str, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in MODELS[kind]().state_dict().items()}
    model = MODELS[kind]()
    gates = {id(parameter) for gate in model.gates() for parameter in gate.parameters()}
    gate_names = {name for name, parameter in model.named_parameters() if id(parameter) in gates}
    trained(tmp_path / "run", model)
    plain = lora.plain_state(model)
    assert plain.keys() == before.keys()
    moved = {name for name, tensor in plain.items() if not torch.equal(tensor, before[name])}
    assert moved and moved <= gate_names
    learnt = lora.adapter_state(model)
    idle = {name for name, tensor in learnt.items() if not tensor.any()}
    assert len(idle) < len(learnt) / 3 and all(".expert_" in name for name in idle), "of experts without a token"
    assert any("experts" in name for name in learnt) and any("experts" not in name for name in learnt)

    merged = load_resident(tmp_path / "run" / "checkpoint")
    assert type(merged) is type(model) and not lora.is_adapted(merged)
    assert not list((tmp_path / "run" / "checkpoint").glob("adapters*"))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    neutral = MODELS[kind]()
    neutral.load_state_dict(plain)
    assert not torch.allclose(logits(merged), logits(neutral), atol=1e-2), "the adapters do nothing"

    by_peft = copy.deepcopy(model)
    for module in reversed([module for module in by_peft.modules() if hasattr(module, "get_delta_weight")]):
        module.merge()
    state = merged.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in lora.plain_state(by_peft).items())


@pytest.mark.parametrize("kind", MODELS)
def test_an_interrupted_run_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    # with dropout, whose masks depend on the random state
    options = {"lora": LoraConfig(rank=2, dropout=0.2), "gradient_checkpointing": True}
    whole = MODELS[kind]()
    told = trained(tmp_path / "whole", whole, **options)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", MODELS[kind](), tracker=Recorder(interrupt_at=2), **options)
    assert (tmp_path / "cut" / "last" / lora.ADAPTERS_FILE).is_file()
    resumed = MODELS[kind]()
    again = trained(tmp_path / "cut", resumed, resume=True, **options)
    for step in (3, 4):
        assert again.at["tiny/loss", step] == told.at["tiny/loss", step] > 0
    own, other = whole.state_dict(), resumed.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    (name, *_) = lora.adapter_state(whole)
    saved = load_file(tmp_path / "cut" / "last" / lora.ADAPTERS_FILE)
    assert torch.equal(saved[name], lora.adapter_state(whole)[name])
    for other_options in ({**options, "lora": LoraConfig(rank=3)}, {"trainable": "gates", "lora": LoraConfig()}):
        with pytest.raises(UsageError, match="holds a run of a different model"):
            trained(tmp_path / "cut", MODELS[kind](), resume=True, **other_options, steps=6)


def test_what_cannot_be_adapted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch().save_pretrained(tmp_path / "switch")
    olmoe().save_pretrained(tmp_path / "olmoe")

    def refused(source: str, **settings: Any) -> str:
        run = Run(train=TrainConfig(trainable=Trainable.lora, lora=LoraConfig(**settings)), task=TaskConfig())
        run.model.source = str(tmp_path / source)
        with pytest.raises(UsageError) as error:
            check_memory_savers(run, trained_config(run)[0])
        return str(error.value)

    assert "targets names shared_experts, of which this model has no" in refused(
        "switch", targets=[LoraTarget.shared_experts]
    )
    assert "dropout=0.1 cannot act before" in refused("olmoe", dropout=0.1, targets=[LoraTarget.experts])
    monkeypatch.setattr(lora, "find_spec", lambda _: None)
    assert "needs the package peft: pip install '.[lora]' in the directory of pregate, or" in refused("switch")
    with pytest.raises(UsageError, match=r"train\.lora is for train\.trainable=lora"):
        Run(train=TrainConfig(lora=LoraConfig(rank=4)))
    with pytest.raises(UsageError, match="must name each part once"):
        Run(train=TrainConfig(trainable=Trainable.lora, lora=LoraConfig(targets=[LoraTarget.experts] * 2)))


@every_family
def test_attention_and_experts_of_every_family_can_be_adapted(row: Row) -> None:
    upstream = upstream_model(row, 0)
    family = family_of(upstream.config.to_dict())
    model = family.model_class(family.config(upstream.config.to_dict()))
    modules, tensors = lora.targets_of(model, BOTH)
    assert modules and any("expert" in name for name in (*modules, *tensors))
    assert not any("gate." in name or "router" in name for name in modules)


def test_the_parts_of_a_model() -> None:
    def named(model: Any, target: LoraTarget) -> set[str]:
        modules, tensors = lora.targets_of(model, LoraConfig(targets=[target]))
        assert len({*modules, *tensors}) == len(modules) + len(tensors)
        return {*modules, *tensors}

    model = switch()
    assert len(named(model, LoraTarget.attention)) == 4 * 4 + 8 * 4
    assert named(model, LoraTarget.dense) == {
        f"{stack}.block.{layer}.layer.{part}.mlp.{matrix}"
        for stack, part in (("encoder", 1), ("decoder", 2))
        for layer in (0, 2)
        for matrix in ("wi", "wo")
    }
    experts = named(model, LoraTarget.experts)
    assert len(experts) == 4 * 5 * 2 and all(".expert_" in name for name in experts)
    assert named(olmoe(), LoraTarget.experts) == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(3) for name in ("gate_up_proj", "down_proj")
    }
