"""Files of a run: whole or absent, exact, free of code, and never taken for whole when they are not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pregate.config import Optimizer, TrainConfig, UsageError
from pregate.system import durable
from pregate.training import disk_space
from pregate.training import durable_directories as directories
from pregate.training import saved_state as module
from pregate.training.disk_space import check_space, make_room, model_bytes
from pregate.training.durable_directories import recover, replaced, save_model
from pregate.training.optimizer_and_schedule import build_optimizer, optimizer_bytes
from pregate.training.saved_state import (
    CHECKSUMS_FILE,
    DAMAGED,
    OPTIMIZER_FILE,
    PREVIOUS,
    STATE_FILE,
    damage,
    load_last,
    processes_of,
    save_last,
    settle,
    steps_done,
)
from pregate.training.state_values import (
    TrainState,
    load_optimizer_state,
    optimizer_state,
    random_state,
    set_random_state,
)
from tests.system.power import Tree, lay, tree_of
from tests.tiny import batch, pregated_model
from tests.training.copying import SHALLOW, word_tokenizer


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
    models = [pregated_model(d_ff=256), pregated_model(d_ff=256)]  # large enough for moments of 8 bits
    optimizers = [build_optimizer(model, train) for model in models]

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(**batch(seed)).loss.backward()
        optimizer.step()

    step(models[0], optimizers[0], 0)
    models[1].load_state_dict(models[0].state_dict())
    tensors, numbers = optimizer_state(optimizers[0], models[0])
    assert any(t.dtype is torch.uint8 for t in tensors.values()) == (kind is Optimizer.adamw_8bit)
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run directory with the states of steps 1 and 2."""
    model = pregated_model(**SHALLOW)
    optimizer = build_optimizer(model, TrainConfig())
    model(**batch()).loss.backward()
    optimizer.step()
    run_dir = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        save_last(run_dir / "last", model, word_tokenizer(), optimizer, TrainState(step=step), [random_state()])
    assert damage(run_dir / "last") is None and {path.name for path in run_dir.iterdir()} == {"last", PREVIOUS}
    return tree_of(run_dir)


def spoiled(content: bytes, kind: str, at: float) -> bytes | None:
    """`content` with a flipped bit, cut short, emptied, or gone."""
    place = int(at * (len(content) - 1))
    if kind == "flipped":
        return content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
    return {"cut": content[:place], "empty": b"", "gone": None}[kind]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), kind=st.sampled_from(["flipped", "cut", "empty", "gone"]), at=st.floats(0, 1))
def test_any_damage_to_any_file_is_found_and_named(
    saved: Tree, tmp_path_factory: pytest.TempPathFactory, data: Any, kind: str, at: float
) -> None:
    name = data.draw(st.sampled_from(sorted(saved["last"])))
    rest = {other: part for other, part in saved["last"].items() if other != name}
    part = spoiled(saved["last"][name], kind, at)
    last = lay(rest if part is None else {**rest, name: part}, tmp_path_factory.mktemp("spoiled") / "last")
    told = damage(last)
    # damage to the list of checksums shows itself at the list or at the file that it is wrong about
    assert told is not None and str(last) in told and (name in told or name == CHECKSUMS_FILE), told
    with pytest.raises(UsageError, match="no whole state before it") as error:
        settle(last)
    assert "\n" not in str(error.value)
    assert tree_of(last) == (rest if part is None else {**rest, name: part})
    shutil.rmtree(last.parent)


def test_a_damaged_state_gives_way_to_the_one_before_it(
    saved: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = {**saved["last"], OPTIMIZER_FILE: spoiled(saved["last"][OPTIMIZER_FILE], "flipped", 0.9)}
    run = lay({**saved, "last": spoilt}, tmp_path / "run")
    settle(run / "last")
    assert capsys.readouterr().err == (
        f"pregate: {run / 'last' / OPTIMIZER_FILE} is not as it was saved: going on from the state before it, that of "
        f"step 1 (what is damaged lies in {run / DAMAGED} until the next is saved).\n"
    )
    assert tree_of(run) == {"last": saved[PREVIOUS], DAMAGED: spoilt}
    settle(run / "last")
    assert capsys.readouterr().err == ""
    model = pregated_model(seed=1, **SHALLOW)
    optimizer = build_optimizer(model, TrainConfig())
    found = load_last(run / "last", model, optimizer)
    assert found is not None and found[0].step == 1 and optimizer.state
    save_last(run / "last", model, word_tokenizer(), optimizer, TrainState(step=2), [random_state()])
    assert {path.name: steps_done(path) for path in run.iterdir()} == {"last": 2, PREVIOUS: 1}


def test_a_record_with_a_value_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    for name, step, states in (("last", "x", 7), (PREVIOUS, 4, [{}, {}])):
        (tmp_path / name).mkdir()
        record = {"state": {"step": step}, "optimizer": {}, "random": states}
        (tmp_path / name / STATE_FILE).write_text(json.dumps(record))
    assert steps_done(tmp_path / "last") == 4 and processes_of(tmp_path / "last") == 2


def test_so_many_states_are_kept_and_the_latest_whole_one_is_used(
    saved: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pregated_model(**SHALLOW)
    optimizer = build_optimizer(model, TrainConfig())
    last = tmp_path / "last"

    def save(step: int, keep: int) -> dict[str, int]:
        save_last(last, model, word_tokenizer(), optimizer, TrainState(step=step), [random_state()], keep=keep)
        return {path.name: steps_done(path) for path in tmp_path.iterdir()}

    for step in range(1, 5):
        found = save(step, 3)
    assert found == {"last": 4, PREVIOUS: 3, "previous_2": 2}
    (last / OPTIMIZER_FILE).write_bytes(b"")
    (tmp_path / PREVIOUS / STATE_FILE).unlink()
    settle(last)
    told = capsys.readouterr().err
    assert f"{last / OPTIMIZER_FILE} is not as it was saved; {tmp_path / PREVIOUS / STATE_FILE} is missing" in told
    assert "that of step 2" in told and told.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last", DAMAGED, f"{DAMAGED}_2"} and steps_done(last) == 2
    assert save(3, 3) == {"last": 3, PREVIOUS: 2}
    assert [save(step, 3) for step in (4, 5)][1] == {"last": 5, PREVIOUS: 4, "previous_2": 3}
    (tmp_path / PREVIOUS).rename(tmp_path / "moved")  # as where a rotation was killed: its gap is filled again
    (tmp_path / "moved").rename(tmp_path / "previous_3")
    assert save(6, 3) == {"last": 6, PREVIOUS: 5, "previous_2": 3}
    assert save(7, 2) == {"last": 7, PREVIOUS: 6}
    assert save(8, 1) == {"last": 8}


def test_without_a_whole_state_nothing_is_touched(saved: Tree, tmp_path: Path) -> None:
    empty = {name: {**tree, STATE_FILE: b""} for name, tree in saved.items()}
    run = lay(empty, tmp_path / "run")
    with pytest.raises(UsageError, match=rf"last/{STATE_FILE} cannot be read and there is no whole state before it"):
        settle(run / "last")
    with pytest.raises(UsageError, match=rf"last/{STATE_FILE} is missing or cannot be read"):
        steps_done(run / "last")
    assert tree_of(run) == empty


def test_a_replacement_that_was_cut_goes_on_from_the_state_before(saved: Tree, tmp_path: Path) -> None:
    run = lay({PREVIOUS: saved[PREVIOUS], ".last.new": {STATE_FILE: b""}}, tmp_path / "run")
    assert steps_done(run / "last") == 1
    settle(run / "last")
    assert tree_of(run) == {"last": saved[PREVIOUS]}


def test_a_state_of_the_first_format_is_read(saved: Tree, tmp_path: Path) -> None:
    record = json.loads(saved["last"][STATE_FILE])
    assert record.pop("format") == 2
    old = {**saved["last"], STATE_FILE: json.dumps(record).encode()}
    del old[CHECKSUMS_FILE]
    last = lay(old, tmp_path / "last")
    settle(last)
    model = pregated_model(seed=1, **SHALLOW)
    found = load_last(last, model, build_optimizer(model, TrainConfig()))
    assert found is not None and found[0].step == 2
    for name in (OPTIMIZER_FILE, "model.safetensors"):
        cut = lay({**old, name: old[name][:-9]}, tmp_path / name)
        assert damage(cut) == f"{cut / name} cannot be read"
    assert damage(lay({STATE_FILE: old[STATE_FILE]}, tmp_path / "few")) == (
        f"{tmp_path / 'few' / OPTIMIZER_FILE} is missing"
    )


@pytest.mark.parametrize("kind", list(Optimizer))
def test_the_size_of_a_state_is_known_before_the_first_step(kind: Optimizer, tmp_path: Path) -> None:
    model = pregated_model(**SHALLOW, d_ff=256)
    optimizer = build_optimizer(model, TrainConfig(optimizer=kind))
    weights, moments = model_bytes(model), optimizer_bytes(optimizer)
    for parameter in model.parameters():  # an expert that no token has chosen yet would have no state
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_last(tmp_path / "last", model, word_tokenizer(), optimizer, TrainState(), [])
    saved = [load_file(tmp_path / "last" / name) for name in ("model.safetensors", OPTIMIZER_FILE)]
    # an Adam counts the steps of each parameter in a scalar
    assert [sum(t.nbytes for t in tensors.values() if t.ndim) for tensors in saved] == [weights, moments]
    if kind is Optimizer.adafactor:
        assert moments < 0.5 * weights
    elif kind is Optimizer.adamw_8bit:
        assert moments < 1.2 * weights  # a quarter of these of AdamW, but of what is small
    else:
        assert moments == 2 * weights


def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    for place in (durable, disk_space):
        monkeypatch.setattr(place, "free_bytes", lambda _: num_bytes)


def test_a_run_that_will_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1000, 1000, bias=False)  # 4 MB, a state 12 MB
    optimizer = torch.optim.AdamW(model.parameters())
    for saves, needed in ((1, 16), (2, 28), (9, 28)):
        free(monkeypatch, needed * 10**6)
        check_space(tmp_path / "run", model, optimizer, saves)
        free(monkeypatch, needed * 10**6 - 1)
        with pytest.raises(UsageError) as error:
            check_space(tmp_path / "run", model, optimizer, saves)
        assert str(error.value) == (
            f"Training writes {needed:.1f} MB to {tmp_path / 'run'} (states of 12.0 MB to resume from and a checkpoint "
            f"of 4.00 MB), which has {needed:.1f} MB free: make room, or choose a run_dir=DIR on another disk."
        )
        check_space(tmp_path / "run", model, optimizer, 0)
    (tmp_path / "run" / "last").mkdir(parents=True)
    (tmp_path / "run" / "last" / "weights").write_bytes(bytes(12_000_000))
    free(monkeypatch, 16_000_000)  # one state lies there
    check_space(tmp_path / "run", model, optimizer, 9)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_the_previous_state_gives_way_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("last", PREVIOUS, DAMAGED):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 103 - len(list(tmp_path.iterdir())))
    for needed, left in ((100, {"last", PREVIOUS, DAMAGED}), (101, {"last", PREVIOUS}), (102, {"last"})):
        make_room(tmp_path / "last", needed)
        assert {path.name for path in tmp_path.iterdir()} == left
        assert capsys.readouterr().err.count("pregate: the disk is nearly full: ") == (needed > 100)
    with pytest.raises(UsageError, match="needs 103 B and 102 B are free: make room"):
        make_room(tmp_path / "last", 103)
    assert (tmp_path / "last").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("may not mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_in_one_sentence_and_keeps_the_last_state(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file in turn is the one that finds no room."""
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 10**12)  # as a quota: nobody knows beforehand
    model = pregated_model(**SHALLOW)
    optimizer = build_optimizer(model, TrainConfig())
    model(**batch()).loss.backward()
    optimizer.step()
    run = small_disk / "run"

    def save(step: int) -> None:
        save_last(run / "last", model, word_tokenizer(), optimizer, TrainState(step=step), [random_state()])

    save(1)
    room = shutil.disk_usage(small_disk).free
    refused = 0
    for left in range(0, room, 65_536):
        (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
        try:
            save(2)
        except UsageError as error:
            refused += 1
            assert "cannot be written (No space left on device)" in str(error) and "\n" not in str(error)
            assert steps_done(run / "last") == 1 and damage(run / "last") is None
            assert {path.name for path in run.iterdir()} == {"last"}
            (small_disk / "other").unlink()
        else:
            break
    assert refused > 5 and {path.name: steps_done(path) for path in run.iterdir()} == {"last": 2, PREVIOUS: 1}


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "rust"],
)
@pytest.mark.parametrize("what", ["model", "tokenizer", "optimizer", "flush"])
def test_whatever_finds_no_room_is_told(
    what: str, failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = pregated_model(**SHALLOW), word_tokenizer()
    optimizer = build_optimizer(model, TrainConfig())
    save_last(tmp_path / "last", model, tokenizer, optimizer, TrainState(step=1), [])
    save_model(tmp_path / "checkpoint", model, tokenizer)
    before = tree_of(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise failure

    place, name = {
        "model": (model, "save_pretrained"),
        "tokenizer": (tokenizer, "save_pretrained"),
        "optimizer": (module, "save_file"),
        "flush": (directories, "flush_tree"),
    }[what]
    monkeypatch.setattr(place, name, full)
    with pytest.raises(UsageError, match=r"last cannot be written \(.*\), and what lay there is kept: make room"):
        save_last(tmp_path / "last", model, tokenizer, optimizer, TrainState(step=2), [])
    if what != "optimizer":
        with pytest.raises(UsageError, match="checkpoint cannot be written"):
            save_model(tmp_path / "checkpoint", model, tokenizer)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_gives_way_too(saved: Tree, tmp_path: Path, kind: str) -> None:
    run = lay({PREVIOUS: saved[PREVIOUS]}, tmp_path / "run")

    def spoil(path: Path) -> None:
        if kind == "file":
            path.write_text("spoilt")
        else:  # somebody has moved it to another disk
            path.symlink_to(lay(saved["last"], tmp_path / f"moved_{path.name}"))

    for name in (DAMAGED, ".last.new"):
        spoil(run / name)
    (run / "last").write_text("spoilt")
    settle(run / "last")
    assert {path.name: path.is_dir() for path in run.iterdir()} == {"last": True, DAMAGED: False}
    spoil(run / PREVIOUS)
    model = pregated_model(seed=1, **SHALLOW)
    optimizer = build_optimizer(model, TrainConfig())
    for step in (5, 6):
        save_last(run / "last", model, word_tokenizer(), optimizer, TrainState(step=step), [random_state()])
    assert {path.name: steps_done(path) for path in run.iterdir()} == {"last": 6, PREVIOUS: 5}
