"""Files of a run: whole or absent, exact, and free of code."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pregate.config import Optimizer, TrainConfig
from pregate.training.checkpoint import (
    TrainState,
    load_optimizer_state,
    optimizer_state,
    random_state,
    recover,
    replaced,
    set_random_state,
)
from pregate.training.optim import build_optimizer
from tests.tiny import batch, pregated_model


def test_a_failed_write_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "last"
    with replaced(target) as fresh:
        (fresh / "a").write_text("first")
    with pytest.raises(OSError, match="disk full"), replaced(target) as fresh:
        (fresh / "a").write_text("second")
        raise OSError("disk full")
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_replacement_leaves_nothing_of_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for name in ("a", "b"):
        with replaced(target) as fresh:
            (fresh / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("new_in_place", [False, True])
def test_a_replacement_killed_between_its_renames_is_recovered(tmp_path: Path, new_in_place: bool) -> None:
    target, previous = tmp_path / "last", tmp_path / ".last.old"
    previous.mkdir()
    (previous / "a").write_text("old")
    if new_in_place:
        target.mkdir()
        (target / "a").write_text("new")
    recover(target)
    assert (target / "a").read_text() == ("new" if new_in_place else "old")
    assert not previous.exists()


@pytest.mark.parametrize("kind", list(Optimizer))
def test_optimizer_state_comes_back_exactly(kind: Optimizer) -> None:
    train = TrainConfig(optimizer=kind, learning_rate=1e-2)
    models = [pregated_model(), pregated_model()]
    optimizers = [build_optimizer(model, train) for model in models]

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(**batch(seed)).loss.backward()
        optimizer.step()

    step(models[0], optimizers[0], 0)
    models[1].load_state_dict(models[0].state_dict())
    tensors, numbers = optimizer_state(optimizers[0], models[0])
    assert tensors
    load_optimizer_state(optimizers[1], models[1], {k: v.clone() for k, v in tensors.items()}, numbers)
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 1)
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_random_states_come_back_through_json() -> None:
    import json

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.gauss(0, 1)  # leaves a cached second value behind, as does the next line
    np.random.randn()
    state = json.loads(json.dumps(random_state()))
    first = (*draw(), random.gauss(0, 1), float(np.random.randn()))
    set_random_state(state)
    assert (*draw(), random.gauss(0, 1), float(np.random.randn())) == first


def test_a_better_score_wins_and_a_lower_loss_breaks_ties() -> None:
    state = TrainState()
    assert state.improves(0.0, 5.0)
    state.best_score, state.best_loss = 50.0, 1.0
    assert state.improves(50.1, 9.0)
    assert state.improves(50.0, 0.9)
    assert not state.improves(50.0, 1.0)
    assert not state.improves(49.9, 0.1)


def test_a_loss_improves_downwards() -> None:
    state = TrainState()
    assert state.improves(3.0, 3.0, lower=True)
    state.best_score = state.best_loss = 3.0
    assert state.improves(2.9, 2.9, lower=True)
    assert not state.improves(3.0, 3.0, lower=True)
    assert not state.improves(3.1, 3.1, lower=True)
