"""What an entry point does around its work: sweeps that do not overwrite each other, and a quiet end on Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pregate.cli import entry_point
from pregate.config import Run, UsageError
from pregate.config.groups import config_dir
from pregate.overrides import composed
from pregate.system.stopping import Terminated
from pregate.system.submitit_job import until_time_is_up

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


def swept(
    arguments: list[str], failing: dict[int, Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[list[int], int]:
    """The seeds of the jobs that were begun, and the exit status, of a sweep in which some seeds fail."""
    begun: list[int] = []

    def work(run: Run) -> None:
        begun.append(run.seed)
        if run.seed in failing:
            raise failing[run.seed]

    monkeypatch.chdir(tmp_path)
    try:
        start(["-m", "name=swept", *arguments], monkeypatch, work)
    except SystemExit as stop:
        return begun, int(stop.code or 0)
    return begun, 0


def test_a_bad_job_of_a_sweep_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing: dict[int, Exception] = {1: UsageError("Nothing there."), 3: UsageError("Nor there.")}
    assert swept(["seed=1,2,3"], failing, monkeypatch, tmp_path) == ([1, 2, 3], 2)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "pregate: job 0 (name=swept seed=1) failed: Nothing there."
    assert told[-3:] == [
        "pregate: 2 jobs of the sweep failed:",
        "pregate: job 0 (name=swept seed=1): Nothing there.",
        "pregate: job 2 (name=swept seed=3): Nor there.",
    ]


def test_an_impossible_setting_of_one_job_is_that_jobs_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = swept(["pregate.lookahead=9,1", "seed=3"], {}, monkeypatch, tmp_path)
    assert begun == ([3], 2)
    assert "job 0 (name=swept pregate.lookahead=9 seed=3): pregate.lookahead=9 is outside" in capsys.readouterr().err


def test_a_bug_in_one_job_keeps_its_traceback_and_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing: dict[int, Exception] = {1: UsageError("Nothing there."), 2: RuntimeError("a bug\nof two lines")}
    assert swept(["seed=1,2"], failing, monkeypatch, tmp_path) == ([1, 2], 1)
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert told.endswith("pregate: job 1 (name=swept seed=2): RuntimeError: a bug of two lines\n")


def test_ctrl_c_ends_a_sweep_and_names_what_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing: dict[int, Any] = {1: UsageError("Nothing there."), 2: KeyboardInterrupt()}
    assert swept(["seed=1,2,3"], failing, monkeypatch, tmp_path) == ([1, 2], 130)
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "pregate: 1 job of the sweep failed:",
        "pregate: job 0 (name=swept seed=1): Nothing there.",
        "pregate: stopped; a training or a benchmark goes on with the same command and resume=true.",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=1,two"], "seed: Value 'two' of type 'str' could not be converted to Integer."),
        (["sede=1,2"], "There is no setting 'sede'; did you mean seed?"),
        (["task=squad,sqad"], "There is no task named 'sqad': choose one of"),
        (["source_train.steps=1,2"], "source_train.steps=1 sets a part of source_train, which is empty here"),
        (["checkpoint=a=b,c"], "'checkpoint=a=b,c' cannot be read"),
    ],
)
def test_a_typo_ends_a_sweep_before_its_first_job(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert swept(arguments, {}, monkeypatch, tmp_path) == ([], 2)
    told = capsys.readouterr().err
    assert told.startswith(f"pregate: {said}") and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_runs_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert swept(["seed=1,2"], {}, monkeypatch, tmp_path) == ([], 2)
    assert "A sweep runs its jobs one after the other in one process, but WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--resume", "There is no option --resume: settings are written without dashes, resume=VALUE."),
        ("-x", "There is no option -x: settings are written without dashes, key=VALUE."),
        ("--run-dir=a", "There is no option --run-dir: settings are written without dashes, run_dir=VALUE."),
    ],
)
def test_settings_are_no_options(
    flag: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        start([flag, "seed=1"], monkeypatch, print)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"pregate: {said}\n"


def test_a_sweep_on_a_cluster_is_composed_and_its_settings_are_slurms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["+launcher=slurm", "seed=0,1", "resume=true", "hydra.launcher.partition=gpu"]
    composed(arguments, multirun=True)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        launcher = compose("config", ["+launcher=slurm", arguments[-1]], return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    given = {key: value for key, value in launcher.items() if key not in ("_target_", "submitit_folder")}
    assert (given.pop("max_num_timeout"), given["signal_delay_s"], given["partition"]) == (4, 300, "gpu")
    shared = ("name", "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb")
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm")
    given["name"] = "sweep"
    # it refuses what it does not know
    executor.update_parameters(
        **{
            key if key in (*shared, "stderr_to_stdout") else f"slurm_{key}": value
            for key, value in given.items()
            if value is not None and key != "additional_parameters"
        }
    )


def test_a_launcher_without_a_sweep_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Run] = []
    for argument in ("+launcher=local", "hydra/launcher=submitit_slurm"):
        with pytest.raises(SystemExit):
            start([argument], monkeypatch, runs.append)
        assert f"{argument} says where the jobs of a sweep run: add --multirun" in capsys.readouterr().err
    assert not runs


def test_a_submitted_job_saves_before_it_is_queued_again() -> None:
    """Where submitit's own handler would have exited in the middle of the work."""
    done: list[str] = []

    def work() -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        raise AssertionError("not reached")

    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    signal.signal(signal.SIGUSR2, lambda *_: done.append("queued again"))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(Terminated):
            until_time_is_up(work, signal.SIGUSR2)
        with pytest.raises(Terminated):  # ended by its user
            until_time_is_up(lambda: os.kill(os.getpid(), signal.SIGTERM), signal.SIGUSR2)
        assert done == ["queued again"] and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
