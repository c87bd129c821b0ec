"""What a killed conversion or packing has finished is taken up by the same command, and by no other."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pregate.config import PreGateConfig, Tier, UsageError
from pregate.conversion import shards
from pregate.conversion.manifest import MANIFEST
from pregate.conversion.write import convert
from pregate.engine.opening import open_store
from pregate.engine.storage import origin, pack
from pregate.models.checkpoint import SourceCheckpoint, _describe
from pregate.system.durable import LOCK, PROGRESS
from tests.system.power import Tree, tree_of
from tests.tiny import pregated_model, upstream_model

SHARD = 40_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    upstream_model(0).save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


def killed(work: Callable[[], Any], owner: Any, function: str, at: int) -> None:
    """Do `work` in a process that is killed when `function` of `owner` is called for the time number `at`."""
    child = os.fork()
    if child == 0:
        real, calls = getattr(owner, function), []

        def deadly(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(owner, function, deadly)
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def converted(source: Path, output: Path, lookahead: int = 1) -> Tree:
    convert(str(source), output, PreGateConfig(lookahead), max_shard_bytes=SHARD)
    tree = tree_of(output)
    manifest = json.loads(tree.pop(MANIFEST))
    assert len(manifest.pop("source_sha256")) == len(list(source.glob("*.safetensors")))
    assert len([name for name in tree if name.endswith(".safetensors")]) > 4
    return tree


def numbers(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of writing of every whole weight file."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors")}


def only(folder: Path) -> Path:
    (left,) = folder.glob("*.partial-*")
    return left


def convert_killed(source: Path, output: Path, at: int = 4) -> dict[str, tuple[int, int]]:
    killed(lambda: converted(source, output), shards, "write_shard", at)
    assert not output.exists()
    return numbers(only(output.parent))


def test_a_killed_conversion_goes_on(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished = convert_killed(source, tmp_path / "place" / "out")
    assert len(finished) in (2, 3), "the last one may not have reached the disk"
    assert "and is taken up" not in capsys.readouterr().err
    # killed again, in the middle of a file
    killed(lambda: converted(source, tmp_path / "place" / "out"), shards, "write_all", 12)
    assert list(only(tmp_path / "place").glob("*.part"))
    later = numbers(only(tmp_path / "place"))
    assert later.items() >= finished.items()
    whole = converted(source, tmp_path / "place" / "out")
    assert "and is taken up" in capsys.readouterr().err
    assert numbers(tmp_path / "place" / "out").items() >= later.items()
    assert whole == converted(source, tmp_path / "undisturbed")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


@pytest.mark.parametrize("other", ["settings", "weights"])
def test_another_conversion_begins_anew(
    source: Path, tmp_path: Path, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if other == "weights":
        upstream_model(1).save_pretrained(tmp_path / "source", max_shard_size="60KB")
        source = tmp_path / "source"
    finished = convert_killed(source, tmp_path / "place" / "out")
    if other == "weights":
        upstream_model(2).save_pretrained(source, max_shard_size="60KB")
    lookahead = 2 if other == "settings" else 1
    found = converted(source, tmp_path / "place" / "out", lookahead)
    assert "was begun with other weights or settings: it is removed" in capsys.readouterr().err
    assert not set(finished.values()) & set(numbers(tmp_path / "place" / "out").values())
    assert found == converted(source, tmp_path / "undisturbed", lookahead)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_an_interrupted_conversion_has_finished_stays(
    source: Path,
    tmp_path: Path,
    failure: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, calls = shards.write_shard, []

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise failure
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UsageError):
            converted(source, tmp_path / "out")
    finished = numbers(only(tmp_path))
    assert len(finished) == 2
    assert f"what is finished lies in {only(tmp_path)}: the same command goes on" in capsys.readouterr().err
    found = converted(source, tmp_path / "out")
    assert numbers(tmp_path / "out").items() >= finished.items()
    assert found == converted(source, tmp_path / "undisturbed")


def test_weights_written_while_they_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays of what may be half old, half new."""
    upstream_model(1).save_pretrained(tmp_path / "source")
    write = shards.write_shard

    def disturbed(*arguments: Any) -> None:
        write(*arguments)
        os.utime(tmp_path / "source" / "model.safetensors")

    monkeypatch.setattr(shards, "write_shard", disturbed)
    with pytest.raises(UsageError, match="was written to while it was read"):
        converted(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_packing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SourceCheckpoint, "settled", lambda _: True)
    for name in ("checkpoint", "undisturbed"):
        pregated_model(3).save_pretrained(tmp_path / name)
    place = tmp_path / "checkpoint" / "experts"

    def packed(directory: Path) -> Tree:
        open_store(directory, tier=Tier.disk).close()
        return {name: part for name, part in tree_of(directory / "experts").items() if name != origin.SEEN}

    whole = packed(tmp_path / "undisturbed")
    slab_bytes = json.loads(whole["index.json"])["slab_bytes"]
    monkeypatch.setattr(pack, "RECORDED_BYTES", 4 * slab_bytes)
    for at in (15, 11):
        killed(lambda: packed(tmp_path / "checkpoint"), pack, "write_all", at)
        assert not place.exists()
    left = only(tmp_path / "checkpoint")
    done = len(json.loads((left / PROGRESS).read_text())["progress"]["slabs"])
    assert done in (12, 16, 20) and {path.name for path in left.iterdir()} >= {LOCK, PROGRESS, "slabs.bin"}
    (left / f".{PROGRESS}.1.tmp").write_text("cut short")
    inode, written = (left / "slabs.bin").stat().st_ino, []
    with monkeypatch.context() as patched:
        write = pack.write_all
        patched.setattr(pack, "write_all", lambda opened, data: (written.append(len(data)), write(opened, data)))
        assert packed(tmp_path / "checkpoint") == whole
    assert sum(written) == len(whole["slabs.bin"]) - done * slab_bytes > 0
    assert (place / "slabs.bin").stat().st_ino == inode
    assert not list((tmp_path / "checkpoint").glob("*.partial-*"))


def test_files_are_those_of_the_safetensors_writer(tmp_path: Path) -> None:
    """Byte for byte, names beyond ASCII, scalars and empty tensors included."""
    tensors = {"b.é": torch.randn(3, 5), "a": torch.randn(()), "c": torch.zeros(0, 4), "B": torch.arange(7.0)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = SourceCheckpoint(tmp_path, {}, (), _describe(tmp_path / "model.safetensors"))
    names = {name: name for name in reversed(tensors)}
    files = shards.Shards(checkpoint, {"out": names}, lambda name: name)
    shards.write_shard(tmp_path / "out.part", files, names, lambda _: None)
    assert (tmp_path / "out.part").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert torch.equal(load_file(tmp_path / "out.part")["B"], tensors["B"])
