"""The runner with a command that takes no time: order, records, resumption, failures, limits."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from studies.accuracy.arms_and_seeds import SIZES, all_cells
from studies.accuracy.records import alone, append_record, load_baselines, load_records
from studies.accuracy.runner import Runner, Study

FAKE = Path(__file__).with_name("fake_cell.py")
CELLS = [
    cell
    for cell in all_cells(SIZES["nano"])
    if cell.task in ("pretrain", "sst2") and cell.seed < 2 and not cell.variant
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a study over the fake command; `run.calls()` lists the cells it was called for since the last look."""
    log = tmp_path / "calls"
    monkeypatch.setenv("FAKE_LOG", str(log))

    def go(**settings: Any) -> int:
        defaults: dict[str, Any] = {
            "size": "nano",
            "cells": CELLS,
            "folder": tmp_path / "out",
            "work": tmp_path / "work",
        }
        defaults |= {"program": [sys.executable, str(FAKE)], "baselines": lambda overrides: {"none": {"accuracy": 1.0}}}
        return Runner(Study(**{**defaults, **settings})).run()

    def calls() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    go.calls, go.log = calls, log  # type: ignore[attr-defined]
    go.folder, go.work = tmp_path / "out", tmp_path / "work"  # type: ignore[attr-defined]
    return go


def recorded(run: Any) -> list[str]:
    return [record["cell"] for record in load_records(run.folder)]


def test_a_study_runs_in_order_records_and_cleans_up(run: Any) -> None:
    rendered: list[int] = []
    assert run(render=lambda folder: rendered.append(len(load_records(folder)))) == 0
    assert run.calls() == [cell.name for cell in CELLS]
    assert recorded(run) == [cell.name for cell in CELLS]
    assert rendered == [4, 7]
    assert sorted(path.name for path in run.work.iterdir()) == ["logs", "pretrain"], "only the source stays"
    assert load_baselines(run.folder) == {"sst2": {"none": {"accuracy": 1}}}
    record = load_records(run.folder)[1]
    assert record["example_scores"] == [100, 0] and record["scores"] == {"accuracy": 50}
    assert record["curve"] == [{"step": 2, "accuracy": 50, "loss": 1}]
    assert record["routing"] == {"switch_rate": {"pre_gated": {"encoder": [0.1235]}}}
    assert record["commit"] == {"commit": "c0ffee", "dirty": False} and record["environment"] == {
        "torch": "1",
        "torch_threads": "1",
    }
    assert record["command"].startswith(
        "OMP_NUM_THREADS=1 python -m pregate.train +experiment=accuracy_nano_sst2 +arm=conventional seed=1 "
    )
    assert "resume" not in record["command"]
    assert load_records(run.folder)[0]["command"].startswith("OMP_NUM_THREADS=2 python -m pregate.train ")
    assert (run.folder / "cells.jsonl").read_text().count('"environment"') == 2, "only where it changes"


def test_routes_of_two_seeds_are_compared_without_training(run: Any) -> None:
    """Every model is the reference once, and is compared with the next one."""
    cells = [cell for cell in all_cells(SIZES["nano"]) if cell.task in ("pretrain", "sst2") and cell.arm != "pre_gated"]
    assert run(cells=cells, only="sst2_conventional_other_seed_*") == 0
    found = {record["cell"]: record["command"] for record in load_records(run.folder) if record["variant"]}
    for seed, other in ((1, 2), (2, 3), (3, 1)):
        command = found[f"sst2_conventional_other_seed_s{seed}"]
        assert f" reference={run.work}/sst2_conventional_s{seed}/checkpoint " in command
        assert f" model.source={run.work}/sst2_conventional_s{other}/checkpoint " in command
        assert " train.steps=0 " in command


def test_what_is_recorded_is_not_run_again(run: Any) -> None:
    assert run(only="sst2_conventional_s1") == 0
    assert run.calls() == ["pretrain", "sst2_conventional_s1"], "and what it needs"
    assert run() == 0
    assert run.calls() == [cell.name for cell in CELLS[2:]]
    assert run() == 0
    assert run.calls() == []


def test_a_checkpoint_that_is_gone_is_trained_again_but_not_recorded_twice(run: Any) -> None:
    import shutil

    run(only="sst2_conventional_s1")
    run.calls()
    shutil.rmtree(run.work)
    assert run(only="sst2_shifted_s1") == 0
    assert run.calls() == ["pretrain", "sst2_conventional_s1", "sst2_shifted_s1"]
    assert recorded(run) == ["pretrain", "sst2_conventional_s1", "sst2_shifted_s1"]


@pytest.mark.parametrize("cell", ["pretrain", "sst2_conventional_s1"])
def test_a_cell_that_comes_out_different_the_second_time_is_not_built_upon(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, cell: str
) -> None:
    import shutil

    run(only="sst2_conventional_s1")
    shutil.rmtree(run.work)
    monkeypatch.setenv("FAKE_OTHER", cell)
    assert run(only="sst2_shifted_s1") == 1
    assert recorded(run) == ["pretrain", "sst2_conventional_s1"]
    assert f"{cell} came out different from its record" in capsys.readouterr().out
    assert not (run.work / cell).exists()


def test_a_report_that_cannot_be_made_stops_nothing(run: Any, capsys: Any) -> None:
    def broken(folder: Path) -> None:
        raise ValueError("Cells of sst2 were scored on [6, 872] examples.")

    assert run(render=broken) == 0
    assert len(recorded(run)) == len(CELLS)
    assert "not rendered: ValueError: Cells of sst2" in capsys.readouterr().out


def test_two_processes_share_the_work(run: Any, tmp_path: Path) -> None:
    """What the other one holds is waited for, and not run again."""
    began, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with alone(run.work / "logs" / "pretrain.lock"):
            began.set()
            assert go_on.wait(250)
            run_dir = run.work / "pretrain"
            (run_dir / "checkpoint").mkdir(parents=True)
            (run_dir / "checkpoint" / "config.json").write_text("{}")
            (run_dir / "summary.json").write_text("{}")
            append_record(run.folder, {"cell": "pretrain", "task": "pretrain", "environment": {}})

    thread = threading.Thread(target=other)
    thread.start()
    assert began.wait(120)
    threading.Timer(0.5, go_on.set).start()
    assert run(only="sst2_conventional_s1") == 0
    thread.join()
    assert run.calls() == ["sst2_conventional_s1"]


def test_what_another_process_runs_is_passed_over(run: Any) -> None:
    """The cells behind it are run meanwhile; those that need it wait for it."""
    assert run(only="sst2_conventional_s1") == 0
    run.calls()
    began, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with alone(run.work / "logs" / "sst2_shifted_s1.lock"):
            began.set()
            assert go_on.wait(250)

    rest = [cell.name for cell in CELLS[2:]]

    def leave_it_last() -> None:
        """As soon as the last of the others has begun."""
        while rest[-1] not in (run.log.read_text() if run.log.exists() else ""):
            time.sleep(0.05)
        go_on.set()

    threads = [threading.Thread(target=target) for target in (other, leave_it_last)]
    threads[0].start()
    assert began.wait(120)
    threads[1].start()
    assert run() == 0
    for thread in threads:
        thread.join()
    assert run.calls() == [*rest[1:], "sst2_shifted_s1"], "it came to nothing there, so it is run at the end"


def test_the_first_cell_that_another_process_leaves_is_taken_at_once(run: Any) -> None:
    held = ["sst2_shifted_s1", "sst2_calibrated_s1"]
    assert run(cells=[cell for cell in CELLS if cell.name not in held], keep=True) == 0
    run.calls()
    locks = [alone(run.work / "logs" / f"{name}.lock") for name in held]
    for lock in locks:
        assert lock.__enter__()
    codes: list[int] = []
    runner = threading.Thread(target=lambda: codes.append(run()))
    runner.start()
    time.sleep(0.5)
    for lock, name in zip(locks, held, strict=True):
        assert runner.is_alive() and name not in recorded(run)
        lock.__exit__(None, None, None)
        deadline = time.monotonic() + 120
        while name not in recorded(run):
            assert time.monotonic() < deadline, f"{name} is free and nobody runs it"
            time.sleep(0.05)
    runner.join()
    assert codes == [0] and run.calls() == held


def test_waiting_ends_where_no_time_is_left(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("studies.accuracy.runner.LEAST_SECONDS", 0.1)
    with alone(run.work / "logs" / "pretrain.lock"):
        assert run(only="pretrain", seconds_left=1) == 1
    said = capsys.readouterr().out
    assert "waiting for pretrain, which other processes run" in said
    assert "no time left for pretrain: the same command goes on" in said


def test_reports_of_several_runners_are_written_one_after_the_other(run: Any) -> None:
    """Else one that has read fewer records may be written last."""
    inside: list[bool] = []

    def render(folder: Path) -> None:
        with alone(run.work / "logs" / "render.lock", wait=False) as mine:
            inside.append(mine)

    assert run(render=render) == 0
    assert inside == [False, False]


def test_several_runners_at_once_run_a_failing_cell_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "sst2_conventional_s1")
    runners = [threading.Thread(target=run) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert run.calls() == ["pretrain", "sst2_conventional_s1"]
    monkeypatch.delenv("FAKE_FAIL")
    assert run() == 0, "the next command tries it again"


def test_several_runners_at_once_run_each_cell_once(run: Any) -> None:
    codes: list[int] = []
    runners = [threading.Thread(target=lambda: codes.append(run(several=True))) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert codes == [0, 0, 0]
    assert sorted(run.calls()) == sorted(recorded(run)) == sorted(cell.name for cell in CELLS)


def test_a_failure_is_told_and_stops_no_other(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("FAKE_FAIL", "sst2_distilled_s1")
    assert run() == 1
    assert recorded(run) == [cell.name for cell in CELLS if cell.name != "sst2_distilled_s1"]
    said = capsys.readouterr().out
    assert "what went wrong" in said and "to be run again: sst2_distilled_s1" in said
    assert (run.work / "sst2_conventional_s1").is_dir(), "the failed cell will need it"
    monkeypatch.setenv("FAKE_FAIL", "")
    run.calls()
    assert run() == 0
    assert run.calls() == ["sst2_distilled_s1"]


def test_what_needs_a_failed_cell_is_not_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "sst2_conventional_s1")
    assert run() == 1
    assert run.calls() == ["pretrain", "sst2_conventional_s1"]
    assert recorded(run) == ["pretrain"]


def test_no_cell_begins_without_time_and_the_running_one_is_stopped(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(seconds_left=5) == 1
    assert run.calls() == []
    monkeypatch.setattr("studies.accuracy.runner.LEAST_SECONDS", 0.1)
    monkeypatch.setenv("FAKE_SLOW", "pretrain")

    timer = threading.Timer

    def when_under_way(seconds: float, call: Any, arguments: Any = None) -> threading.Timer:
        """The cell's time is up as soon as it has begun, however long that takes."""
        if arguments is None:
            return timer(seconds, call)  # in which it has to end
        assert 0 < seconds <= 100

        def up() -> None:
            while not (run.work / "pretrain" / "half").exists():
                time.sleep(0.05)
            call(*arguments)

        return timer(0.0, up)

    monkeypatch.setattr(threading, "Timer", when_under_way)
    assert run(seconds_left=100) == 1
    assert "saved" in (run.work / "logs" / "pretrain.log").read_text()
    assert run.calls() == ["pretrain"] and recorded(run) == []
    assert run(only="pretrain") == 0, "it goes on"
    assert recorded(run) == ["pretrain"]


def test_ctrl_c_stops_the_command_and_renders(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SLOW", "sst2_conventional_s1")
    rendered: list[Path] = []

    def interrupt() -> None:
        while not (run.work / "sst2_conventional_s1" / "half").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(render=rendered.append)
    assert recorded(run) == ["pretrain"] and rendered == [run.folder]
    assert "saved" in (run.work / "logs" / "sst2_conventional_s1.log").read_text()


def test_a_source_takes_the_place_of_pretraining_and_tiny_settings_are_passed(run: Any) -> None:
    cells = [cell for cell in CELLS if cell.arm != "pretrain"]
    assert run(cells=cells, source="hub/source", tiny=True, keep=True) == 0
    commands = {record["arm"]: record["command"] for record in load_records(run.folder)}
    assert "model.source=hub/source" in commands["distilled"] and "train.steps=2" in commands["distilled"]
    assert "train.steps" not in commands["shifted"]
    assert (run.work / "sst2_shifted_s1" / "summary.json").is_file()
