"""A training that is killed goes on with the same command as if nothing had been: same losses, same log, same files."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training.killing import (
    Killer,
    ended,
    files,
    kill_at_random,
    logged,
    olmoe_run,
    start,
    switch_run,
    undisturbed,
)


def test_sigterm_and_kills_at_chosen_moments_change_nothing(tmp_path: Path) -> None:
    """Asked to end while it validates, killed between the two renames of a save, and with the log cut in a line."""
    run = olmoe_run(tmp_path, "then_eval=false", "train.eval_every=3", "train.save_every=2", steps=6)
    expected, _, _ = undisturbed(run, tmp_path / "undisturbed")
    run_dir = tmp_path / "run"

    def interrupted(event: str, path: str, number: int = signal.SIGKILL) -> int:
        return ended(start(run, run_dir, Killer(run_dir, (event, path), number).install))

    assert interrupted("os.mkdir", ".checkpoint.new", signal.SIGTERM) == 143
    assert [line["step"] for line in logged(run_dir)] == [1, 2, 3, 3], "the step and its validation are finished"
    assert files(run_dir) >= {"last/train_state.json", "previous/train_state.json"}
    assert interrupted("os.rename", "/.last.new") == -signal.SIGKILL
    assert not (run_dir / "last").exists() and (run_dir / ".last.new").exists()
    assert [line["step"] for line in logged(run_dir)] == [1, 2, 3, 3, 4], "the line of a step that is not saved"
    assert interrupted("os.rename", "/.checkpoint.new") == -signal.SIGKILL
    with (run_dir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 7, "ti')
    assert ended(start(run, run_dir)) == 0
    assert logged(run_dir) == expected and files(run_dir) == files(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "kills"), [("switch", 8), ("olmoe", 4)])
def test_a_run_killed_at_random_moments_equals_the_undisturbed_one(kind: str, kills: int, tmp_path: Path) -> None:
    run = switch_run() if kind == "switch" else olmoe_run(tmp_path)
    assert kill_at_random(run, tmp_path, kills, 0) >= 1
