"""What the tables and plots say of rows made by hand."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pregate.cli import compose_run
from pregate.measure.bench.plots import group_labels, plot_bench
from pregate.measure.bench.table import (
    bench_tables,
    command,
    print_bench,
    short_figures,
    write_bench,
)
from pregate.measure.equality_words import equality_statement

COMMON = {"model": "switch-base-64", "dtype": "bfloat16", "lookahead": 1, "entry": "own", "batch": 1, "prompt_len": 64}


def engine_row(policy: str, tpot_ms: float, **more: Any) -> dict[str, Any]:
    return {
        **COMMON,
        "policy": policy,
        "new_tokens": 32,
        "tier": "disk",
        "slab_dtype": "source",
        "cache": "none",
        "budget": "25%",
        "slots": 192,
        "slab_bytes": 9_437_184,
        "tpot_ms": tpot_ms,
        "tpot_ms_min": tpot_ms - 1,
        "tpot_ms_max": tpot_ms + 2,
        "tokens_per_s": 1000 / tpot_ms,
        "block_ms": 4.25,
        "exposed_ms_per_token": 1.5,
        "link_bytes_per_step": 56_623_104,
        "link_gb_per_s": 2.0,
        "link_ms": 28.311552,
        "compute_ms": 40.0,
        "floor_ms": 40.0,
        "over_floor": tpot_ms / 40,
        "possible_gain": 68.311552 / 40,
        "roofline_tokens_per_s": 25.0,
        "peak_device_bytes": 2_345_000_000,
        "tokens_equal_resident": True,
        "repeats": 3,
        **more,
    }


def study() -> list[dict[str, Any]]:
    resident = {**COMMON, "policy": "resident", "new_tokens": 32, "tpot_ms": 40.0, "tokens_per_s": 25.0, "repeats": 3}
    slow = {"tier": "disk", "new_tokens": 4, "tpot_ms": 400.0, "tokens_per_s": 2.5, "tokens_equal_resident": True}
    return [
        resident,
        {**COMMON, "policy": "accelerate", **slow},
        engine_row("on_demand", 68.0),
        engine_row("pre_gated", 44.0, cache="lru", bytes_moved=5),
        engine_row("pre_gated", 42.5),
    ]


def markdown(rows: list[dict[str, Any]], tmp_path: Path, *overrides: str) -> str:
    run = compose_run(["name=cpu_disk", *overrides])
    write_bench(tmp_path / "bench.md", rows, run, {"torch": "2.0", "gpu": ["A", "B"], "git": {"commit": "c0ffee"}})
    return (tmp_path / "bench.md").read_text()


def test_a_table_holds_what_differs_and_its_caption_what_does_not(tmp_path: Path) -> None:
    text = markdown(study(), tmp_path, "bench.repeats=3")
    lines = text.splitlines()
    assert lines[0] == "# cpu_disk"
    assert "python -m pregate.bench name=cpu_disk bench.repeats=3" in lines
    assert "## switch-base-64, bfloat16" in lines
    caption = next(line for line in lines if line.startswith("lookahead 1"))
    assert caption == (
        "lookahead 1, entry own · tier disk · slabs source, 9.44 MB · batch 1 · slots 192 (25%) · prompts of 64 tokens "
        "· T_compute 40.0 ms."
    )
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == [
        *("policy", "cache", "new tokens", "block ms", "ms/token", "tokens/s", "× on_demand", "waiting ms", "MB/step"),
        *("GB/s", "T_link ms", "floor ms", "÷ floor", "gain allowed", "peak GB"),
    ]
    rows = {(row[0], row[1]): dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert list(rows) == [
        *(("resident", "–"), ("pre_gated", "none"), ("pre_gated", "lru"), ("on_demand", "none"), ("accelerate", "–"))
    ]
    ours = rows["pre_gated", "none"]
    assert ours["ms/token"] == "42.5 (41.5–44.5)"
    assert ours["× on_demand"] == "1.60"
    assert (ours["MB/step"], ours["T_link ms"], ours["÷ floor"], ours["gain allowed"]) == (
        "56.6",
        "28.3",
        "1.06",
        "1.71",
    )
    assert rows["accelerate", "–"]["× on_demand"] == "0.170"
    assert rows["resident", "–"]["× on_demand"] == "1.70"
    assert rows["resident", "–"]["GB/s"] == "–", "what was not measured is a dash"
    assert len({len(line) for line in lines if line.startswith("|")}) == 1, "aligned in a plain editor too"
    assert "Tokens equal the whole model's in 4 of 4 rows compared." in lines
    assert lines[-1] == "Environment: torch 2.0, gpu A, B; commit c0ffee."


def test_other_gates_have_a_table_of_their_own() -> None:
    rows = [{**COMMON, "policy": "on_demand", "gates": gates, "tpot_ms": 3.0} for gates in (None, "weights late")]
    captions = [table.caption for table in bench_tables(rows)]
    assert captions[0].startswith("lookahead 1, entry own · ") and "late" not in captions[0]
    assert captions[1].startswith("lookahead 1, entry own · weights late · ")


def test_wrong_tokens_are_shouted(tmp_path: Path) -> None:
    rows = study()
    rows[3]["tokens_equal_resident"] = False
    text = markdown(rows, tmp_path)
    assert "**Tokens differ from the whole model's in 1 of 4 rows: pre_gated.**" in text
    assert "**NO**" in text and "tokens equal" in text
    assert equality_statement([{"policy": "on_demand"}]) == ""
    out = StringIO()
    print_bench(rows, Console(file=out, width=100))
    assert "NO" in out.getvalue() and "Tokens differ" in out.getvalue()


def test_how_far_tokens_were_equal_is_said(tmp_path: Path) -> None:
    rows = study()
    rows[3] |= {"tokens_equal_resident": False, "tokens_equal_until": 35, "step_logits_rel_diff": 0.0042}
    text = markdown(rows, tmp_path)
    assert "**NO**, first 35" in text and "step off %" in text and " 0.42 |" in text
    assert "**Tokens differ from the whole model's in 1 of 4 rows: pre_gated.**" in text
    assert "Tokens equal, first N:" in text and "Step off:" in text


def test_a_speedup_needs_the_same_load() -> None:
    rows = [*study(), engine_row("pre_gated", 30.0, batch=2), engine_row("pre_gated", 20.0, slab_dtype="int8")]
    [table] = bench_tables(rows)
    place = table.headers.index("× on_demand")
    assert sorted(row[place] for row in table.rows if row[0] == "pre_gated") == ["1.55", "1.60", "–", "–"]


def test_the_terminal_table_fits_and_keeps_the_figures() -> None:
    out = StringIO()
    print_bench(study(), Console(file=out, width=100))
    assert max(len(line) for line in out.getvalue().splitlines()) <= 100
    assert "42.5" in out.getvalue() and "1.06" in out.getvalue() and "switch-base-64, bfloat16" in out.getvalue()


def test_each_model_has_its_own_table() -> None:
    rows = [*study(), engine_row("on_demand", 5.0, model="switch-base-8")]
    assert [table.title for table in bench_tables(rows)] == ["switch-base-64, bfloat16", "switch-base-8, bfloat16"]


@pytest.mark.parametrize(
    ("overrides", "typed"),
    [
        (["+experiment=fig15_cache"], "python -m pregate.bench +experiment=fig15_cache"),
        (["bench.caches=[none,lru]"], "python -m pregate.bench 'bench.caches=[none,lru]'"),
        (["engine.pack_dir=/mnt/fast/packs"], "python -m pregate.bench engine.pack_dir=DIR"),
        (["checkpoint=~/runs/a"], "python -m pregate.bench checkpoint=DIR"),
    ],
)
def test_the_command_names_no_place_of_this_machine(overrides: list[str], typed: str) -> None:
    assert command(overrides) == typed


def test_a_place_below_the_current_directory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command([f"run_dir={tmp_path}/runs/a"]) == "python -m pregate.bench run_dir=runs/a"


def test_a_row_in_one_line() -> None:
    assert short_figures(engine_row("pre_gated", 42.5)) == (
        "42.5 (41.5–44.5) ms/token, 23.5 tokens/s, 1.06 × floor, peak 2.35 GB, tokens equal: yes"
    )
    assert short_figures({"tpot_ms": 3.0, "tokens_equal_resident": False}) == "3.00 ms/token, tokens equal: NO"


def test_bars_stand_where_their_settings_differ() -> None:
    rows = [engine_row("on_demand", 5.0, tier=tier) for tier in ("dram", "disk")]
    resident = {**COMMON, "policy": "resident", "tpot_ms": 4.0}
    assert group_labels([resident, *rows]) == ["in memory", "dram", "disk"]
    assert group_labels(rows[:1]) == ["switch-base-64"]
    shares = [engine_row("on_demand", 5.0, budget=budget) for budget in ("1%", "10%")]
    assert group_labels(shares) == ["1% of experts", "10% of experts"]
    further = [engine_row("on_demand", 5.0, lookahead=lookahead) for lookahead in (1, 2)]
    assert group_labels(further) == ["lookahead 1", "lookahead 2"]


def test_every_figure_that_was_measured_is_drawn(tmp_path: Path) -> None:
    drawn = plot_bench([*study(), engine_row("prefetch_all", 2000.0)], tmp_path / "plots")
    assert list(drawn) == ["time_per_token", "throughput", "block_latency", "peak_memory"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())
    assert plot_bench([{**COMMON, "policy": "on_demand", "tpot_ms": 3.0}], tmp_path).keys() == {"time_per_token"}
    assert plot_bench([], tmp_path) == {}
