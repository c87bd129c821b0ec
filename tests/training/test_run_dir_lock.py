"""Whose a run directory is: a new run's, that of the run to be resumed, or another's."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from pregate.config import Run, TrainConfig, UsageError
from pregate.training.run_dir_lock import CHECKPOINT, CONFIG, CONVERTED, LAST, SUMMARY, claim_run_dir, claimed_run_dir


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", [CONVERTED, CHECKPOINT])
def test_models_without_a_run_are_not_taken_for_a_runs_own(name: str, resume: bool, tmp_path: Path) -> None:
    """A run removes `converted/` at its end and writes `checkpoint/` anew."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    said = "holds models but no config.yaml" if resume else "holds files but no run: choose another run_dir=DIR"
    with pytest.raises(UsageError, match=said):
        claim_run_dir(Run(run_dir=str(tmp_path), resume=resume))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_log_of_a_job_scheduler_is_no_run(tmp_path: Path) -> None:
    """The same command with `resume=true` begins a run and goes on with it."""
    (tmp_path / "slurm-1.out").write_text("begun\n")
    claim_run_dir(Run(run_dir=str(tmp_path), resume=True))
    assert (tmp_path / CONFIG).is_file()


def test_a_finished_run_without_its_state_does_not_begin_again(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path), resume=True, train=TrainConfig(steps=6))
    claim_run_dir(run)
    (tmp_path / SUMMARY).write_text(json.dumps({"train": {"steps": 6}}))
    with pytest.raises(
        UsageError, match=r"finished run without the state to resume from, last/.*pregate\.eval run_dir"
    ):
        claim_run_dir(run)
    (tmp_path / LAST).mkdir()
    claim_run_dir(run)
    (tmp_path / LAST).rename(tmp_path / "previous")
    claim_run_dir(run)
    (tmp_path / "previous").rename(tmp_path / f".{LAST}.old")  # killed as a newer state took its place
    claim_run_dir(run)
    assert (tmp_path / LAST).is_dir()


def test_a_directory_is_free_when_its_run_is_over(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path))
    other = os.open(tmp_path, os.O_RDONLY)
    with claimed_run_dir(run), pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_finished_run_of_no_steps_has_no_state(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path), resume=True, train=TrainConfig(steps=0, warmup_steps=0))
    claim_run_dir(run)
    (tmp_path / SUMMARY).write_text(json.dumps({"train": {"steps": 0}}))
    claim_run_dir(run)


def test_home_is_where_a_path_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = Run(run_dir="~/runs/x", output="~/out", source="google/switch-base-8", checkpoint="./~/x")
    assert (run.run_dir, run.output) == (str(tmp_path / "runs" / "x"), str(tmp_path / "out"))
    assert (run.source, run.checkpoint, run.reference) == ("google/switch-base-8", "./~/x", None)
