"""What an entry point does around its work: sweeps that do not overwrite each other, and a quiet end on Ctrl-C."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from pregate.cli import entry_point
from pregate.config import Run

pytestmark = pytest.mark.usefixtures("in_process_hydra")


def start(arguments: list[str], monkeypatch: pytest.MonkeyPatch, work: object) -> None:
    monkeypatch.setattr(sys, "argv", ["pregate.eval", *arguments])
    GlobalHydra.instance().clear()
    entry_point(work)  # type: ignore[arg-type]


def test_jobs_of_a_sweep_write_to_places_of_their_own_that_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[Run] = []
    start(["-m", "name=swept", "checkpoint=a/b c", "engine.device_budget=25%,50%"], monkeypatch, runs.append)
    assert [run.engine.device_budget for run in runs] == ["25%", "50%"]
    places = [str(tmp_path / "runs" / "swept_sweep" / job) for job in "01"]
    assert [run.run_dir for run in runs] == places
    assert [run.output for run in runs] == places


def test_a_sweep_keeps_the_output_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[Run] = []
    start(["-m", "output=ahead_${pregate.lookahead}", "pregate.lookahead=1,2"], monkeypatch, runs.append)
    assert [run.output for run in runs] == ["ahead_1", "ahead_2"]


def test_ctrl_c_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        start(["seed=1"], monkeypatch, interrupted)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == (  # type: ignore[attr-defined]
        "pregate: stopped; a training or a benchmark goes on with the same command and resume=true.\n"
    )


def test_sigterm_ends_in_one_sentence_and_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned: list[str] = []

    def asked_to_end(run: Run) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            cleaned.append("as behind Ctrl-C")
            raise

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        start(["seed=1"], monkeypatch, asked_to_end)
    assert (stopped.value.code, cleaned) == (143, ["as behind Ctrl-C"])
    assert capsys.readouterr().err == (
        "pregate: terminated; a training or a benchmark goes on with the same command and resume=true.\n"
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(run: Run) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/report.html")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        start(["seed=1"], monkeypatch, full)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "pregate: The disk is too full for runs/a/report.html: make room, and run the command again; a training or a "
        "benchmark goes on with the same command and resume=true.\n"
    )


def test_a_users_own_config_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    runs: list[Run] = []
    start(["--config-dir", str(tmp_path), "+experiment=mine"], monkeypatch, runs.append)
    assert [run.name for run in runs] == ["mine"]
