"""Lines without a terminal, the two stages of Ctrl-C, and SIGTERM, which has one."""

from __future__ import annotations

import os
import signal

import pytest

from pregate.system.stopping import Terminated, stoppable
from pregate.training import stop_after_step as interrupts_module
from pregate.training.progress import Progress
from pregate.training.stop_after_step import Interrupts


def test_lines_are_few_and_end_with_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 0, 25, log_every=1, shown=True) as progress:
        for step in range(1, 26):
            progress.update(step, 1.0 / step, 1234.0)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[2] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "loss 0.100" in lines[0] and "1,234 tokens/s" in lines[0] and "left" in lines[0]


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 0, 1, log_every=1, shown=False) as progress:
        progress.update(1, 1.0, 1.0)
        progress.note("hello")
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with Progress("train", 0, 4, log_every=1, shown=True) as progress:
        progress.update(4, 0.25, 1234.0)
        progress.note("validation em 90")
    err = capsys.readouterr().err
    assert "validation em 90" in err
    assert "loss 0.250" in err and "1,234 tokens/s" in err and "4/4" in err


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.pending
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_waits_however_often_it_comes() -> None:
    """A launcher passes on what a scheduler has sent to all."""
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.pending and interrupts.first == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)  # the first of its kind, and the scheduler was first
        assert interrupts.first == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_a_command_once_with_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []
    with pytest.raises(SystemExit) as stopped, stoppable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(1)
    assert stopped.value.code == 143 and cleaned
    assert capsys.readouterr().err == (
        "pregate: terminated; a training or a benchmark goes on with the same command and resume=true.\n"
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_that_a_loop_has_held_back_does_not_cut_what_comes_behind_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped, stoppable():
        with Interrupts():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise Terminated
    assert stopped.value.code == 143
    assert "Asked to end (SIGTERM): stopping after this step." in capsys.readouterr().err


def test_a_handler_that_somebody_else_has_set_stays() -> None:
    mine = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("held", [False, True])
def test_a_forked_process_dies_of_sigterm_and_leaves_ctrl_c_to_its_parent(held: bool) -> None:
    with stoppable(), Interrupts() if held else stoppable():
        child = os.fork()
        if child == 0:
            try:
                if held:
                    signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_launchers_echo_of_ctrl_c_is_no_second_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun hands on what the terminal has sent to its processes already; what they have learned is to be saved."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "\nStopping after this step; press Ctrl-C again to stop at once.\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with Interrupts() as interrupts:
            monkeypatch.setattr(interrupts_module, "ECHO_S", 600.0)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert interrupts.pending
            monkeypatch.setattr(interrupts_module, "ECHO_S", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err == said
