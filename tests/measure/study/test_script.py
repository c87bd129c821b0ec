"""The script that people call: what it lists, refuses and renders without running anything."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import date
from pathlib import Path

from pregate.measure.study.records import append_record
from tests.measure.study.synthetic import synthetic_records

ROOT = Path(__file__).parents[3]


def call(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in os.environ.items() if key not in ("PREGATE_DATA", "ONLY", "OUT", "DRY")}
    command = [sys.executable, str(ROOT / "scripts" / "accuracy_study.py"), *arguments]
    environment = {**plain, "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_it_lists_and_renders_what_there_is(tmp_path: Path) -> None:
    folder = tmp_path / "results" / f"accuracy_nano_{date.today()}"
    for record in synthetic_records()[:3]:
        append_record(folder, record)
    done = call(tmp_path, "nano", "--list", ONLY="sst2_*_s1")
    lines = done.stdout.splitlines()
    assert lines[:3] == ["done sst2_conventional_s1", "done sst2_shifted_s1", "     sst2_calibrated_s1"], done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results"}, "looking leaves nothing behind"
    assert call(tmp_path, "nano", "--render").returncode == 0
    assert (folder / "README.md").read_text().startswith("# Accuracy study, nano\n")


def test_it_refuses_before_any_work(tmp_path: Path) -> None:
    without_data = call(tmp_path, "nano")
    assert without_data.returncode == 2 and "Set PREGATE_DATA" in without_data.stderr
    no_cell = call(tmp_path, "nano", ONLY="sst2_conventional_s9", PREGATE_DATA="data")
    assert no_cell.returncode == 2 and "--list shows them" in no_cell.stdout + no_cell.stderr
    assert list(tmp_path.iterdir()) == []
