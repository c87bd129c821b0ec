"""Device-driven rows of a benchmark: measured like the others, with what cannot be measured absent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate import bench as command
from pregate.cli import compose_run
from pregate.config import UsageError
from pregate.engine.device.fetching import Resident
from pregate.measure.bench import transfer_speed
from pregate.measure.bench.engines import computing_row
from pregate.measure.bench.grid import RowSpec, grid
from pregate.measure.bench.models import bench_models
from pregate.measure.bench.references import resident_of
from pregate.measure.bench.table import bench_tables
from tests.measure.bench.test_bench_run import MOE_BLOCKS, check_floor, rows_of, tiny_run
from tests.tiny import pregated_model


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(transfer_speed, "PROBE_SECONDS", 0.01)
    yield


def test_device_driven_rows_stand_beside_the_hosts(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path,
        "bench.tiers=[dram]",
        "bench.drives=[host,device]",
        "bench.caches=[none,lru]",
        "bench.budgets=['40%']",
        "bench.slab_dtypes=[source,int8]",
        "bench.batches=[2]",
        dtype="bf16",
    )
    command.main(run)
    rows = rows_of(tmp_path)
    host = {key_of(row): row for row in rows if row.get("drive") == "host"}
    device = {key_of(row): row for row in rows if row.get("drive") == "device"}
    assert host.keys() == device.keys() and len(device) == 2 * 6
    for key, row in device.items():
        beside = host[key]
        assert row["tokens_equal_resident"] is True, row
        assert row["step_logits_rel_diff"] < 1e-5 and "step_logits_rel_diff" not in beside
        assert not {"exposed_ms_per_token", "block_ms", "predicted", "io_threads"} & set(row), row
        assert row["tpot_ms_min"] <= row["tpot_ms"] <= row["tpot_ms_max"]
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["tpot_ms"])
        assert row["slots"] == beside["slots"] and row["slab_bytes"] == beside["slab_bytes"]
        assert row["expected_bytes"] == sum(row["expected_bytes_parts"].values()) > beside["expected_bytes"]
        gpu_only = device["gpu_only", None, row["slab_dtype"]]
        if row["policy"] == "gpu_only":
            assert row["link_bytes_per_step"] == row["misses"] == 0
        else:
            assert row["compute_ms"] == gpu_only["tpot_ms"]
            check_floor(row)
        if row.get("cache") == "none" and row["policy"] != "prefetch_all":
            # no cache, the same routes: the same slabs in every step
            assert row["link_bytes_per_step"] == beside["link_bytes_per_step"], row
            assert 1 <= row["active_experts"] <= 2
        if row["policy"] == "prefetch_all":
            assert row["link_bytes_per_step"] == MOE_BLOCKS * 5 * row["slab_bytes"]
            assert "active_experts" not in row
        if row["slab_dtype"] == "int8":
            assert 0 < row["logits_rel_diff"] < 0.2
    (table,) = bench_tables(rows)
    assert "drive" in table.headers
    assert {row[table.headers.index("drive")] for row in table.rows} == {"host", "device", "–"}
    speeds = [row[table.headers.index("× on_demand")] for row in table.rows if "on_demand" in row[0]]
    assert len(speeds) == 8 and "–" not in speeds
    assert not [path for path in (tmp_path / "traces").iterdir() if "device-driven" in path.name]


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["policy"], row.get("cache"), row["slab_dtype"]


def test_forced_experts_reach_the_static_step(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path,
        "bench.tiers=[dram]",
        "bench.drives=[device]",
        "bench.batches=[4]",
        "bench.active_experts=[1,4]",
        "engine.policies=[on_demand]",
    )
    command.main(run)
    one, four = rows_of(tmp_path)[2:]
    assert one["link_bytes_per_step"] == MOE_BLOCKS * one["slab_bytes"]
    assert four["link_bytes_per_step"] == 4 * MOE_BLOCKS * four["slab_bytes"]
    assert one["tokens_equal_resident"] is four["tokens_equal_resident"] is True


def test_steps_that_go_wrong_show_in_their_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of one block give nothing: the tokens may still agree for a while, the logits do not."""
    whole = Resident.run

    def half(self: Resident, block: int, *rest: Any) -> torch.Tensor:
        return whole(self, block, *rest) * (block != 1)

    monkeypatch.setattr(Resident, "run", half)
    command.main(tiny_run(tmp_path, "bench.tiers=[dram]", "bench.drives=[device]", "engine.policies=[gpu_only]"))
    assert rows_of(tmp_path)[-1]["step_logits_rel_diff"] > 1e-3


def test_a_checkpoints_own_generation_settings_are_followed(tmp_path: Path) -> None:
    """Beams are asked for by the directory and unasked by the benchmark."""
    model = pregated_model(0, 1)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path / "model")
    overrides = ["bench.tiers=[dram]", "bench.drives=[device]", "engine.policies=[pre_gated]", "bench.baselines=[]"]
    command.main(tiny_run(tmp_path / "out", f"checkpoint={tmp_path / 'model'}", *overrides))
    assert [row["drive"] for row in rows_of(tmp_path / "out")] == ["device"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["bench.tiers=[disk]"], "bench.drives has device, which needs experts in host memory"),
        (["bench.tiers=[dram]", "bench.batches=[40]"], "at most 32 rows"),
        (["bench.tiers=[dram]", "bench.caches=[lfu]", "engine.policies=[on_demand]"], "a cache of none or lru"),
        (["bench.tiers=[dram]", "bench.budgets=['10%']", "bench.batches=[4]"], "a step of .* can need"),
    ],
)
def test_what_cannot_be_driven_by_the_device_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        command.main(tiny_run(tmp_path, "bench.drives=[device]", "bench.slow_new_tokens=2", *overrides))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "bench.jsonl").exists()


def test_of_mixed_settings_the_device_drives_what_it_can(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path,
        "bench.tiers=[dram,disk]",
        "bench.drives=[host,device]",
        "bench.caches=[none,lru,lfu]",
        "bench.batches=[1,40]",
        "engine.policies=[pre_gated]",
        "bench.baselines=[]",
    )
    (model,) = bench_models(run)
    rows = grid(run, model, torch.device("cpu"))
    found = [(row.tier, row.cache, row.batch) for row in rows if row.drive == "device"]
    assert found == [("dram", "none", 1), ("dram", "lru", 1)]
    assert len([row for row in rows if row.drive == "host"]) == 12
    assert len({row.slug() for row in rows}) == len(rows)


def test_an_empty_list_of_drives_is_refused() -> None:
    with pytest.raises(UsageError, match=r"bench\.drives is empty"):
        compose_run(["bench.drives=[]"])


def test_compute_time_is_that_of_the_same_drive() -> None:
    spec = RowSpec(
        "m", "bfloat16", 1, "own", "pre_gated", 1, 7, 5, 0, None, "dram", "int8", "lru", "40%", None, "device"
    )
    asked_for = computing_row(spec, 9)
    found = (asked_for.policy, asked_for.cache, asked_for.budget, asked_for.drive, asked_for.new_tokens)
    assert found == ("gpu_only", None, None, "device", 9)
    assert computing_row(replace(spec, drive="host"), 9) == resident_of(spec, 9)
