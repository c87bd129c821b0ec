"""The whole command over tiny models: its rows, its files, going on after an interruption, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate import bench as command
from pregate.cli import compose_run
from pregate.config import ModelConfig, Run, UsageError
from pregate.measure.bench import baseline_rows as bench_whole
from pregate.measure.bench import engines, transfer_speed
from pregate.measure.bench import run as bench
from pregate.measure.bench.grid import ACCELERATE, ACCELERATE_WARM, RESIDENT, RowSpec, grid
from pregate.measure.bench.models import bench_models
from pregate.system.directory_lock import hold
from tests.tiny import GEOMETRY, pregated_model

MOE_BLOCKS = 3
QUICK = ("tracking=jsonl", "engine.device=cpu", "bench.prompt_len=7", "bench.new_tokens=5", "bench.slow_new_tokens=3")


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_speed, "PROBE_SECONDS", 0.01)


def tiny_run(run_dir: Path, *overrides: str, dtype: str = "fp32") -> Run:
    arguments = [*QUICK, f"bench.dtype={dtype}", "bench.repeats=2", *overrides]
    run = compose_run(["name=study", f"run_dir={run_dir}", *arguments])
    return run if run.checkpoint else replace(run, model=ModelConfig("tiny", geometry=dict(GEOMETRY)))


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "bench.jsonl").read_text().splitlines()]


def engine_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "drive" in row]


def test_every_row_of_the_disk_tier_is_measured_compared_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(
        tmp_path,
        "pregate=embedding_entry",
        "bench.caches=[none,lru]",
        "bench.budgets=['30%']",
        "bench.slab_dtypes=[source,int8]",
        "bench.batches=[2]",
        "bench.baselines=[resident,accelerate]",
        dtype="bf16",
    )
    command.main(run)
    rows = rows_of(tmp_path)
    assert [row["policy"] for row in rows] == [RESIDENT, ACCELERATE, ACCELERATE_WARM] + 2 * [
        "gpu_only",
        *2 * ["on_demand"],
        "prefetch_all",
        *2 * ["pre_gated"],
    ]
    for row in rows[1:]:
        assert row["tokens_equal_resident"] is True, row
    for row in engine_rows(rows):
        check_engine_row(row, rows[0])
    cold, warm = rows[1:3]
    assert "page_cache_share" not in cold or cold["page_cache_share"] <= warm["page_cache_share"] == 1
    assert {row["new_tokens"] for row in rows if row["policy"] in (ACCELERATE, ACCELERATE_WARM, "prefetch_all")} == {3}
    shown = (tmp_path / "bench.md").read_text()
    assert "Tokens equal the whole model's in 14 of 14 rows compared." in shown
    assert str(tmp_path) not in shown
    assert {path.name for path in tmp_path.iterdir()} == {
        *("bench.jsonl", "bench.md", "config.yaml", "metrics.jsonl", "plots", "traces")
    }
    assert len(list((tmp_path / "plots").glob("*.png"))) == 4
    assert len(list((tmp_path / "traces").iterdir())) == 12
    trace = json.loads((tmp_path / "traces" / "tiny_disk_pre_gated_30_batch_2_bfloat16.json").read_text())
    assert {event["cat"] for event in trace["traceEvents"] if event["ph"] == "X"} >= {"layer", "compute", "transfer"}
    assert "bench/tiny_disk_on_demand_30%_batch_2_bfloat16/tpot_ms" in (tmp_path / "metrics.jsonl").read_text()
    printed = capsys.readouterr()
    assert "15 of 15: tiny disk int8 pre_gated lru 30% batch 2: " in printed.err
    assert f"Tables: {tmp_path / 'bench.md'}" in printed.out


def check_engine_row(row: dict[str, Any], resident: dict[str, Any]) -> None:
    is_int8 = row["slab_dtype"] == "int8"
    # two matrices of 560 numbers: 2 bytes each, or one and a float32 scale for each of 48 rows
    assert row["slab_bytes"] == 4096
    assert row["compute_ms"] == resident["tpot_ms"]
    check_floor(row)
    assert row["tokens_per_s"] == pytest.approx(2e3 / row["tpot_ms"])
    assert row["tpot_ms_min"] <= row["tpot_ms"] <= row["tpot_ms_max"]
    assert row["bytes_moved"] == row["misses"] * 4096
    assert row["expected_bytes"] == sum(row["expected_bytes_parts"].values())
    assert row["slots"] == {"gpu_only": 30, "prefetch_all": 9}.get(row["policy"], 9)
    assert ("link_gb_per_s" in row) == (row["policy"] != "gpu_only")
    assert ("logits_max_abs_diff" in row) == ("logits_rel_diff" in row) == is_int8
    if is_int8:
        assert 0 < row["logits_rel_diff"] < 0.2
    if row["policy"] == "on_demand" and row["cache"] == "none":
        # two tokens a step choose one or two experts in each block
        assert MOE_BLOCKS * 4096 <= row["link_bytes_per_step"] <= 2 * MOE_BLOCKS * 4096
        assert 1 <= row["active_experts"] <= 2
    if row["policy"] == "prefetch_all":
        assert row["link_bytes_per_step"] == MOE_BLOCKS * 5 * 4096
    assert row["predicted_over_measured"] == pytest.approx(row["predicted"]["tokens_per_s"] / row["tokens_per_s"])
    assert row["predicted"]["slots"] == row["slots"]
    if row["policy"] == "gpu_only":
        assert row["link_ms"] == 0 and row["floor_ms"] == row["compute_ms"]


def check_floor(row: dict[str, Any]) -> None:
    """What holds however the machine's speed changes between the two requests, of each of which a floor is the median;
    `test_probes` has the numbers."""
    least, most = 1 - 1e-9, 1 + 1e-9
    assert max(row["link_ms"], row["compute_ms"]) <= row["floor_ms"] * most
    assert row["floor_ms"] * least <= row["serial_ms"] <= 2 * row["floor_ms"] * most
    assert row["serial_ms"] == pytest.approx(row["link_ms"] + row["compute_ms"]), "of two, the median is the mean"
    assert row["roofline_tokens_per_s"] == pytest.approx(row["batch"] * 1e3 / row["floor_ms"])
    assert row["over_floor_min"] <= row["over_floor"] <= row["over_floor_max"]
    # each request's floor is at least the computation's, of all requests or between two probes
    assert row["over_floor_max"] <= row["tpot_ms_max"] / min(row.get("compute_ms_probes", [row["compute_ms"]])) * most
    assert row["over_floor"] == pytest.approx((row["over_floor_min"] + row["over_floor_max"]) / 2)


def test_forced_experts_in_host_memory_move_exactly_so_many_slabs(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, "bench.tiers=[dram]", "bench.batches=[4]", "bench.active_experts=[1,4]", "engine.policies=[on_demand]"
    )
    command.main(run)
    rows = rows_of(tmp_path)
    assert [(row["policy"], row["forced_experts"]) for row in rows] == [
        *((RESIDENT, 1), (RESIDENT, 4)),
        *(("on_demand", 1), ("on_demand", 4)),
    ]
    for row in rows[2:]:
        assert row["tokens_equal_resident"] is True
        assert row["active_experts"] == row["forced_experts"]
        assert row["link_bytes_per_step"] == row["forced_experts"] * MOE_BLOCKS * row["slab_bytes"]
        slowest, fastest = min(row["link_gb_per_s_probes"]), max(row["link_gb_per_s_probes"])
        assert slowest <= row["link_gb_per_s"] <= fastest
        assert 0 < row["over_floor_min"] <= row["over_floor"] <= row["over_floor_max"]
        assert "peak_bytes_packing" not in row


def test_a_resumed_run_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = "engine.policies=[on_demand,pre_gated]"
    measured = engines.measure_row
    calls: list[str] = []

    def interrupted(spec: RowSpec, *args: Any) -> Any:
        calls.append(spec.policy)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measured(spec, *args)

    monkeypatch.setattr(engines, "measure_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(tiny_run(tmp_path, policies))
    first = rows_of(tmp_path)
    assert [row["policy"] for row in first] == [RESIDENT, "on_demand"]
    assert "on_demand" in (tmp_path / "bench.md").read_text(), "what was measured is shown"
    with (tmp_path / "bench.jsonl").open("a") as file:
        file.write('{"model": "tiny", "pol')  # torn

    with pytest.raises(UsageError, match=r"holds 2 rows: go on with resume=true, or choose another run_dir"):
        command.main(tiny_run(tmp_path, policies))
    built = []
    monkeypatch.setattr(bench_whole, "resident_model", lambda *args: built.append(args))
    command.main(tiny_run(tmp_path, policies, "resume=true"))
    assert calls == ["on_demand", "pre_gated", "pre_gated"]
    assert not built, "what the whole model decodes was kept"
    rows = rows_of(tmp_path)
    assert rows[:2] == first
    assert rows[2]["policy"] == "pre_gated" and rows[2]["tokens_equal_resident"] is True
    probes = rows[2]["compute_ms_probes"]
    assert len(probes) == rows[2]["repeats"] + 1 == len(rows[2]["link_gb_per_s_probes"])
    assert min(probes) <= rows[2]["compute_ms"] <= max(probes)
    assert rows[0]["command"] + " resume=true" == rows[2]["command"]
    with pytest.raises(UsageError, match="were measured with other weights or another geometry"):
        other = tiny_run(tmp_path, policies, "resume=true")
        other.model.geometry = {**other.model.geometry, "d_ff": 32}
        command.main(other)
    shown = (tmp_path / "bench.md").read_text()
    assert f"```\n{rows[0]['command']}\n{rows[2]['command']}\n```" in shown, "both commands made the table"


def test_a_checkpoint_is_served_in_the_dtype_asked_for(tmp_path: Path) -> None:
    pregated_model(3, 1).save_pretrained(tmp_path / "mine" / "checkpoint")
    run = tiny_run(
        tmp_path / "out",
        f"checkpoint={tmp_path / 'mine' / 'checkpoint'}",
        f"engine.pack_dir={tmp_path / 'packs'}",
        "engine.policies=[pre_gated]",
        "bench.slab_dtypes=[fp8]",
        "bench.baselines=[resident,accelerate]",
        "bench.repeats=1",
        dtype="bf16",
    )
    command.main(run)
    rows = rows_of(tmp_path / "out")
    assert {(row["model"], row["dtype"]) for row in rows} == {("mine", "bfloat16")}
    assert [row["tokens_equal_resident"] for row in rows[1:]] == [True, True, True]
    assert [path.name for path in (tmp_path / "packs").iterdir()] == ["mine-bfloat16-fp8"], "the pack is kept"


def test_what_does_not_fit_is_left_out_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "free_memory", lambda device: 0)
    monkeypatch.setattr(bench_whole, "free_memory", lambda device: 0)
    command.main(tiny_run(tmp_path, "engine.policies=[gpu_only,on_demand]", "bench.tiers=[disk,dram]"))
    rows = rows_of(tmp_path)
    assert [row["policy"] for row in rows] == ["on_demand"]
    assert "tokens_equal_resident" not in rows[0]
    said = capsys.readouterr().err
    assert "no resident row, and tokens are not compared with it" in said
    assert "tiny disk gpu_only batch 1 is left out: it needs 270 kB, 0 B are free." in said
    assert "tier dram is left out" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["bench.models=[switch_base_9]"], "'switch_base_9', but there is no such model: choose from deepseek_v2_lite"),
        (["bench.models=[switch_base_8@fp16]"], "write one of fp32, bf16 behind the @"),
        (["bench.models=[nano_switch,nano_switch]"], "names nano-switch-float32 twice"),
        (["bench.budgets=['1kB']"], "less than one expert of"),
        (["bench.batches=[9]", "bench.active_experts=[6]"], "a block of tiny uses 1 to 5 of its 5 experts"),
        (["bench.batches=[3]", "bench.active_experts=[4]"], "at batch 3 a block of tiny uses 1 to 3 of its 5 experts"),
        (["bench.num_blocks=4"], "but tiny has 3 MoE blocks in a stack: lower it"),
        (["engine.host_budget=1kB"], "engine.host_budget=1kB is 1.00 kB, less than one expert"),
        (["checkpoint=no/such"], "no directory 'no/such'"),
        (["bench.models=[switch_base_256,switch_large_128]", "bench.tiers=[disk]"], "set engine.pack_dir to a larger"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    tmp_path: Path, overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10**9}))
    with pytest.raises(UsageError) as refused:
        command.main(tiny_run(tmp_path / "new", *overrides))
    assert said in str(refused.value), str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_the_directory_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    """What it writes to `scratch/` is removed at its end, and a user's directory may have one too."""
    thesis = tmp_path / "scratch" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("all")
    with pytest.raises(UsageError, match="holds a scratch that is no benchmark's: choose name=NAME or run_dir=DIR"):
        command.main(tiny_run(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"] and thesis.read_text() == "all"


@pytest.mark.parametrize("name", ["plan.md", "plan-scratch", "slurm-1.out"])
def test_a_benchmark_follows_its_plan_in_the_same_directory(name: str, tmp_path: Path) -> None:
    """Or a job scheduler that has opened its log there."""
    (tmp_path / name).mkdir()
    assert bench.Benchmark.checked(tiny_run(tmp_path)).measured == []


def test_a_benchmark_that_is_stopped_before_its_first_row_is_resumed(tmp_path: Path, monkeypatch: Any) -> None:
    def stopped(*_: Any) -> None:
        (tmp_path / "traces").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        command.main(tiny_run(tmp_path))
    hold(tmp_path, "run_dir")  # which it has let go
    assert bench.Benchmark.checked(tiny_run(tmp_path, "resume=true")).measured == []


def test_the_grid_holds_each_sensible_combination_once() -> None:
    run = compose_run(
        [
            "model=nano_switch",
            "bench.tiers=[auto,disk]",
            "bench.caches=[none,lru,lfu]",
            "bench.budgets=[10%,50%]",
            "bench.baselines=[resident,accelerate]",
            "bench.batches=[1,8]",
        ]
    )
    [model] = bench_models(run)
    rows = grid(run, model, torch.device("cpu"))
    assert len(rows) == len(set(rows))
    per_batch = [row for row in rows if row.batch == 8]
    counts = {policy: sum(row.policy == policy for row in per_batch) for policy in {row.policy for row in rows}}
    assert counts == {
        RESIDENT: 1,
        ACCELERATE: 1,
        ACCELERATE_WARM: 1,
        "gpu_only": 1,
        "prefetch_all": 2,
        "on_demand": 6,
        "pre_gated": 6,
    }
    assert all(row.tier == "disk" for row in rows if row.policy != RESIDENT), "the disk is a CPU's tier, once"
    on_gpu = grid(run, model, torch.device("cuda"))
    offloads = {(row.policy, row.tier) for row in on_gpu if row.policy.startswith("accelerate")}
    assert offloads == {(ACCELERATE, "dram"), (ACCELERATE, "disk"), (ACCELERATE_WARM, "disk")}


def test_a_row_knows_itself_again() -> None:
    spec = RowSpec("m", "float32", 1, "own", "on_demand", 1, 8, 4, 0, tier="disk", cache="lru", budget="25%")
    row = {**spec.to_dict(), "tpot_ms": 3.0, "slots": 4}
    assert RowSpec.of(row) == spec
    assert RowSpec.of({**row, "budget": "50%"}) != spec
    assert "forced_experts" not in row, "what does not apply is absent"


def test_rows_of_other_gates_are_other_rows() -> None:
    """Else a resumed run would take the rows of linear gates for those that it was asked for."""
    given = ["bench.models=[nano_switch]", "pregate.lookahead=1", "engine.policies=[pre_gated]"]
    found = set()
    for other, said in (
        ([], None),
        (["pregate.weights=late"], "weights late"),
        (["pregate.gate=mlp", "pregate.gate_width=16"], "gate mlp of width 16"),
        (["pregate.start=1"], "start 1"),
        (["pregate.stacks=[decoder]"], "decoder alone"),
    ):
        run = compose_run([*given, *other])
        [model] = bench_models(run)
        rows = grid(run, model, torch.device("cpu"))
        assert {row.gates for row in rows} == {said}
        assert all((said or "own") in (row.sentence() if said else row.entry) for row in rows)
        found.add(rows[-1])
    assert len(found) == 5


def test_each_model_may_have_a_dtype_of_its_own() -> None:
    models = bench_models(compose_run(["bench.models=[nano_switch,nano_switch@bf16]", "bench.dtype=fp32"]))
    assert [model.label for model in models] == ["nano-switch-float32", "nano-switch-bfloat16"]
    assert models[1].num_bytes() * 2 == models[0].num_bytes()


def test_a_host_cache_counts_only_what_still_comes_from_the_disk(tmp_path: Path) -> None:
    command.main(tiny_run(tmp_path, "engine.policies=[on_demand]", "engine.host_budget=50%", "bench.baselines=[]"))
    [row] = rows_of(tmp_path)
    assert row["host_budget"] == "50%" and row["host_hits"] > 0
    assert row["bytes_read"] < row["bytes_moved"]
    assert row["link_bytes_per_step"] * 4 < row["bytes_moved"] - row["host_hits"] * row["slab_bytes"]
    link_ms = [row["link_bytes_per_step"] / link / 1e6 for link in row["link_gb_per_s_probes"]]
    assert 0.5 * min(link_ms) < row["link_ms"] < 2 * max(link_ms), "of the bytes that were read, not of all"
    check_floor(row)
    assert "tokens_equal_resident" not in row


def test_a_plan_says_what_pays_and_packs_no_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(
        tmp_path, "plan=true", "bench.caches=[none,lru]", "bench.budgets=['30%']", "bench.slab_dtypes=[int8]"
    )
    command.main(run)
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "plan.md"}
    (load,) = json.loads((tmp_path / "plan.json").read_text())["loads"]
    assert [(row["policy"], row.get("cache")) for row in load["rows"]] == [
        ("gpu_only", None),
        ("on_demand", "none"),
        ("on_demand", "lru"),
        ("prefetch_all", "none"),
        ("pre_gated", "none"),
        ("pre_gated", "lru"),
    ]
    speeds = [row["tokens_per_s"] for row in load["rows"]]
    assert speeds[0] == max(speeds) > 0
    assert load["link_gb_per_s"] > 0 and load["durations_ms"]["expert"] > 0
    printed = capsys.readouterr().out
    assert load["verdicts"][0].split()[0] in printed and "Plan: " in printed
    shown = (tmp_path / "plan.md").read_text()
    assert all(said in shown for said in load["verdicts"]) and str(tmp_path) not in shown


def test_traces_of_two_dtypes_are_two_files() -> None:
    spec = RowSpec("tiny", "float32", 1, "own", "pre_gated", 1, 8, 4, 0)
    assert spec.slug() != replace(spec, dtype="bfloat16").slug()
