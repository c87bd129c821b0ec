"""The script that people call: what it lists, refuses and renders without running anything."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from datetime import date
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from studies.accuracy.arms_and_seeds import PRETRAINING, SIZES, all_cells
from studies.accuracy.records import append_record, claim
from tests.studies.synthetic import synthetic_records

ROOT = Path(__file__).parents[2]


@cache
def script() -> Any:
    """The script as a module: a process of its own for every call would import torch each time."""
    spec = importlib.util.spec_from_file_location("accuracy_study", ROOT / "scripts" / "accuracy_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment_of(settings: dict[str, str]) -> dict[str, str]:
    ours = ("PREGATE_DATA", "ONLY", "OUT", "DRY", "WORK", "SOURCE", "JOBS", "SECONDS_LEFT")
    return {**{key: value for key, value in os.environ.items() if key not in ours}, **settings}


def call(folder: Path, *arguments: str, **settings: str) -> SimpleNamespace:
    out, err = StringIO(), StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with (
        patch.dict(os.environ, environment_of(settings), clear=True),
        patch.object(sys, "argv", ["accuracy_study.py", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
        chdir(folder),
    ):
        try:
            code = script().main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_it_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "accuracy_study.py"), "nano", "--list", "x"]
    environment = {name: value for name, value in environment_of({}).items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "usage: accuracy_study.py" in done.stderr


def test_it_lists_and_renders_what_there_is(tmp_path: Path) -> None:
    folder = tmp_path / "results" / f"accuracy_nano_{date.today()}"
    claim(folder, {"size": "nano", "dry": False, "source": None})
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
    assert no_cell.returncode == 2 and "--list without it shows them" in no_cell.stderr
    unlisted = call(tmp_path, "nano", "--list", ONLY="sst2_conventional_s9")
    assert unlisted.returncode == 2 and "--list without it shows them" in unlisted.stderr
    given = call(tmp_path, "nano", ONLY="pretrain", PREGATE_DATA="data", SOURCE="hub/source")
    assert given.returncode == 2 and "ONLY=pretrain is no cell" in given.stderr
    for given in ("soon", "-1", "nan", "inf"):
        no_time = call(tmp_path, "nano", PREGATE_DATA="data", SECONDS_LEFT=given)
        assert no_time.returncode == 2 and f"SECONDS_LEFT={given} is no number" in no_time.stderr
    no_jobs = call(tmp_path, "nano", PREGATE_DATA="data", JOBS="many")
    assert no_jobs.returncode == 2 and "JOBS=many is no number" in no_jobs.stderr
    nothing = call(tmp_path, "nano", "--render", OUT="nowhere")
    assert nothing.returncode == 2 and "nowhere holds no cells.jsonl" in nothing.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    no_folder = call(tmp_path, "nano", PREGATE_DATA="data", OUT="file")
    assert no_folder.returncode == 2 and "file cannot be written" in no_folder.stderr


def test_with_a_source_nothing_waits_for_pretraining(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"size": "nano", "dry": False, "source": "hub/source"})
    for record in synthetic_records():
        if record["task"] != "pretrain":
            append_record(tmp_path / "out", record)
    assert call(tmp_path, "nano", "--render", OUT="out", SOURCE="hub/source").returncode == 0
    cells = [cell for cell in all_cells(SIZES["nano"]) if cell.task != PRETRAINING]
    assert f"{len(cells)} of {len(cells)} cells." in (tmp_path / "out" / "README.md").read_text()
    assert "pretrain" not in call(tmp_path, "nano", "--list", OUT="out", SOURCE="hub/source").stdout


def test_a_folder_is_of_one_study(tmp_path: Path) -> None:
    """Cells of another size bear the same names, and those of a dry run say nothing."""
    folder = tmp_path / "out"
    claim(folder, {"size": "nano", "dry": False, "source": None})
    append_record(folder, synthetic_records()[0])
    for size, settings, told in (
        ("mini", {}, "not the mini study"),
        ("nano", {"DRY": "1"}, "not a dry run of the nano study"),
        ("nano", {"SOURCE": "hub/source"}, "not the nano study of hub/source"),
    ):
        refused = call(tmp_path, size, OUT="out", PREGATE_DATA="data", **settings)
        assert refused.returncode == 2 and told in refused.stderr, (refused.stdout, refused.stderr)
    refused = call(tmp_path, "mini", "--render", OUT="out")
    assert refused.returncode == 2 and "holds the nano study" in refused.stderr
    (folder / "study.json").unlink()
    unknown = call(tmp_path, "nano", OUT="out", PREGATE_DATA="data")
    assert unknown.returncode == 2 and "no study.json" in unknown.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_given_once_is_not_the_next_one_s(tmp_path: Path) -> None:
    for record in synthetic_records():
        append_record(tmp_path / "out", record)
    claim_later = {"size": "nano", "dry": False, "source": None}
    (tmp_path / "out" / "study.json").write_text(json.dumps(claim_later))
    done = call(tmp_path, "nano", OUT="out", PREGATE_DATA="data", DRY="0")
    assert done.returncode == 0 and "nothing to do" in done.stdout, done.stderr
    assert "out" not in call(tmp_path, "nano", "--list").stdout
    assert not (tmp_path / "runs" / "accuracy_nano" / "results_folder").exists()


def test_a_source_that_is_not_made_yet_is_asked_for(tmp_path: Path) -> None:
    done = call(tmp_path, "smollm2_moe", PREGATE_DATA=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no source in runs/smollm2_moe/checkpoint: make it with `python -m studies.dense_to_moe" in done.stderr
    assert call(tmp_path, "smollm2_moe").stderr.startswith("Set PREGATE_DATA to a directory")
    assert not any(tmp_path.iterdir()), "nothing is left behind"
    listed = call(tmp_path, "smollm2_moe", "--list", ONLY="*_dense_*").stdout.split()
    assert listed == [f"{task}_conventional_dense_s1" for task in ("web_questions", "sst2", "squad", "dialogsum")]
    other = call(tmp_path, "smollm2_moe", "--list", ONLY="*_dense_*", SOURCE="my/moe")
    assert other.returncode == 2 and "is no cell" in other.stderr, "what another source was made from is not known"
    dense = next(record for record in synthetic_records("smollm2_moe") if record["variant"] == "dense")
    append_record(tmp_path / "out", dense)
    other = call(tmp_path, "smollm2_moe", "--list", ONLY="*_dense_*", SOURCE="my/moe", OUT="out")
    assert other.stdout.splitlines()[0] == f"done {dense['cell']}" and other.stdout.count("\n") == 4, "unless it ran"
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "runs" / "smollm2_moe" / "checkpoint").mkdir(parents=True)
    half = call(tmp_path, "smollm2_moe", PREGATE_DATA=str(tmp_path))
    assert half.returncode == 2 and "no source in runs/smollm2_moe/dense_as_moe: make it with" in half.stderr
