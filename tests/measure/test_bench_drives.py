"""Bandwidth as an engine reads, the page cache, and the gates that a study of active experts turns aside."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pregate.engine.decode import OffloadEngine
from pregate.measure import drives
from pregate.measure.active_experts import counted_experts, forced_experts
from pregate.measure.drives import cached_share, drop_page_cache, fill_page_cache, link_bandwidth
from pregate.models.adapter import ExpertKey
from pregate.models.loading import load_resident
from tests.tiny import batch, pregated_model

KEYS = [ExpertKey("decoder", 0, expert) for expert in range(4)]


SLAB = 1 << 20


class SleepyStore:
    """Gives a slab of 1 MB after 10 ms, in one part."""

    in_host_memory = False
    layout = SimpleNamespace(slab_bytes=SLAB)

    def __init__(self) -> None:
        self.seen: set[ExpertKey] = set()

    def read_part(self, key: ExpertKey, slab_B: torch.Tensor, first: int, last: int) -> None:
        assert (first, last) == (0, slab_B.numel()) == (0, SLAB)
        self.seen.add(key)
        time.sleep(0.01)

    def arrived(self, key: ExpertKey, slab_B: torch.Tensor) -> None:
        return None


def test_bandwidth_counts_all_reads_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drives, "PROBE_SECONDS", 0.3)
    store: Any = SleepyStore()
    one = link_bandwidth(store, KEYS, torch.device("cpu"), io_threads=1)
    four = link_bandwidth(store, KEYS, torch.device("cpu"), io_threads=4)
    assert 0.04 < one <= 0.11
    assert 2.5 * one < four <= 0.43
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
