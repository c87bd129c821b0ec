"""Lines without a terminal, and the two stages of Ctrl-C."""

from __future__ import annotations

import signal

import pytest

from pregate.training import progress as progress_module
from pregate.training.progress import Interrupts, Progress


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


def test_a_launchers_echo_of_ctrl_c_is_no_second_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun hands on what the terminal has sent to its processes already; what they have learned is to be saved."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "\nStopping after this step; press Ctrl-C again to stop at once.\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with Interrupts() as interrupts:
            monkeypatch.setattr(progress_module, "ECHO_S", 600.0)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert interrupts.pending
            monkeypatch.setattr(progress_module, "ECHO_S", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert capsys.readouterr().err == said
