"""Bandwidth as an engine reads, the page cache, and the gates that a study of active experts turns aside."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pregate.engine.engine import OffloadEngine
from pregate.measure.bench import transfer_speed
from pregate.measure.bench.active_experts import counted_experts, forced_experts
from pregate.measure.bench.page_cache import cached_share, drop_page_cache, fill_page_cache
from pregate.measure.bench.transfer_speed import Ground, Reading
from pregate.models.experts import ExpertKey
from pregate.models.loading import load_resident
from tests.tiny import batch, pregated_model

KEYS = [ExpertKey("decoder", 0, expert) for expert in range(4)]


SLAB = 1 << 20


class CountingStore:
    """Gives a slab of 1 MB in one part, once as many are being read together as can be; notes the most."""

    in_host_memory = False
    layout = SimpleNamespace(slab_bytes=SLAB)

    def __init__(self, most: int) -> None:
        self.seen: set[ExpertKey] = set()
        self._full, self._lock = threading.Semaphore(0), threading.Lock()
        self._wanted, self._now, self.most = most, 0, 0

    def read_part(self, key: ExpertKey, slab_B: torch.Tensor, first: int, last: int) -> None:
        assert (first, last) == (0, slab_B.numel()) == (0, SLAB)
        with self._lock:
            self.seen.add(key)
            self._now += 1
            self.most = max(self.most, self._now)
            if self.most == self._wanted:
                self._full.release(self._now)
        assert self.most == self._wanted or self._full.acquire(timeout=60), f"{self.most} reads at once at the most"
        with self._lock:
            self._now -= 1

    def arrived(self, key: ExpertKey, slab_B: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("io_threads", [1, 4])
def test_bandwidth_counts_all_reads_in_flight(monkeypatch: pytest.MonkeyPatch, io_threads: int) -> None:
    """By a clock that moves 1/64 s each time it is looked at. After the first look, 31 slabs until half a second is
    over, which the 33rd look tells."""
    looks = itertools.count()
    monkeypatch.setattr(transfer_speed, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 64))
    monkeypatch.setattr(transfer_speed, "PROBE_SECONDS", 0.5)
    store: Any = CountingStore(io_threads)
    ground = Ground(store, torch.device("cpu"), Reading(io_threads))
    assert ground.gb_per_s(KEYS) == 31 * SLAB / (33 / 64) / 1e9
    assert store.most == io_threads, "so many slabs were read at the same time"
    assert store.seen == set(KEYS)


def test_the_page_cache_forgets_and_remembers_files(tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to("weights")
    with (tmp_path / "weights").open("wb") as file:
        file.write(os.urandom(50 << 20))
        file.flush()
        os.fsync(file.fileno())
    if cached_share(tmp_path) is None:
        pytest.skip("this system does not say what its page cache holds")
    drop_page_cache(tmp_path)
    if cached_share(tmp_path) == 1:
        pytest.skip("this file system lives in memory")
    assert cached_share(tmp_path) == 0
    fill_page_cache(tmp_path)
    assert cached_share(tmp_path) == 1


def test_an_empty_folder_has_no_share_in_the_page_cache(tmp_path: Path) -> None:
    assert cached_share(tmp_path) is None


@pytest.mark.parametrize("entry", ["own", "embedding"])
def test_forced_routes_are_the_same_in_an_engine_and_in_the_whole_model(tmp_path: Path, entry: str) -> None:
    pregated_model(1, 1, entry=entry).save_pretrained(tmp_path)
    inputs = batch(0, size=4, padded=False)
    request = {k: inputs[k] for k in ("input_ids", "attention_mask")} | {"max_new_tokens": 5, "min_new_tokens": 5}
    whole = load_resident(tmp_path)
    free = whole.generate(**request)
    with counted_experts(whole) as counts:
        whole.generate(**request)
    assert len(counts) == 3 * 5 and max(counts) <= 4, "three decoder blocks, five steps"
    with forced_experts(whole, 3), counted_experts(whole) as counts:
        forced = whole.generate(**request)
    assert set(counts) == {3}
    assert not torch.equal(forced, free)
    assert torch.equal(whole.generate(**request), free), "the gates decide again"
    with OffloadEngine.open(tmp_path) as engine, forced_experts(engine.model, 3):
        assert torch.equal(engine.generate(**request), forced)
    with forced_experts(whole, None):
        assert torch.equal(whole.generate(**request), free)
