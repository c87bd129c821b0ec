"""The probe of the link: its rows, its table and its check, on the CPU and, where there is one, a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pregate.engine.storage.aligned_memory import PAGE
from studies.profiles import gather_probe
from studies.profiles.gather_probe import MEMORIES, ROWS, TABLE, ProbeSettings, main, probe, table

SMALL = ProbeSettings(sizes=(PAGE - 1, 3 * PAGE), grids=(2, 5), unrolls=(1, 4), pool=64 * PAGE, moved=1, repeats=3)


def test_a_dry_run_on_the_cpu(tmp_path: Path) -> None:
    rows = probe(torch.device("cpu"), tmp_path / "new", SMALL)
    assert [(row["memory"], row["method"], row["slab_bytes"]) for row in rows] == [
        ("pageable", method, size) for size in (PAGE, 3 * PAGE) for method in ("copy", "gather")
    ]
    for row in rows:
        assert row["device"] == "cpu" and row["num_fetches"] == 4 and row["ms_per_slab"] > 0
        assert row["gb_per_s"] == pytest.approx(row["slab_bytes"] / row["ms_per_slab"] / 1e6)
        assert "num_programs" not in row and "unroll" not in row, "the reference implementation has neither"
    written = [json.loads(line) for line in (tmp_path / "new" / ROWS).read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "environment"} for row in written] == rows
    assert all(row["environment"]["torch"] == torch.__version__ for row in written)
    assert (tmp_path / "new" / TABLE).read_text() == table(rows)


def test_the_command_appends_rows_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--sizes", "4096", "--pool", "65536", "--repeats", "1"]
    for _ in range(2):
        main(["--out", str(tmp_path), *options])
    assert len((tmp_path / ROWS).read_text().splitlines()) == 4
    assert "| pageable | 4.10 kB |" in capsys.readouterr().out


def test_cuda_without_a_gpu_is_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path), "--device", "cuda"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("pregate: engine.device=cuda, but torch finds no CUDA GPU")


def test_a_copy_that_went_wrong_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_byte_off(addresses_G: torch.Tensor, slabs: object, slots: object, slots_SB: torch.Tensor, *_: int) -> None:
        slots_SB[2, 17] += 1

    monkeypatch.setattr(gather_probe, "gather_slabs", one_byte_off)
    with pytest.raises(RuntimeError, match=r"gather pageable .* left other bytes in slot"):
        probe(torch.device("cpu"), tmp_path, SMALL)
    rows = [json.loads(line) for line in (tmp_path / ROWS).read_text().splitlines()]
    assert [row["method"] for row in rows] == ["copy"], "what was measured before is kept"
    assert not (tmp_path / TABLE).exists()


def test_the_table_names_the_fastest_and_the_smallest_grid_near_it() -> None:
    def row(method: str, gb_per_s: float, memory: str = "registered", **more: int) -> dict:
        return {"memory": memory, "method": method, "slab_bytes": 10_000_000, "gb_per_s": gb_per_s, **more}

    rows = [
        row("copy", 50.0),
        row("gather", 30.0, num_programs=4, unroll=4),
        row("gather", 53.5, num_programs=8, unroll=4),
        row("gather", 55.0, num_programs=32, unroll=2),
        row("copy", 40.0, memory="write_combined"),
    ]
    assert table(rows).splitlines()[2:] == ["| registered | 10.0 MB | 50.00 | 55.00 | 32 | 2 | 1.10 | 8 |"]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    rows = probe(torch.device("cuda"), tmp_path, SMALL)
    per_size = 1 + len(SMALL.grids) * len(SMALL.unrolls)
    assert len(rows) == len(MEMORIES) * len(SMALL.sizes) * per_size
    assert {row["memory"] for row in rows} == set(MEMORIES)
    assert all(row["gb_per_s"] > 0 for row in rows)
    assert table(rows).count("\n") == 2 + len(MEMORIES) * len(SMALL.sizes)
