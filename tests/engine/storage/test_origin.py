"""A pack is served for the weights it was made from and for no others, whatever sizes and times say; and it is not
packed again, nor read through, without need."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from pregate.config import CacheRule, Policy, SlabDtype, Tier, UsageError
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from pregate.engine.storage import origin, pack
from pregate.engine.storage.slabs import SlabLayout
from pregate.models import checkpoint
from pregate.models.checkpoint import SourceCheckpoint, open_checkpoint
from pregate.models.family import experts_of
from pregate.models.loading import load_resident
from tests.engine.serving import as_stored, assert_same, generated, request
from tests.tiny import batch, pregated_model

WEIGHTS = "model.safetensors"
Change = Callable[[str, Tensor], Tensor]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    pregated_model(3).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(params=["settled", "just written"])
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settled: what the file system says is trusted. A write must then come in another tick than the one before."""
    if request.param == "settled":
        trust(monkeypatch)


def trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceCheckpoint, "settled", lambda _: True)


def other_experts(name: str, tensor: Tensor) -> Tensor:
    return tensor.flip(0) if "expert_" in name else tensor


def overwrite(file: Path, change: Change) -> None:
    """In place, with the same size and times, as a copy with fixed times does."""
    time.sleep(0.02)  # the next tick of the clock that times of change are taken from
    before = file.stat()
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    data = save(tensors, {"format": "pt"})
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def slabs(directory: Path, name: str = "experts") -> int:
    return (directory / name / "slabs.bin").stat().st_ino


def assert_served(directory: Path, **options: Any) -> Tensor:
    """Tokens and logits of what `directory` holds now; returns the logits of a teacher-forced pass."""
    expected: Any = load_resident(directory)
    layout = SlabLayout.of(experts_of(expected.config), torch.float32, options.get("slab_dtype", "source"))
    if layout.is_quantised:
        expected = as_stored(expected, layout)
    with OffloadEngine.open(directory, tier=Tier.disk, cache=CacheRule.lru, **options) as engine:
        got = generated(engine.generate, request(2))
        logits = engine.forward(**batch(0)).logits
        assert engine.counters.bytes_moved > 0 or engine.policy is Policy.gpu_only
    with torch.inference_mode():
        wanted = expected(**batch(0)).logits
    assert logits.isfinite().all() and torch.allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    assert_same(got, generated(expected.generate, request(2)), rtol=1e-4, atol=1e-5)
    return logits


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("slab_dtype", [SlabDtype.source, SlabDtype.int8])
@pytest.mark.parametrize("policy", [Policy.pre_gated, Policy.gpu_only])
def test_weights_overwritten_in_place(
    directory: Path, slab_dtype: SlabDtype, policy: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"slab_dtype": slab_dtype, "policy": policy}
    old = assert_served(directory, **options)
    assert capsys.readouterr().err == ""
    overwrite(directory / WEIGHTS, other_experts)
    new = assert_served(directory, **options)
    assert (new - old).abs().max() > 0.1
    told = capsys.readouterr().err
    assert told.count("pregate: ") == 1
    assert f"was packed from other weights than {directory} holds now: the experts are packed again." in told


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("number", [0, 14, 29])
def test_one_bit_of_one_expert(directory: Path, number: int) -> None:
    family = experts_of(pregated_model(3).config)
    altered = family.tensor_names(family.keys()[number])[number % 2]

    def flip(name: str, tensor: Tensor) -> Tensor:
        if name == altered:
            tensor.view(torch.uint8)[-1, -1] ^= 1
        return tensor

    assert_served(directory)
    before = slabs(directory)
    overwrite(directory / WEIGHTS, flip)
    open_store(directory, tier=Tier.disk).close()
    assert slabs(directory) != before
    assert_served(directory)


@pytest.mark.usefixtures("clock")
def test_weights_that_are_no_experts(directory: Path) -> None:
    """They are read at every opening: the pack stays, and what they do is seen."""
    old, before = assert_served(directory), slabs(directory)
    overwrite(directory / WEIGHTS, lambda name, tensor: tensor if "expert_" in name else tensor.flip(0))
    assert (assert_served(directory) - old).abs().max() > 0.1
    assert slabs(directory) == before


def test_the_same_content_elsewhere_keeps_its_pack(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trust(monkeypatch)
    assert_served(directory)
    monkeypatch.setattr(pack, "_write_pack", lambda *_: pytest.fail("packed again"))
    shutil.copytree(directory, tmp_path / "copy")
    os.utime(tmp_path / "copy" / WEIGHTS, ns=(1, 1))
    directory.rename(tmp_path / "moved")
    compared = counted(monkeypatch)
    for place in (tmp_path / "copy", tmp_path / "moved"):
        assert_served(place)
        assert_served(place)
    assert compared == [tmp_path / "copy"]  # once; a directory that is renamed leaves its files' times alone
    assert capsys.readouterr().err == ""  # these are too small to take long


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints whose experts are read from now on."""
    read, seen = origin.read_experts, []

    def counting(source: SourceCheckpoint, family: Any) -> Any:
        seen.append(source.directory)
        return read(source, family)

    monkeypatch.setattr(origin, "read_experts", counting)
    return seen


def test_a_long_comparison_is_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trust(monkeypatch)
    assert_served(directory)
    monkeypatch.setattr(origin, "LONG_CHECK", 10_000)
    os.utime(directory / WEIGHTS, ns=(1, 1))
    assert_served(directory)
    assert "were written or moved since" in (told := capsys.readouterr().err) and "comparing 134 kB of experts" in told
    assert_served(directory)
    assert capsys.readouterr().err == ""


def test_what_was_written_a_moment_ago_is_compared(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tick may bring another write. Later, the file system is believed."""
    monkeypatch.setattr(checkpoint, "SETTLED_NS", 10**18)
    compared = counted(monkeypatch)
    assert_served(directory)
    assert not (directory / "experts" / "source.json").exists()
    assert_served(directory)
    assert compared == [directory]
    monkeypatch.setattr(checkpoint, "SETTLED_NS", -(10**18))
    for _ in range(3):
        assert_served(directory)
    assert compared == [directory] * 2
    assert (directory / "experts" / "source.json").is_file()


def test_a_pack_of_another_checkpoint(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_served(directory)
    pregated_model(4).save_pretrained(tmp_path / "other")
    shutil.move(directory / "experts", tmp_path / "other" / "experts")
    shutil.copystat(directory / WEIGHTS, tmp_path / "other" / WEIGHTS)
    assert_served(tmp_path / "other")
    assert "was packed from other weights" in capsys.readouterr().err
    # and one place for two checkpoints in turn
    for place in (directory, tmp_path / "other", directory):
        assert_served(place, pack_dir=tmp_path / "shared")


@pytest.mark.usefixtures("clock")
def test_a_snapshot_of_links(directory: Path, tmp_path: Path) -> None:
    """As the hub's cache is: the blob's times count, and where a link points."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir(), snapshot.mkdir()
    for file in directory.iterdir():
        shutil.copy2(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    first, before = assert_served(snapshot), slabs(snapshot)
    assert_served(snapshot)
    assert slabs(snapshot) == before
    overwrite(blobs / WEIGHTS, other_experts)
    second = assert_served(snapshot)
    assert (second - first).abs().max() > 0.1
    pregated_model(4).save_pretrained(tmp_path / "other")
    shutil.copystat(blobs / WEIGHTS, tmp_path / "other" / WEIGHTS)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(tmp_path / "other" / WEIGHTS)
    assert (assert_served(snapshot) - second).abs().max() > 0.1


@pytest.mark.usefixtures("clock")
def test_an_index_that_takes_a_tensor_from_another_file(directory: Path) -> None:
    """The files stay what they are."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    moved = [name for name in tensors if "expert_2.wi" in name]
    save_file(tensors, directory / "model-1.safetensors", {"format": "pt"})
    save_file({n: tensors[n].flip(0).contiguous() for n in moved}, directory / "model-2.safetensors", {"format": "pt"})

    def packed_from(second: list[str]) -> int:
        weight_map = {name: f"model-{1 + (name in second)}.safetensors" for name in tensors}
        content = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(content)
        open_store(directory, tier=Tier.disk).close()
        return slabs(directory)

    before = packed_from(moved[:1])  # so that both files are always read
    assert packed_from(moved[:1]) == before
    assert packed_from(moved) != before


def test_a_pack_that_must_not_be_written_to(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process compares once all the same."""
    trust(monkeypatch)
    assert_served(directory)

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(origin, "write_json", refused)
    before, compared = (directory / "experts" / "source.json").read_text(), counted(monkeypatch)
    os.utime(directory / WEIGHTS, ns=(1, 1))
    for _ in range(3):
        assert_served(directory)
    assert compared == [directory]
    assert (directory / "experts" / "source.json").read_text() == before
    overwrite(directory / WEIGHTS, lambda name, tensor: tensor)
    assert_served(directory)
    assert compared == [directory] * 2


@pytest.mark.parametrize("seen", ["", "[]", "null", '{"source": 1}', "\x00"])
def test_damaged_signs_are_no_signs(directory: Path, monkeypatch: pytest.MonkeyPatch, seen: str) -> None:
    trust(monkeypatch)
    assert_served(directory)
    monkeypatch.setattr(origin, "_known", {})
    (directory / "experts" / "source.json").write_text(seen)
    (directory / "experts" / ".source.json.1.tmp").write_text("cut short")
    before, compared = slabs(directory), counted(monkeypatch)
    assert_served(directory)
    assert slabs(directory) == before and compared == [directory]
    overwrite(directory / WEIGHTS, other_experts)
    assert_served(directory)  # what was cut short is no stranger's file


def test_a_pack_of_an_earlier_version(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_served(directory)
    path = directory / "experts" / "index.json"
    index = json.loads(path.read_text())
    stat = (directory / WEIGHTS).stat()
    for slab in index["slabs"]:
        del slab["source_xxh3_64"]
    index |= {"format": 3, "source": {WEIGHTS: [stat.st_size, stat.st_mtime_ns]}}
    path.write_text(json.dumps(index))
    assert_served(directory)
    assert "was packed by another version: the experts are packed again." in capsys.readouterr().err
    assert json.loads(path.read_text())["format"] == pack.FORMAT > 3


@pytest.mark.parametrize("tier", [Tier.disk, Tier.dram])
def test_weights_written_while_they_are_read(directory: Path, monkeypatch: pytest.MonkeyPatch, tier: Tier) -> None:
    encode, calls = SlabLayout.encode, []

    def slow(self: SlabLayout, *arguments: Any) -> None:
        encode(self, *arguments)
        calls.append(1)
        if len(calls) == 20:
            overwrite(directory / WEIGHTS, other_experts)

    with monkeypatch.context() as patched:
        patched.setattr(SlabLayout, "encode", slow)
        with pytest.raises(UsageError, match="was written to while it was read: run the command again"):
            open_store(directory, tier=tier)
        assert len(calls) == 30 and not list(directory.glob("experts*"))
    assert_served(directory)


def test_several_that_open_it_at_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "RECORDED_BYTES", 20_000)
    assert_served(directory)
    overwrite(directory / WEIGHTS, other_experts)
    faults: list[BaseException] = []

    def opened() -> None:
        try:
            store = open_store(directory, tier=Tier.disk)
            store.verify()  # type: ignore[attr-defined]
            store.close()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=opened) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert_served(directory)
    assert sorted(path.name for path in directory.glob("experts*")) == ["experts"]


@pytest.mark.parametrize("tier", [Tier.disk, Tier.dram])
def test_a_store_of_other_weights(directory: Path, tmp_path: Path, tier: Tier) -> None:
    """Of the same form, so that only its tokens would tell."""
    pregated_model(4).save_pretrained(tmp_path / "other")
    other, own = (open_store(place, tier=tier) for place in (tmp_path / "other", directory))
    with OffloadEngine.open(directory, store=own) as engine:
        assert_same(generated(engine.generate, request(2)), generated(pregated_model(3).generate, request(2)))
    with pytest.raises(UsageError, match=rf"holds other experts than {directory} does now: open one with open_store"):
        OffloadEngine.open(directory, store=other)
    overwrite(directory / WEIGHTS, other_experts)
    with pytest.raises(UsageError, match="holds other experts than"):
        OffloadEngine.open(directory, store=own)
    other.close(), own.close()


def test_the_signs_of_a_file(directory: Path) -> None:
    """Without a time of change, as some file systems are, bytes spread over the file tell that others were written."""
    before = open_checkpoint(str(directory)).identity()
    assert before == json.loads(json.dumps(before)) == open_checkpoint(str(directory)).identity()
    overwrite(directory / WEIGHTS, lambda _, tensor: tensor * 1.001)
    [was], [now] = before["files"].values(), open_checkpoint(str(directory)).identity()["files"].values()
    size, written, changed, number, sample = (a == b for a, b in zip(was, now, strict=True))
    assert (size, written, number) == (True, True, True) and not changed and not sample
    (directory / WEIGHTS).unlink()
    with pytest.raises(UsageError, match=f"{WEIGHTS} cannot be read any more"):
        SourceCheckpoint(directory, {}, (directory / WEIGHTS,), {}).identity()
