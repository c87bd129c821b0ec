"""Schedules against hand values, which parameters decay, clipping, dropout, precision."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from pregate.config import LoraConfig, LoraTarget, Optimizer, Precision, Run, Schedule, TrainConfig, UsageError
from pregate.training import lora, optimizer_and_schedule
from pregate.training.checks import check_precision
from pregate.training.optimizer_and_schedule import (
    autocast_dtype,
    build_optimizer,
    check_8bit,
    clip_gradients,
    learning_rate,
    parameter_groups,
    set_dropout,
)
from tests.engine.olmoe import olmoe
from tests.tiny import batch, pregated_model, upstream_model


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        (Schedule.constant, 0, [8.0] * 8),
        (Schedule.constant, 4, [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0, 8.0]),
        (Schedule.linear, 0, [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]),
        (Schedule.linear, 4, [2.0, 4.0, 6.0, 8.0, 8.0, 6.0, 4.0, 2.0]),
        (Schedule.cosine, 0, [8.0, None, 6.8284271, None, 4.0, None, 1.1715729, None]),
        (Schedule.cosine, 4, [2.0, 4.0, 6.0, 8.0, 8.0, 6.8284271, 4.0, 1.1715729]),
        (Schedule.linear, 8, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
    ],
)
def test_learning_rates(schedule: Schedule, warmup: int, expected: list[float | None]) -> None:
    train = TrainConfig(steps=8, learning_rate=8.0, schedule=schedule, warmup_steps=warmup)
    for step, rate in enumerate(expected):
        if rate is not None:
            assert learning_rate(train, step) == pytest.approx(rate), step


def test_norms_and_biases_do_not_decay() -> None:
    model = pregated_model(router_bias=True, entry="embedding")
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.1))
    assert len(decayed) + len(plain) == len(names)
    assert all("layer_norm" in n or "bias" in n for n in plain)
    assert not any("norm" in n or "bias" in n for n in decayed)
    assert any(n.endswith("entry_gates.0.layer_norm.weight") for n in plain)
    assert any(n.endswith("relative_attention_bias.weight") for n in plain)


def test_scaled_steps_are_relative_to_the_size_of_a_parameter() -> None:
    """Adam's first step is the learning rate whatever the gradient; zeros move as if they were a thousandth."""
    model = torch.nn.ParameterList([torch.full((4, 2), 3.0), torch.full((3,), 0.5), torch.zeros(5)])
    train = TrainConfig(optimizer=Optimizer.adamw_scaled, learning_rate=0.01)
    optimizer = build_optimizer(model, train)
    before = [p.detach().clone() for p in model]
    (7.0 * model[0].sum() + 0.1 * model[1].sum() + model[2].sum()).backward()
    optimizer.step()
    for parameter, old, size in zip(model, before, (3.0, 0.5, 1e-3), strict=True):
        torch.testing.assert_close(old - parameter.detach(), torch.full_like(old, 0.01 * size), rtol=1e-4, atol=0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


def test_matrices_that_begin_at_zero_move_as_random_ones_of_their_shape() -> None:
    """The second matrix of an MLP gate, and that of an adapter: a thousandth of the rate would leave them at zero."""
    model = pregated_model(gate="mlp")
    zeros = [name for name, _ in model.named_parameters() if name.endswith("nonlinear.down")]
    for name in zeros:
        torch.nn.init.zeros_(model.get_parameter(name))  # as a conversion leaves it
    if find_spec("peft") is not None:  # not on every machine that runs the GPU tests
        lora.add_adapters(model, LoraConfig(rank=4, targets=[LoraTarget.attention]))
        zeros += [name for name, _ in model.named_parameters() if ".lora_B." in name]
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    assert zeros and all(not named[name].any() for name in zeros)
    optimizer = build_optimizer(model, TrainConfig(optimizer=Optimizer.adamw_scaled, learning_rate=0.01))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name in zeros:
        moved, inputs = named[name].abs(), named[name].shape[-1]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01 / inputs**0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", list(Optimizer))
def test_an_optimizer_lowers_a_quadratic(kind: Optimizer) -> None:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(model.weight)
    optimizer = build_optimizer(model, TrainConfig(optimizer=kind, learning_rate=0.05))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.weight.square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], (losses[0], losses[-1])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_8bit(TrainConfig(optimizer=Optimizer.adamw_8bit))
    monkeypatch.setattr(optimizer_and_schedule, "find_spec", lambda _: None)
    check_8bit(TrainConfig())
    with pytest.raises(UsageError, match=r"needs the package bitsandbytes: pip install '\.\[8bit\]' in"):
        check_8bit(TrainConfig(optimizer=Optimizer.adamw_8bit))


def test_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    for clip, expected in ((None, 5.0), (10.0, 5.0), (1.0, 1.0)):
        model = torch.nn.ParameterList([torch.zeros(1), torch.zeros(1), torch.zeros(1)])
        model[0].grad, model[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert clip_gradients(model.parameters(), clip).item() == pytest.approx(5.0)
        after = torch.cat([p.grad for p in model if p.grad is not None]).norm().item()
        assert after == pytest.approx(expected, rel=1e-4), clip


@pytest.mark.parametrize(
    "make", [upstream_model, pregated_model, lambda dropout_rate: olmoe(attention_dropout=dropout_rate)]
)
def test_dropout_override_reaches_every_place(make) -> None:
    inputs = batch(target=9)
    model = make(dropout_rate=0.3).train()
    set_dropout(model, 0.0)
    first, second = (model(**inputs).logits for _ in range(2))
    assert torch.equal(first, second)
    set_dropout(model, 0.3)
    for module in model.modules():
        if "Attention" in type(module).__name__ and hasattr(module, "scaling"):
            assert 0.3 in [getattr(module, name, None) for name in ("dropout", "attention_dropout")]
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_precision_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype(Precision.auto, cpu) is None
    assert autocast_dtype(Precision.fp32, cpu) is None
    assert autocast_dtype(Precision.bf16, cpu) is torch.bfloat16


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_told_of(
    supported: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    check_precision(Run(train=TrainConfig(precision=Precision.fp32)))
    assert capsys.readouterr().err == ""
    check_precision(Run(train=TrainConfig(precision=Precision.bf16)))
    told = capsys.readouterr().err
    assert ("train.precision=fp32 is the faster choice here" in told) is not supported
