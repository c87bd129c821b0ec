"""Waiting for what the main process does alone, longer than any collective would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from pregate.config import UsageError
from pregate.training import waiting


@pytest.fixture
def meetings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two processes, as threads: "main" is the main one. Who has met lies in the list."""
    store, met = dist.HashStore(), []
    both = threading.Barrier(2)

    def meet() -> None:
        met.append(threading.current_thread().name)
        both.wait()

    def state() -> SimpleNamespace:
        is_main = threading.current_thread().name == "main"
        return SimpleNamespace(
            num_processes=2, is_main_process=is_main, process_index=int(not is_main), wait_for_everyone=meet
        )

    rounds = {"main": iter(range(9)), "other": iter(range(9))}

    class Own:
        def __next__(self) -> int:
            return next(rounds[threading.current_thread().name])

    monkeypatch.setattr(waiting, "PartialState", state)
    monkeypatch.setattr(waiting, "_store", lambda: store)
    monkeypatch.setattr(waiting, "_rounds", Own())
    monkeypatch.setattr(waiting, "LOOK_EVERY_S", 0.001)
    return met


def started(name: str, work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread


def test_no_collective_begins_before_the_main_process_is_there(
    meetings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "TELL_AFTER_S", -1.0)
    looks = threading.Semaphore(0)
    sleep = waiting.time.sleep
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: (looks.release(), sleep(seconds)))

    def both() -> None:
        waiting.wait_for_main("converting")
        waiting.wait_for_main("packing")

    other = started("other", both)
    for _ in range(5):
        assert looks.acquire(timeout=60)
    assert meetings == []
    main = started("main", both)
    for thread in (other, main):
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(meetings) == ["main", "main", "other", "other"]
    told = capsys.readouterr().err
    assert told.startswith("pregate: process 1 waits for the main process, which is converting\n")
    assert told.count("converting") == 1


def test_a_main_process_that_ended_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    state = SimpleNamespace(num_processes=2, is_main_process=False, process_index=1)
    monkeypatch.setattr(waiting, "PartialState", lambda: state)
    monkeypatch.setattr(waiting, "_store", Gone)
    with pytest.raises(UsageError, match="main process ended while it was converting: see what it says"):
        waiting.wait_for_main("converting")


def test_one_process_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PartialState", lambda: SimpleNamespace(num_processes=1))
    waiting.wait_for_main("converting")
