"""Slabs hold exactly the checkpoint's bytes, in both tiers, and a damaged pack is refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from pregate.config import UsageError
from pregate.engine.io.host_cache import HostBuffers
from pregate.engine.storage import aligned_memory
from pregate.engine.storage import pack as pack_module
from pregate.engine.storage import store as store_module
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes
from pregate.engine.storage.pack import FORMAT, check_experts, pack, read_index
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.storage.store import DiskStore, DramStore
from pregate.models.checkpoint import open_checkpoint
from pregate.models.family import experts_of
from pregate.system.directory_lock import held
from tests.tiny import pregated_model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def packed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("checkpoint")
    model = pregated_model(0).to(request.param)
    model.save_pretrained(directory)
    checkpoint, family = open_checkpoint(str(directory)), experts_of(model.config)
    layout = SlabLayout.of(family, request.param)
    where = pack(checkpoint, family, layout, directory / "experts")
    return {"model": model, "checkpoint": checkpoint, "family": family, "layout": layout, "where": where}


@pytest.mark.timeout(60)
def test_a_pack_is_put_into_a_directory_that_the_command_holds(packed: dict[str, Any], tmp_path: Path) -> None:
    with held(tmp_path, "run_dir"):
        where = pack(packed["checkpoint"], packed["family"], packed["layout"], tmp_path / "experts")
        assert (where / "slabs.bin").read_bytes() == (packed["where"] / "slabs.bin").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]


@pytest.mark.parametrize("tier", ["dram", "disk"])
def test_slabs_hold_the_experts_weights(packed: dict[str, Any], tier: str) -> None:
    layout, family = packed["layout"], packed["family"]
    if tier == "disk":
        store: Any = DiskStore(packed["where"])
    else:
        store = DramStore(packed["checkpoint"], family, layout, page_locked=False)
    weights = packed["model"].state_dict()
    slab = aligned_bytes(layout.slab_bytes)
    assert len(family.keys()) == 30
    for key in family.keys():  # noqa: SIM118 - not a mapping
        slab.fill_(255)
        store.read_into(key, slab)
        for view, name in zip(layout.views(slab), family.tensor_names(key), strict=True):
            assert torch.equal(view, weights[name]), name
    store.close()


def test_layout_is_aligned(packed: dict[str, Any]) -> None:
    layout = packed["layout"]
    assert layout.slab_bytes % 4096 == 0
    assert all(place.offset % 64 == 0 for place in layout.matrices)
    assert aligned_bytes(10_000).data_ptr() % 4096 == 0


def test_checksums_are_of_the_slabs(packed: dict[str, Any]) -> None:
    index = read_index(packed["where"])
    data = (packed["where"] / "slabs.bin").read_bytes()
    for key, offset in index.offsets.items():
        assert xxhash.xxh3_64_intdigest(data[offset : offset + index.layout.slab_bytes]) == index.checksums[key]


def test_a_pack_is_kept_until_its_checkpoint_changes(packed: dict[str, Any]) -> None:
    arguments = (packed["checkpoint"], packed["family"], packed["layout"], packed["where"])
    before = (packed["where"] / "slabs.bin").stat().st_ino
    pack(*arguments)
    assert (packed["where"] / "slabs.bin").stat().st_ino == before
    weights = packed["checkpoint"].files[0]
    os.utime(weights, ns=(1, 1))
    pack(*arguments)
    assert (packed["where"] / "slabs.bin").stat().st_ino == before  # another time, the same content
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2] + bytes(byte ^ 1 for byte in data[len(data) // 2 :]))
    os.utime(weights, ns=(1, 1))
    try:
        pack(*arguments)
        assert (packed["where"] / "slabs.bin").stat().st_ino != before
    finally:
        weights.write_bytes(data)


def test_a_truncated_pack_is_refused(packed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text((packed["where"] / "index.json").read_text())
    (tmp_path / "slabs.bin").write_bytes((packed["where"] / "slabs.bin").read_bytes()[:-1])
    with pytest.raises(UsageError, match="is truncated: remove"):
        DiskStore(tmp_path)


@pytest.mark.parametrize("damage", ["not json", json.dumps({"format": FORMAT})])
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "index.json").write_text(damage)
    with pytest.raises(UsageError, match="cannot be read: remove"):
        read_index(tmp_path)


def test_a_strangers_directory_is_not_overwritten(packed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds something that is not a pack"):
        pack(packed["checkpoint"], packed["family"], packed["layout"], tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_strangers_index_is_no_licence_to_replace_his_directory(packed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds something that is not a pack"):
        pack(packed["checkpoint"], packed["family"], packed["layout"], tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_told(packed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written to .* set engine\.pack_dir"):
        pack(packed["checkpoint"], packed["family"], packed["layout"], tmp_path / "file" / "experts")


def test_a_pack_that_another_process_finished_first_is_kept(
    packed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "experts"
    write = pack_module.write_json

    def overtaken(path: Path, index: Any) -> None:
        write(path, index)
        if not where.exists():
            shutil.copytree(path.parent, where)

    monkeypatch.setattr(pack_module, "write_json", overtaken)
    other: list[int] = []
    put = pack_module._put_in_place

    def noted(*arguments: Any) -> None:
        other.append((where / "slabs.bin").stat().st_ino)
        put(*arguments)

    monkeypatch.setattr(pack_module, "_put_in_place", noted)
    pack(packed["checkpoint"], packed["family"], packed["layout"], where)
    assert [(where / "slabs.bin").stat().st_ino] == other
    assert list(tmp_path.iterdir()) == [where]


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the memory that is page-locked."""
    addresses: list[int] = []
    monkeypatch.setattr(aligned_memory, "page_lock", lambda memory: addresses.append(memory.data_ptr()))
    monkeypatch.setattr(aligned_memory, "page_unlock", lambda memory: addresses.remove(memory.data_ptr()))
    return addresses


def of_several_chunks(packed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> DramStore:
    monkeypatch.setattr(store_module, "CHUNK", 7 * packed["layout"].slab_bytes)
    return DramStore(packed["checkpoint"], packed["family"], packed["layout"], page_locked=True)


def test_a_store_that_is_dropped_unclosed_leaves_no_memory_locked(
    packed: dict[str, Any], locked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of five chunks is unlocked once: an address that is not locked any more would raise."""
    store: Any = of_several_chunks(packed, monkeypatch)
    assert len(set(locked)) == 5
    store.itself = store
    del store
    gc.collect()
    assert locked == []
    store = of_several_chunks(packed, monkeypatch)
    store.close()
    store.close()
    assert locked == []


@pytest.mark.parametrize("where", ["process", "end"])
def test_memory_is_not_unlocked_where_that_would_be_wrong(
    packed: dict[str, Any], locked: list[int], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """In a forked process, to which it does not belong, and while the interpreter ends."""
    store = of_several_chunks(packed, monkeypatch)
    with monkeypatch.context() as elsewhere:
        if where == "process":
            elsewhere.setattr(os, "getpid", lambda: 1)
        else:
            elsewhere.setattr(sys, "is_finalizing", lambda: True)
        del store
        gc.collect()
        assert len(locked) == 5


def test_a_store_that_could_not_lock_all_its_memory_leaves_none_locked(
    packed: dict[str, Any], locked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = aligned_memory.page_lock

    def third_fails(memory: torch.Tensor) -> None:
        if len(locked) == 2:
            raise UsageError("no more")
        lock(memory)

    monkeypatch.setattr(aligned_memory, "page_lock", third_fails)
    with pytest.raises(UsageError, match="no more"):
        of_several_chunks(packed, monkeypatch)
    gc.collect()
    assert locked == []


def test_host_buffers_that_are_dropped_are_unlocked_behind_their_copies(locked: list[int]) -> None:
    done: list[int] = []

    class Copied:
        def synchronize(self) -> None:
            done.append(len(locked))

    buffers = HostBuffers(3, PAGE, page_locked=True)
    assert len(locked) == 1
    buffers._buffers[1].copied = Copied()
    del buffers
    gc.collect()
    assert locked == [] and done == [1]


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_incomplete_experts_are_refused(packed: dict[str, Any], damage: str) -> None:
    checkpoint, family = packed["checkpoint"], packed["family"]
    check_experts(checkpoint, family)
    name = family.tensor_names(family.keys()[17])[1]
    tensors = dict(checkpoint.tensors)
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = replace(tensors[name], shape=(1, 1))
    with pytest.raises(UsageError, match=f"{name}.*: use the complete weights"):
        check_experts(replace(checkpoint, tensors=tensors), family)


def test_an_interrupted_pack_leaves_nothing(
    packed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(packed["checkpoint"], packed["family"], packed["layout"], tmp_path / "experts")
    assert list(tmp_path.iterdir()) == []
