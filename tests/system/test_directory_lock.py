"""What keeps a command out of a directory: another process, and a place where nothing can be written."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from pregate.config import UsageError
from pregate.system import directory_lock
from pregate.system.directory_lock import held, hold, refuse_unwritable


def test_a_directory_is_held_against_others_and_not_against_oneself(tmp_path: Path) -> None:
    hold(tmp_path / "new", "output")
    hold(tmp_path / "new", "output")
    other = os.open(tmp_path / "new", os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_directory_is_free_when_the_work_in_it_is_done(tmp_path: Path) -> None:
    """One process may do several jobs of a sweep, or the cells of a notebook."""
    for _ in range(2):
        other = os.open(tmp_path, os.O_RDONLY)
        with held(tmp_path, "output"), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)


@pytest.mark.parametrize("name", ["there", "there/new/below"])
def test_a_place_that_cannot_be_written_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    refuse_unwritable(tmp_path / name, "output")
    allowed = {tmp_path / "there": False}
    monkeypatch.setattr(directory_lock.os, "access", lambda place, mode: allowed.get(Path(place), True))
    with pytest.raises(UsageError, match=r"cannot be written \(Permission denied\): choose another output=DIR\."):
        hold(tmp_path / name, "output")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_file_is_no_place_for_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(UsageError, match="choose another run_dir=DIR"):
        refuse_unwritable(tmp_path / "file" / "below", "run_dir")
