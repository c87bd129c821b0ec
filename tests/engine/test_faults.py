"""Packs and disks that fail give one clear sentence and no wrong token, and the engine serves on after it."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pregate.config import CacheRule, Policy, Tier, UsageError
from pregate.engine.engine import OffloadEngine
from pregate.engine.io.ring import Ring
from pregate.engine.opening import open_store
from pregate.engine.storage import store
from pregate.engine.storage.aligned_memory import PAGE
from pregate.engine.storage.pack import read_index
from pregate.engine.storage.store import DamagedPackError, DiskStore, SlabReadError
from pregate.models.experts import ExpertKey
from tests.engine.hostile import Streamer
from tests.engine.serving import OFFLOADED, SLAB, Served, assert_serves, needs_io_uring, request, serve

ROADS = [pytest.param(True, id="io_uring", marks=needs_io_uring), pytest.param(False, id="threads")]
"""Ways on which slabs come from a disk to a CPU."""

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("nothing_left_behind")]


@pytest.fixture
def pack_dir(served: Served, tmp_path: Path) -> Path:
    """A pack that may be damaged."""
    open_store(served.directory, tier=Tier.disk, pack_dir=tmp_path / "experts").close()
    return tmp_path / "experts"


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert isinstance(error, UsageError)
    assert text and "\n" not in text and not text.startswith("["), text
    return text


@pytest.mark.parametrize("io_uring", ROADS)
def test_a_pack_truncated_while_it_is_open(
    served: Served, pack_dir: Path, expected: tuple[Tensor, Tensor], io_uring: bool
) -> None:
    file = pack_dir / "slabs.bin"
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2 + 100, 3 * PAGE, 0):
        options = {"pack_dir": pack_dir, "policy": Policy.prefetch_all, "io_uring": io_uring}
        with OffloadEngine.open(served.directory, **options) as engine:
            os.truncate(file, size)
            with pytest.raises(
                DamagedPackError, match=r"ends inside (en|de)coder block \d expert \d: remove .* packed a"
            ):
                serve(engine)
            file.write_bytes(whole)
            assert_serves(engine, expected)


@pytest.mark.parametrize("policy", OFFLOADED)
@pytest.mark.parametrize("host_budget", [None, "50%"])
def test_an_altered_byte_is_caught_before_a_token_comes_out(
    served: Served, pack_dir: Path, expected: tuple[Tensor, Tensor], policy: Policy, host_budget: str | None
) -> None:
    """In every expert of the decoder's last block, so that the whole first step is computed before it is noticed."""
    offsets = read_index(pack_dir).offsets
    damaged = [offset for key, offset in offsets.items() if (key.stack, key.block) == ("decoder", 2)]
    tokens: list[Tensor] = []
    options = {**request(1), "streamer": Streamer(tokens.append)}
    with OffloadEngine.open(served.directory, pack_dir=pack_dir, policy=policy, host_budget=host_budget) as engine:
        with (pack_dir / "slabs.bin").open("r+b") as file:
            flip(file, damaged)
            for _ in range(2):
                with pytest.raises(
                    DamagedPackError, match=r"other bytes than were packed for decoder block 2 expert \d"
                ):
                    engine.generate(**options)
            assert [token.tolist() for token in tokens] == [[[0]], [[0]]]  # the prompt of the decoder, nothing after it
            flip(file, damaged)
        assert_serves(engine, expected)


def flip(file: Any, offsets: list[int]) -> None:
    for offset in offsets:
        file.seek(offset + 4000)
        [byte] = file.read(1)
        file.seek(offset + 4000)
        file.write(bytes([byte ^ 1]))
    file.flush()
    os.fsync(file.fileno())


def test_an_altered_byte_is_caught_when_everything_is_loaded_at_once(served: Served, pack_dir: Path) -> None:
    with (pack_dir / "slabs.bin").open("r+b") as file:
        flip(file, [0])
    with pytest.raises(DamagedPackError, match="encoder block 0 expert 0: remove"):
        OffloadEngine.open(served.directory, pack_dir=pack_dir, policy=Policy.gpu_only)
    disk = DiskStore(pack_dir)
    with pytest.raises(DamagedPackError) as caught:
        disk.verify()
    assert str(pack_dir) in one_sentence(caught.value)
    disk.close()


def swap_offsets(index: dict[str, Any]) -> None:
    one, other = index["slabs"][:2]
    one["offset"], other["offset"] = other["offset"], one["offset"]


def damages() -> dict[str, Callable[[dict[str, Any]], Any]]:
    return {
        "offsets": swap_offsets,
        "an offset that is no number": lambda index: index["slabs"][3].update(offset="here"),
        "an expert that does not exist": lambda index: index["slabs"][3].update(expert=99),
        "an expert twice": lambda index: index["slabs"].append(index["slabs"][3]),
        "no slabs": lambda index: index["slabs"].clear(),
        "another layout": lambda index: index["matrices"][0].update(offset=64),
        "no size": lambda index: index.update(slab_bytes=None),
        "an expert of other weights": lambda index: index["slabs"][3].update(source_xxh3_64=1),
        "an expert of no weights": lambda index: index["slabs"][3].pop("source_xxh3_64"),
        "weights that are no number": lambda index: index["slabs"][3].update(source_xxh3_64="here"),
        "another format": lambda index: index.update(format=1),
    }


@pytest.mark.parametrize("damage", damages())
def test_an_altered_index_is_packed_anew(
    served: Served, pack_dir: Path, expected: tuple[Tensor, Tensor], damage: str
) -> None:
    sound = json.loads((pack_dir / "index.json").read_text())
    index = copy.deepcopy(sound)
    damages()[damage](index)
    assert index != sound
    (pack_dir / "index.json").write_text(json.dumps(index))
    with OffloadEngine.open(served.directory, pack_dir=pack_dir) as engine:
        assert_serves(engine, expected)
    assert json.loads((pack_dir / "index.json").read_text()) == sound


def test_an_altered_checksum_is_told_and_packing_again_helps(
    served: Served, pack_dir: Path, expected: tuple[Tensor, Tensor]
) -> None:
    index = json.loads((pack_dir / "index.json").read_text())
    for slab in index["slabs"]:
        slab["xxh3_64"] ^= 1
    (pack_dir / "index.json").write_text(json.dumps(index))
    with (
        OffloadEngine.open(served.directory, pack_dir=pack_dir) as engine,
        pytest.raises(DamagedPackError, match=f"remove {pack_dir}, and the experts are packed again"),
    ):
        serve(engine)
    shutil.rmtree(pack_dir)
    with OffloadEngine.open(served.directory, pack_dir=pack_dir) as engine:
        assert_serves(engine, expected)


def failing_reads(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Of all reads from now on, `number` fails with EIO; returns the list of those made."""
    preadv, completed, made = os.preadv, Ring.completed, []

    def fails() -> bool:
        made.append(1)
        return len(made) == number

    def read(*arguments: Any) -> int:
        if fails():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    def completions(ring: Ring) -> list[tuple[int, int]]:
        return [(what, -errno.EIO if fails() else result) for what, result in completed(ring)]

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(Ring, "completed", completions)
    return made


@pytest.mark.parametrize("policy", OFFLOADED)
@pytest.mark.parametrize("host_budget", [None, str(2 * SLAB)])
@pytest.mark.parametrize("number", [1, 9])
@pytest.mark.parametrize("io_uring", ROADS)
def test_a_read_error_in_the_middle(
    served: Served,
    expected: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    policy: Policy,
    host_budget: str | None,
    number: int,
    io_uring: bool,
) -> None:
    with OffloadEngine.open(
        served.directory,
        policy=policy,
        tier=Tier.disk,
        device_budget="50%",
        host_budget=host_budget,
        cache=CacheRule.lru,
        io_threads=3,
        io_uring=io_uring,
    ) as engine:
        made = failing_reads(monkeypatch, number)
        with pytest.raises(SlabReadError) as caught:
            serve(engine)
        assert len(made) >= number
        assert not isinstance(caught.value, DamagedPackError)
        told = one_sentence(caught.value)
        for part in (str(served.directory / "experts" / "slabs.bin"), "coder block", "expert", "check the disk"):
            assert part in told, told
        assert_serves(engine, expected)


@pytest.mark.parametrize("io_uring", ROADS)
def test_a_read_error_while_everything_is_loaded(
    served: Served, monkeypatch: pytest.MonkeyPatch, io_uring: bool
) -> None:
    shared = open_store(served.directory)
    failing_reads(monkeypatch, 17)
    with pytest.raises(SlabReadError, match=r"slabs\.bin cannot be read at .* check the disk"):
        OffloadEngine.open(served.directory, policy=Policy.gpu_only, store=shared, io_uring=io_uring)
    shared.close()


@pytest.mark.parametrize("io_uring", ROADS)
def test_reads_may_come_in_pieces_and_out_of_the_blue(
    served: Served, expected: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, io_uring: bool
) -> None:
    """A read may return less than was asked for; the rest is read, not made up."""
    preadv, read = os.preadv, Ring.read
    asked: list[int] = []

    def short(file: int, buffers: list[Any], offset: int) -> int:
        asked.append(len(buffers[0]))
        return preadv(file, [buffers[0][:PAGE]], offset)

    def short_read(ring: Ring, number: int, file: int, offset: int, address: int, length: int, piece: int) -> None:
        asked.append(length)
        read(ring, number, file, offset, address, min(length, PAGE), piece)

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(Ring, "read", short_read)
    with OffloadEngine.open(served.directory, cache=CacheRule.lru, io_uring=io_uring) as engine:
        assert_serves(engine, expected)
        # a slab has two pages: both are asked for, and then the second
        assert asked.count(PAGE) >= asked.count(SLAB) >= engine.counters.misses > 0


def test_a_pack_removed_while_it_is_open(tmp_path: Path, served: Served, expected: tuple[Tensor, Tensor]) -> None:
    """The open file outlives its name; opened again, the experts are packed again, if the checkpoint is still there."""
    shutil.copytree(served.directory, tmp_path / "copy", ignore=shutil.ignore_patterns("experts"))
    with OffloadEngine.open(tmp_path / "copy", tier=Tier.disk) as engine:
        shutil.rmtree(tmp_path / "copy" / "experts")
        assert_serves(engine, expected)
    with OffloadEngine.open(tmp_path / "copy", tier=Tier.disk) as engine:
        assert (tmp_path / "copy" / "experts" / "slabs.bin").is_file()
        shutil.rmtree(tmp_path / "copy")
        assert_serves(engine, expected)
    with pytest.raises(UsageError, match="copy"):
        OffloadEngine.open(tmp_path / "copy", tier=Tier.disk)


@pytest.mark.parametrize("io_uring", ROADS)
def test_a_disk_that_goes_away_and_comes_back(
    served: Served, pack_dir: Path, expected: tuple[Tensor, Tensor], io_uring: bool
) -> None:
    """As when a network disk is unmounted: every read fails for a while."""
    completed = Ring.completed
    with OffloadEngine.open(served.directory, pack_dir=pack_dir, io_uring=io_uring) as engine:
        assert_serves(engine, expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", gone)
            patch.setattr(Ring, "completed", lambda ring: [(what, -errno.ESTALE) for what, _ in completed(ring)])
            for _ in range(3):
                with pytest.raises(SlabReadError, match="Stale file handle"):
                    serve(engine)
        assert_serves(engine, expected)


def gone(*_: Any) -> int:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize("refused", ["open", "read"])
def test_without_direct_reads_the_page_cache_serves(
    served: Served, expected: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    opened, preadv = os.open, os.preadv
    direct: set[int] = set()

    def open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        file = opened(path, flags, *rest, **named)
        if flags & os.O_DIRECT:
            direct.add(file)
        else:
            direct.discard(file)
        return file

    def read(file: int, *rest: Any) -> int:
        if file in direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return preadv(file, *rest)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read)
    with pytest.warns(UserWarning, match=r"slabs\.bin: no O_DIRECT .* through the page cache"):
        disk = open_store(served.directory, tier=Tier.disk)
    assert isinstance(disk, DiskStore)
    assert not disk.direct
    with OffloadEngine.open(served.directory, store=disk) as engine:
        assert_serves(engine, expected)
    disk.close()


def test_direct_reads_are_used_where_they_can_be(served: Served) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk = open_store(served.directory, tier=Tier.disk)
    assert isinstance(disk, DiskStore)
    assert disk.direct
    disk.close()


def test_a_disk_that_fills_up_while_packing(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot be written to .* \(No space left on device\): set engine\.pack_dir"):
        OffloadEngine.open(served.directory, tier=Tier.disk, pack_dir=tmp_path / "experts")
    assert list(tmp_path.iterdir()) == []


def test_a_store_closed_too_early(served: Served) -> None:
    disk = open_store(served.directory, tier=Tier.disk)
    with OffloadEngine.open(served.directory, store=disk) as engine:
        disk.close()
        with pytest.raises(SlabReadError, match=r"was closed before .* was read: open it again"):
            serve(engine)


def test_stores_name_what_they_could_not_read(pack_dir: Path) -> None:
    disk = DiskStore(pack_dir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.os, "preadv", gone)
        with pytest.raises(OSError) as caught:
            disk.read_into(ExpertKey("decoder", 1, 4), store.aligned_bytes(SLAB))
    assert "decoder block 1 expert 4" in one_sentence(caught.value)
    disk.close()
