"""Rows and plans of decoder-only models, whose one stack reads the prompt and decodes, with several experts a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate import bench as command
from pregate.cli import compose_run
from pregate.config import UsageError
from pregate.engine.engine import OffloadEngine
from pregate.measure.bench import transfer_speed
from pregate.measure.bench.advice import cpu_advice
from pregate.measure.bench.baseline_models import resident_model
from pregate.measure.bench.models import BenchModel, bench_models
from pregate.measure.bench.simulation import Durations
from pregate.measure.bench.step_times import Profile

TOP_K, BLOCKS = 2, 4
QUICK = (
    *("tracking=jsonl", "engine.device=cpu", "bench.dtype=fp32", "bench.models=[nano_olmoe]"),
    *("bench.prompt_len=7", "bench.new_tokens=5", "bench.slow_new_tokens=3", "bench.repeats=1", "name=study"),
)
PARAMETERS = {
    "olmoe_1b_7b": 6_919_161_856,
    "mixtral_8x7b": 46_702_792_704,
    "qwen3_30b_a3b": 30_532_122_624,
    "deepseek_v2_lite": 15_706_484_224,
    "gpt_oss_20b": 20_914_757_184,
}
"""As published."""


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_speed, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(transfer_speed, "COPY_SECONDS", 0.01)


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "bench.jsonl").read_text().splitlines()]


def nano(*overrides: str) -> BenchModel:
    [model] = bench_models(compose_run([*QUICK, *overrides]))
    return model


def test_every_row_decodes_the_whole_models_tokens_and_moves_the_experts_of_its_steps(tmp_path: Path) -> None:
    settings = ["bench.caches=[none,lru]", "bench.budgets=['50%']", "bench.slab_dtypes=[source,int8]"]
    settings += [
        "engine.policies=[on_demand,pre_gated]",
        "bench.baselines=[resident,accelerate]",
        f"run_dir={tmp_path}",
    ]
    command.main(compose_run([*QUICK, *settings]))
    resident, *rows = rows_of(tmp_path)
    assert resident["policy"] == "resident" and len(rows) == 10
    for row in rows:
        assert row["tokens_equal_resident"] is True and row["logits_finite"] is True, row
        assert row["logits_equal_resident"] is True, row
    for row in (row for row in rows if "drive" in row):
        if row["cache"] == "none":
            assert row["link_bytes_per_step"] == TOP_K * BLOCKS * row["slab_bytes"]
            assert row["predicted"]["bytes_per_step"] == row["link_bytes_per_step"]
        assert row["bytes_moved"] > 0
        assert row["active_experts"] == row["predicted"]["active_experts"] == TOP_K, "not those of the prompt"
        assert row["peak_over_expected"] == row["peak_device_bytes"] / row["expected_bytes"]
        assert 0.05 < row["predicted_over_measured"] < 20


def test_the_experts_of_a_batch_are_the_union_of_its_tokens(tmp_path: Path) -> None:
    settings = ["engine.policies=[on_demand]", "bench.batches=[3]", "bench.active_experts=[4]"]
    command.main(compose_run([*QUICK, *settings, f"run_dir={tmp_path}"]))
    [_, row] = rows_of(tmp_path)
    assert row["tokens_equal_resident"] is True
    assert row["link_bytes_per_step"] == 4 * BLOCKS * row["slab_bytes"]
    assert row["predicted"]["bytes_per_step"] == row["link_bytes_per_step"]
    for number in (1, 7):  # a token alone has two, three tokens have six at most
        with pytest.raises(UsageError, match="at batch 3 a block of nano-olmoe uses 2 to 6 of its 8 experts"):
            command.main(
                compose_run([*QUICK, *settings, f"bench.active_experts=[{number}]", f"run_dir={tmp_path}/{number}"])
            )


def test_few_blocks_and_prompts_in_chunks_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, whole = [], OffloadEngine._in_chunks

    def watched(engine: OffloadEngine, inputs: dict[str, Any]) -> dict[str, Any]:
        found = whole(engine, inputs)
        chunks.append(found.get("prefill_chunk_size"))
        return found

    monkeypatch.setattr(OffloadEngine, "_in_chunks", watched)
    settings = ["engine.policies=[pre_gated]", "bench.num_blocks=2", "engine.prefill_chunk=3", f"run_dir={tmp_path}"]
    command.main(compose_run([*QUICK, *settings]))
    rows = rows_of(tmp_path)
    assert [row["blocks"] for row in rows] == ["2 of 4", "2 of 4"]
    assert [row.get("prefill_chunk") for row in rows] == [None, 3] and chunks.count(3) >= 2
    assert rows[1]["tokens_equal_resident"] is True and "read in chunks of 3" in (tmp_path / "bench.md").read_text()
    assert rows[1]["link_bytes_per_step"] == TOP_K * 2 * rows[1]["slab_bytes"]
    assert "2 of 4 MoE blocks" in (tmp_path / "bench.md").read_text()


def test_a_checkpoint_with_a_tensor_for_each_expert_is_served_like_any_other(tmp_path: Path) -> None:
    whole = resident_model(nano("pregate=conventional"), torch.device("cpu"))
    whole.save_pretrained(tmp_path / "model")
    settings = ["engine.policies=[on_demand]", "bench.baselines=[resident,accelerate]", f"run_dir={tmp_path / 'out'}"]
    command.main(compose_run([*QUICK, "pregate=conventional", f"checkpoint={tmp_path / 'model'}", *settings]))
    rows = rows_of(tmp_path / "out")
    assert [row["policy"] for row in rows] == [
        *("resident", "accelerate", "accelerate, page cache warm", "on_demand"),
    ]
    assert all(row["tokens_equal_resident"] for row in rows[1:]) and rows[3]["bytes_moved"] > 0


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_geometry_has_the_parameters_that_were_published(name: str) -> None:
    [model] = bench_models(compose_run([f"bench.models=[{name}]", "bench.dtype=bf16", "pregate=conventional"]))
    assert model.num_bytes() == 2 * PARAMETERS[name]


def test_a_plan_needs_no_more_than_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "published"
    place.mkdir()
    config = {k: v for k, v in nano().source.config.items() if k != "pregate"}
    published = {**config, "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "torch_dtype": "bfloat16"}
    published.pop("dtype", None)
    (place / "config.json").write_text(json.dumps(published))
    settings = ["plan=true", f"checkpoint={place}", "bench.dtype=auto", "bench.budgets=['50%']", "pregate.lookahead=2"]
    command.main(compose_run([*QUICK, *settings, f"run_dir={tmp_path / 'plan'}"]))
    [load] = json.loads((tmp_path / "plan" / "plan.json").read_text())["loads"]
    assert (load["model"], load["dtype"], load["lookahead"]) == ("published", "bfloat16", 2)
    rows = {row["policy"]: row for row in load["rows"]}
    assert rows["pre_gated"]["bytes_per_step"] == TOP_K * BLOCKS * load["slab_bytes"]
    assert rows["pre_gated"]["peak_device_bytes"] < rows["gpu_only"]["peak_device_bytes"]
    # on a CPU they compute there anyway
    [verdict] = load["verdicts"]
    assert "on the CPU" not in verdict and "host_gb_per_s" not in load
    assert " ".join(verdict.split()[:4]) in capsys.readouterr().out


def test_computing_on_the_cpu_is_advised_where_memory_is_faster_than_the_link() -> None:
    model = nano()
    slab_bytes = model.layout("source").slab_bytes
    # 4 blocks of 2 experts: at 1 kB a ms of host memory 8 slabs take 8 * slab_bytes / 1e3 ms
    profiled = Profile(Durations((1.0,) * BLOCKS, 0.5, 2.0, slab_bytes / 100), 1e-4, 1e-4, slab_bytes, TOP_K)
    row = {"policy": "pre_gated", "cache": "none", "slab_dtype": "source", "active_experts": TOP_K}
    experts_ms = 8 * slab_bytes / 1e3
    slow = cpu_advice(model, [{**row, "tpot_ms": 2 * (6 + experts_ms)}], profiled, 1e-3, 10**9)
    assert slow.endswith("with pre_gated: the CPU would be 2.00× as fast.") and f" = {experts_ms:.0f} ms" in slow
    fast = cpu_advice(model, [{**row, "tpot_ms": 6 + experts_ms / 2}], profiled, 1e-3, 10**9)
    assert fast.endswith("moving them is faster.")
    assert "is no choice here" in cpu_advice(model, [{**row, "tpot_ms": 1.0}], profiled, 1e-3, 10**5)
    assert not cpu_advice(model, [{**row, "policy": "gpu_only", "tpot_ms": 1.0}], profiled, 1e-3, 10**9)
