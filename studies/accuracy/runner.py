"""Runs the cells of a study one after the other, each as a command of its own, and records what they give.

Knows run directories, processes and time; knows nothing about what a cell's figures mean. A cell that is recorded is
not run again, one that was cut short goes on where it stopped, and one that fails does not stop the others. Several
runners may share a study: each takes the next cell that nobody runs and that needs nothing which is still running.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pregate.system.console import first_of
from studies.accuracy.arms_and_seeds import PRETRAINING, THREADS, Cell, overrides_of, threads_of, tiny_overrides
from studies.accuracy.records import (
    Record,
    add_baselines,
    alone,
    append_record,
    build_record,
    finished,
    is_free,
    load_baselines,
    load_records,
    recorded_cells,
    trivial_scores,
)

LEAST_SECONDS = 20
"""No cell is begun with less time left."""
GRACE_SECONDS = 120
"""How long a command may take to save its state after it was asked to stop."""
WAIT_SECONDS = 0.5
"""Between two looks at whether another process has ended its cell."""
RENDER_EVERY = 4
PROGRESS = re.compile(r"\w+: step \d+")
TAIL_LINES = 15


class Outcome(StrEnum):
    done = "done"
    failed = "failed"
    stopped = "stopped"
    busy = "busy"
    """Another process runs the cell, or one that it needs."""


@dataclass
class Study:
    """What is to be run and where: `folder` takes the results, `work` the run directories.

    `source`: a pre-trained conventional checkpoint that takes the place of pre-training. `only`: a pattern of cell
    names; what these need is run as well. `program`: the command that overrides are given to.
    """

    size: str
    cells: Sequence[Cell]
    folder: Path
    work: Path
    source: str | None = None
    only: str | None = None
    seconds_left: float | None = None
    tiny: bool = False
    keep: bool = False
    several: bool = False
    """Whether other runners print to the same terminal, so that a cell's progress needs its name."""
    program: Sequence[str] = field(default_factory=lambda: [sys.executable, "-m", "pregate.train"])
    baselines: Callable[[list[str]], dict[str, Any]] = trivial_scores
    render: Callable[[Path], None] = lambda folder: None

    @property
    def wanted(self) -> list[Cell]:
        return [cell for cell in self.cells if fnmatch(cell.name, self.only or "*")]


class Runner:
    def __init__(self, study: Study) -> None:
        self.study = study
        self.by_name = {cell.name: cell for cell in study.cells}
        self.look()
        self.failed: list[str] = []
        self.told_failed: set[str] = set()
        self.begun, self.begun_at = time.monotonic(), time.time()
        self.unrendered = 0
        self.awaited: list[Path] = []
        """Locks that other processes held when they were last asked for."""

    def run(self) -> int:
        """Run what is missing; 0 if all that was asked for is recorded, 1 if a cell failed or time ran out.

        Ctrl-C stops the running command, which saves its state, renders, and raises `KeyboardInterrupt`.
        """
        try:
            stopped = self.go_through(self.study.wanted)
        finally:
            self.clean()
            self.rendered()
        missing = missing_of(self.study)
        if stopped and missing:
            print(f"== no time left for {first_of(missing, 3)}: the same command goes on")
        if self.failed:
            print(f"== to be run again: {first_of(self.failed, 8, ' ')}")
        return 1 if missing else 0

    def look(self) -> None:
        """See what is recorded by now, by whichever process."""
        self.recorded = recorded_cells(self.study.folder)

    def go_through(self, wanted: Sequence[Cell]) -> bool:
        """Attempt what is missing until all of it is recorded or has failed; whether time ran out before."""
        while True:
            outcomes = []
            self.awaited.clear()
            for number, cell in enumerate(wanted, 1):
                self.look()
                if cell.name in self.recorded:
                    continue
                outcomes.append(self.attempt(cell, f"[{number}/{len(wanted)}] "))
                if outcomes[-1] is Outcome.stopped:
                    return True
            if Outcome.busy not in outcomes:
                return False
            if Outcome.done not in outcomes:
                names = list(dict.fromkeys(lock.stem for lock in self.awaited))
                print(f"== waiting for {first_of(names, 3)}, which other processes run", flush=True)
                while not any(is_free(lock) for lock in self.awaited):
                    if self.too_late(0):  # what the others run may still end in time
                        return True
                    time.sleep(WAIT_SECONDS)

    def attempt(self, cell: Cell, place: str = "") -> Outcome:
        """Run a cell and first whatever it needs and is not there; record it unless it is recorded already."""
        if cell.name in self.failed:
            return Outcome.failed
        for name in cell.needs:
            if self.given(name) or finished(self.run_dir(name)):
                continue
            outcome = self.attempt(self.by_name[name], f"{place}needed by {cell.name}: ")
            if outcome is not Outcome.done:
                if outcome is Outcome.failed:
                    self.failed.append(cell.name)
                    if name not in self.told_failed:
                        print(f"== {cell.name}, and what else needs {name}: not run, since that failed")
                    self.told_failed.add(name)
                return outcome
        if self.too_late():
            return Outcome.stopped
        again = cell.name in self.recorded
        lock = self.study.work / "logs" / f"{cell.name}.lock"
        with alone(lock, wait=False) as mine:
            if not mine:
                self.awaited.append(lock)
                return Outcome.busy
            self.look()
            if cell.name in self.recorded and (not again or finished(self.run_dir(cell.name))):
                return Outcome.done  # by another process, meanwhile
            note = lock.with_suffix(".failed")
            if note.is_file() and note.stat().st_mtime >= self.begun_at:
                self.failed.append(cell.name)
                return Outcome.failed  # likewise
            outcome = self.perform(cell, place, again, self.time_left())
            if outcome is Outcome.failed:
                note.touch()
            return outcome

    def perform(self, cell: Cell, place: str, again: bool, left: float | None) -> Outcome:
        """Run a cell whose needs are there. `again`: it is recorded, but its checkpoint is gone."""
        overrides, extra = self.overrides(cell), ["resume=true"]
        print(f"== {place}{cell.name}{' once more, for its checkpoint' if again else ''}")
        threads = threads_of(cell, self.study.size)
        print(f"   {command_line([*overrides, *extra], threads)}", flush=True)
        began = time.monotonic()
        log = self.study.work / "logs" / f"{cell.name}.log"
        name = cell.name if self.study.several else ""
        outcome = launch([*self.study.program, *overrides, *extra], log, left, name, threads)
        if outcome is Outcome.done:
            try:
                record = build_record(cell, self.run_dir(cell.name), command_line(overrides, threads))
            except (OSError, KeyError, ValueError) as error:
                with log.open("a") as file:
                    file.write(f"{type(error).__name__}: {error}\n")
                outcome = Outcome.failed
            else:
                if again:
                    return self.compare(cell, record)
                self.keep(cell, record, overrides, time.monotonic() - began)
        if outcome is Outcome.failed:
            self.failed.append(cell.name)
            print(f"   failed, see {log}")
            print("".join(f"   | {line}\n" for line in tail(log)), end="")
        return outcome

    def compare(self, cell: Cell, made: Record) -> Outcome:
        """Whether a cell that was run again came out as recorded: else what is built on it would be compared with, and
        paired with, a model that is not its own."""
        kept = next(record for record in load_records(self.study.folder) if record["cell"] == cell.name)
        if all(made.get(figure) == kept.get(figure) for figure in ("curve", "example_scores")):
            return Outcome.done
        shutil.rmtree(self.run_dir(cell.name), ignore_errors=True)
        self.failed.append(cell.name)
        print(
            f"   {cell.name} came out different from its record, as it does on another machine or with other settings: "
            "begin a study of your own with another OUT and WORK"
        )
        return Outcome.failed

    def keep(self, cell: Cell, record: Record, overrides: list[str], seconds: float) -> None:
        append_record(self.study.folder, record)
        self.recorded.add(cell.name)
        self.add_baselines(record, overrides)
        print(f"   {told(record)}{seconds:.0f} s in all", flush=True)
        self.clean()
        self.unrendered += 1
        if self.unrendered >= RENDER_EVERY:
            self.rendered()

    def add_baselines(self, record: Record, overrides: list[str]) -> None:
        task = record["task"]
        if "metric" not in record or task == PRETRAINING or task in load_baselines(self.study.folder):
            return
        try:
            add_baselines(self.study.folder, task, self.study.baselines(overrides))
        except Exception as error:  # the cell itself is fine, and its figures are kept
            print(f"   no baselines of {task}: {type(error).__name__}: {error}")

    def rendered(self) -> None:
        if self.unrendered:
            self.unrendered = 0
            try:
                with alone(self.study.work / "logs" / "render.lock"):  # an older report never replaces a newer one
                    self.study.render(self.study.folder)
            except Exception as error:  # the records are what counts; --render tells in full
                print(f"   not rendered: {type(error).__name__}: {error}")

    def clean(self) -> None:
        """Delete the run directories of recorded cells that no missing cell needs; the pre-trained model stays."""
        if self.study.keep:
            return
        needed = {name for cell in self.study.cells if cell.name not in self.recorded for name in cell.needs}
        for name in self.recorded - needed - {PRETRAINING}:
            shutil.rmtree(self.run_dir(name), ignore_errors=True)

    def overrides(self, cell: Cell) -> list[str]:
        source = self.study.source
        if source is None and PRETRAINING in self.by_name:
            source = str(self.run_dir(PRETRAINING) / "checkpoint")
        tuned = [str(self.run_dir(name) / "checkpoint") for name in cell.needs if name != PRETRAINING]
        reference = tuned[0] if tuned else None
        source = tuned[1] if len(tuned) > 1 else source
        given = overrides_of(cell, self.study.size, str(self.run_dir(cell.name)), source, reference)
        return given + (tiny_overrides(cell) if self.study.tiny else [])

    def given(self, name: str) -> bool:
        return name == PRETRAINING and self.study.source is not None

    def run_dir(self, name: str) -> Path:
        return self.study.work / name

    def time_left(self) -> float | None:
        whole = self.study.seconds_left
        return None if whole is None else whole - (time.monotonic() - self.begun)

    def too_late(self, least: float | None = None) -> bool:
        """Whether less than `least` seconds are left, by default what it takes to begin a cell."""
        left = self.time_left()
        return left is not None and left < (LEAST_SECONDS if least is None else least)


def missing_of(study: Study) -> list[str]:
    """The cells that were asked for and have no record."""
    recorded = recorded_cells(study.folder)
    return [cell.name for cell in study.wanted if cell.name not in recorded]


def told(record: Record) -> str:
    """The primary score and the training time, as far as there are any."""
    score = f"{record['metric']} {record['scores'][record['metric']]:.1f}, " if "metric" in record else ""
    return score + (f"trained {record['train_seconds']:.0f} s, " if record["train_seconds"] else "")


def command_line(overrides: Sequence[str], threads: int | None = None) -> str:
    """What a person types for a cell."""
    before = [] if threads is None else [f"{THREADS}={threads}"]
    return shlex.join([*before, "python", "-m", "pregate.train", *overrides])


def tail(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:] if log.is_file() else []


def launch(
    command: Sequence[str], log: Path, seconds: float | None, name: str = "", threads: int | None = None
) -> Outcome:
    """Run `command` with so many threads, all its output into `log`, its progress to the terminal behind `name`; stop
    it after `seconds`.

    It is stopped with Ctrl-C's signal, so that it saves its state, and killed if it has not ended in time. Its own
    session keeps the terminal's Ctrl-C from reaching it as well, which would count as a second, hard one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ if threads is None else os.environ | {THREADS: str(threads)},
            start_new_session=True,
        )
        asked = threading.Event()
        timer = None
        if seconds is not None:
            timer = threading.Timer(seconds, stop, (process, asked))
            timer.start()
        try:
            follow(process, file, name)
        except KeyboardInterrupt:
            print("   stopping; the state is being saved, press Ctrl-C again to stop at once", flush=True)
            try:
                stop(process, asked)
                follow(process, file, name)
            except KeyboardInterrupt:
                process.kill()
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode == 0:
        return Outcome.done
    return Outcome.stopped if asked.is_set() else Outcome.failed


def follow(process: subprocess.Popen[str], file: Any, name: str) -> None:
    """Copy the output until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        file.write(line)
        file.flush()
        if PROGRESS.match(line):
            print(f"   {name}{' ' if name else ''}{line.rstrip()}", flush=True)
    process.wait()


def stop(process: subprocess.Popen[str], asked: threading.Event) -> None:
    """Ask the command to stop, and see to it that it does."""
    asked.set()
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)

    def kill() -> None:
        with suppress(ProcessLookupError):
            process.kill()

    timer = threading.Timer(GRACE_SECONDS, kill)
    timer.daemon = True
    timer.start()
