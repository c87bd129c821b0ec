"""No moment at which a power cut leaves neither the old nor the new, and nothing of killed processes for good."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pregate.config import Device, PreGateConfig, Run, Tier, TrackingConfig, save_run
from pregate.config import Tracker as TrackerKind
from pregate.conversion.write import convert
from pregate.engine.opening import open_store
from pregate.engine.storage.pack import pack, read_index
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.checkpoint import open_checkpoint
from pregate.models.family import experts_of
from pregate.system import durable
from pregate.system.durable import write_json
from pregate.tracking import open_tracker
from pregate.training.durable_directories import recover, save_model
from pregate.training.optimizer_and_schedule import build_optimizer
from pregate.training.saved_state import PREVIOUS, damage, load_last, save_last, settle, steps_done
from pregate.training.state_values import TrainState, random_state
from tests.system.power import Disk, Tree, lay, tree_of
from tests.tiny import batch, pregated_model, upstream_model
from tests.training.copying import SHALLOW, recipe, train_tiny, word_tokenizer


def test_the_model_of_the_disk_loses_what_is_not_flushed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with Disk(tmp_path).watched() as disk:
        (tmp_path / "b").write_text("new")
        (tmp_path / "b").replace(tmp_path / "a")
    assert {"a": b""} in disk.outcomes and {"a": b"old", "b": b""} in disk.outcomes
    assert {"a": b"new"} not in disk.outcomes


def test_a_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    run = Run(name="first")
    save_run(run, tmp_path / "config.yaml")
    write_json(tmp_path / "summary.json", {"steps": 1})
    old = tree_of(tmp_path)
    run.name = "second"
    with Disk(tmp_path).watched() as disk:
        save_run(run, tmp_path / "config.yaml")
        write_json(tmp_path / "summary.json", {"steps": 2})
        disk_new = tree_of(tmp_path)
        for tree in disk.outcomes:
            for name in old:
                assert tree[name] in (old[name], disk_new[name])
        assert any(tree["config.yaml"] != old["config.yaml"] for tree in disk.outcomes)
        disk.forget()
    assert disk.outcomes == [disk_new]


def test_a_row_is_there_once_it_was_added(tmp_path: Path) -> None:
    with Disk(tmp_path).watched() as disk:
        durable.write_text(tmp_path / "rows", "")
        durable.append_line(tmp_path / "rows", 1)
        disk.forget()
        durable.append_line(tmp_path / "rows", 2)
    assert {tree["rows"] for tree in disk.outcomes} == {b"1\n", b"1\n2\n"}


def test_a_row_behind_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert durable.read_lines(path) == []
    durable.write_lines(path, [{"row": 1}, {"row": "ü"}])
    path.write_bytes(path.read_bytes()[:-4])  # in the middle of a letter
    assert durable.read_lines(path) == [{"row": 1}]
    durable.append_line(path, {"row": 2})
    durable.append_line(path, {"row": 3})
    assert durable.read_lines(path) == [{"row": 1}, {"row": 2}, {"row": 3}]


@pytest.mark.parametrize("keep", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_saved_state_is_whole_at_every_moment(keep: int, tmp_path: Path) -> None:
    """And those before it, between two savings."""
    model = pregated_model(**SHALLOW)
    optimizer = build_optimizer(model, recipe())
    model(**batch()).loss.backward()
    optimizer.step()
    out_dir, found = tmp_path / "run", []
    out_dir.mkdir()

    def check(done: int, tree: Tree) -> int:
        place = lay(tree, tmp_path / f"{done}-{len(found)}")
        found.append(1)
        settle(place / "last")  # refuses if there is a state, but none that is whole
        assert not (place / "last").exists() or damage(place / "last") is None
        return steps_done(place / "last")

    with Disk(out_dir).watched() as disk:
        for step in (1, 2, 3):
            disk.forget()
            state = TrainState(step=step)
            save_last(out_dir / "last", model, word_tokenizer(), optimizer, state, [random_state()], keep=keep)
            assert {check(step, tree) for tree in disk.outcomes} == {step - 1, step}
            assert len(disk.outcomes) > 5
        disk.forget()
    after = tree_of(out_dir)
    # alone, the state before goes last, and nothing is lost where that is not on the disk yet
    assert all(tree == after or keep == 1 for tree in disk.outcomes)
    assert {check(4, tree) for tree in disk.outcomes} == {3}
    lay(after, tmp_path / "end")
    kept = ["last", PREVIOUS, f"{PREVIOUS}_2"][:keep]
    assert set(after) == set(kept)
    assert [steps_done(tmp_path / "end" / name) for name in kept] == [3, 2, 1][:keep]
    assert all(damage(tmp_path / "end" / name) is None for name in kept)
    other = pregated_model(seed=1, **SHALLOW)
    loaded = load_last(tmp_path / "end" / "last", other, build_optimizer(other, recipe()))
    assert loaded is not None and loaded[0].step == 3
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_model(run / "checkpoint", pregated_model(0, **SHALLOW), word_tokenizer())
    old = tree_of(run)["checkpoint"]
    with Disk(run).watched() as disk:
        save_model(run / "checkpoint", pregated_model(1, **SHALLOW), word_tokenizer())
    new = tree_of(run)["checkpoint"]
    left = []
    for number, tree in enumerate(disk.outcomes):
        recover(lay(tree, tmp_path / str(number)) / "checkpoint")
        left.append(tree_of(tmp_path / str(number) / "checkpoint"))
    assert old != new and old in left and new in left
    assert all(tree in (old, new) for tree in left)


def test_a_state_never_comes_before_the_metrics_that_lead_to_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run = Run(tracking=TrackingConfig(kind=TrackerKind.jsonl))
    with Disk(run_dir).watched() as disk:
        with open_tracker(run, run_dir) as tracker:
            train_tiny(run_dir, steps=3, save_every=1, tracker=tracker)  # type: ignore[arg-type]
        most = 0
        for number, tree in enumerate(disk.outcomes):
            place = lay(tree, tmp_path / str(number))
            settle(place / "last")
            done = steps_done(place / "last")
            lines = tree.get("metrics.jsonl", b"").splitlines()
            assert {json.loads(line)["step"] for line in lines} >= set(range(1, done + 1))
            most = max(most, done)
        disk.forget()
    assert most == 3
    (after,) = disk.outcomes
    assert after == tree_of(run_dir) and set(after) == {"metrics.jsonl", "last", PREVIOUS, "checkpoint"}


def test_a_conversion_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    place = tmp_path / "place"
    place.mkdir()
    with Disk(place).watched() as disk:
        convert(str(tmp_path / "source"), place / "deep" / "out", PreGateConfig(1), max_shard_bytes=100_000)
        whole = tree_of(place)["deep"]["out"]
        assert len(whole) > 4 and all(whole.values()) and durable.LOCK not in whole
        seen = [{**tree.get("deep", {}).get("out", {})} for tree in disk.outcomes]
        disk.forget()
    for tree in seen:
        for mark in durable.MARKS:
            tree.pop(mark, None)
    assert {} in seen and whole in seen and all(tree in ({}, whole) for tree in seen)
    assert disk.outcomes == [{"deep": {"out": whole}}]


def test_a_pack_is_the_old_or_the_new_one_or_made_again(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def packed(seed: int) -> None:
        model = pregated_model(seed)
        model.save_pretrained(tmp_path / "checkpoint")
        family = experts_of(model.config)
        layout = SlabLayout.of(family, model.dtype)
        os.utime(tmp_path / "checkpoint" / "model.safetensors", ns=(seed, seed))
        pack(open_checkpoint(str(tmp_path / "checkpoint")), family, layout, place / "experts")

    packed(0)
    old = tree_of(place)["experts"]
    with Disk(place).watched() as disk:
        packed(1)
        new = tree_of(place)["experts"]
        readable = []
        for number, tree in enumerate(disk.outcomes):
            if "experts" in tree:
                read_index(lay(tree, tmp_path / str(number)) / "experts")
                readable.append({name: part for name, part in tree["experts"].items() if name not in durable.MARKS})
        disk.forget()
    assert set(new) == {"slabs.bin", "index.json"} and old["slabs.bin"] != new["slabs.bin"]
    assert old in readable and new in readable and all(tree in (old, new) for tree in readable)
    for tree in disk.outcomes:
        assert tree.pop("experts") == new and all(durable.PARTIAL.search(name) for name in tree)
    (tmp_path / "cut").mkdir()
    durable.clear_abandoned(lay(disk.outcomes[0], tmp_path / "cut" / "place") / "experts")
    assert list((tmp_path / "cut" / "place").iterdir()) == []


def forked(work: Callable[[], None]) -> int:
    """The number of a process that does `work` and is killed where that kills it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def killed_while_filling(target: Path) -> None:
    def work() -> None:
        with durable.partial_beside(target) as folder:
            (folder / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(forked(work), 0)
    (left,) = target.parent.glob(f"{target.name}.partial-*")
    assert {path.name for path in left.iterdir()} == {durable.LOCK, "model.safetensors"}


def test_what_a_killed_process_left_goes_and_what_a_living_one_fills_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed_while_filling(target)
    killed_while_filling(tmp_path / "outer")
    for name in ("out.partial-results", "out.partial-2024", "my-out.partial-12-0123abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("precious")
    strange = {path.name for path in tmp_path.iterdir() if not durable.PARTIAL.search(path.name.removeprefix("out"))}
    ready, begun = os.pipe()

    def work() -> None:
        with durable.partial_beside(target):
            os.write(begun, b"!")
            signal.pause()

    child = forked(work)
    try:
        os.read(ready, 1)
        durable.clear_abandoned(target)
        (living,) = target.parent.glob("out.partial-*-*")
        assert (living / durable.LOCK).exists() and f"-{child}-" in living.name
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    durable.clear_abandoned(target)
    left = {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("out.partial-*-*")) and left >= strange
    assert len(left) == 4 and len(list(tmp_path.glob("outer.partial-*"))) == 1


@pytest.mark.parametrize("after", ["mkdir", "open", "flock"])
def test_what_is_killed_before_it_is_locked_goes_too(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"

    def work() -> None:
        def end(*_: object, **__: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        where = {"mkdir": (Path, "open"), "open": (durable.fcntl, "flock"), "flock": (Path, "rename")}
        monkeypatch.setattr(*where[after], end)
        with durable.partial_beside(target):
            pass

    os.waitpid(forked(work), 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    (tmp_path / ".out.partial-notes").mkdir()
    durable.clear_abandoned(target)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial-notes"]


@pytest.mark.parametrize("before", ["open", "flock", "rename"])
def test_a_directory_that_another_process_clears_up_too_early_is_made_again(
    before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, cleared = tmp_path / "out", []
    owner, name = {"open": (Path, "open"), "flock": (durable.fcntl, "flock"), "rename": (Path, "rename")}[before]
    real = getattr(owner, name)

    def cleared_before(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, real)
        cleared.extend(tmp_path.iterdir())
        durable.clear_abandoned(target)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, cleared_before)
    with durable.partial_beside(target) as folder:
        assert len(cleared) == 1 and cleared[0].name != f".{folder.name}" and (folder / durable.LOCK).exists()
        (folder / "whole").touch()
        durable.clear_abandoned(target)
        durable.put(folder, target)
    assert list(tmp_path.iterdir()) == [target] and [path.name for path in target.iterdir()] == ["whole"]


def test_the_next_conversion_and_the_next_pack_clear_up(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    (tmp_path / "place").mkdir()
    output = tmp_path / "place" / "out"
    killed_while_filling(output)
    convert(str(tmp_path / "source"), output, PreGateConfig(1))
    assert list(output.parent.iterdir()) == [output]
    killed_while_filling(output / "experts")
    open_store(str(output), tier=Tier.disk).close()
    assert not list(output.glob("*.partial-*")) and (output / "experts" / "slabs.bin").is_file()
    (output / "experts" / ".source.json.123.tmp").write_text("{")
    open_store(str(output), tier=Tier.disk).close()
    assert {path.name for path in (output / "experts").iterdir()} <= {"index.json", "slabs.bin", "source.json"}


def test_a_file_system_without_locks_keeps_what_nobody_can_tell_to_be_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_while_filling(tmp_path / "out")

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(durable.fcntl, "flock", unsupported)
    durable.clear_abandoned(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 1
    with durable.partial_beside(tmp_path / "out") as folder:
        durable.put(folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (OSError(errno.ENOENT, "No such file"), None),
        (OSError("no number"), None),
        (ValueError("shape"), None),
    ],
)
def test_what_a_disk_refuses_is_known(error: Exception, reason: str | None) -> None:
    told = durable.refusal(error)
    assert (told is None) == (reason is None)
    assert reason is None or (told is not None and told.startswith(reason))


def test_write_json_is_whole_or_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": np.float32(0.5), "t": torch.tensor([1, 2]), "bad": float("nan"), "d": Device.cpu})
    assert json.loads(path.read_text()) == {"x": 0.5, "t": [1, 2], "bad": None, "d": "cpu"}

    class Unprintable:
        def __str__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_json(path, {"x": Unprintable()})
    assert json.loads(path.read_text())["x"] == 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
