"""The states of all tokens between two layers, in files: so they need no memory, and a killed calibration goes on.

A step ends with a folder that holds what the next one needs; only then the folder of the step before goes. Knows files
and steps; knows nothing about models.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pregate.config import UsageError
from pregate.system.console import say
from pregate.system.directory_lock import try_lock
from pregate.system.durable import (
    LOCK,
    flush_file,
    flush_tree,
    make_directory,
    read_object,
    refusal,
    remove,
    to_jsonable,
    write_json,
)

MADE_FROM, PROGRESS = "made_from.json", "progress.pt"
STEP = re.compile(r"step-(\d+)")


class WorkDir:
    """The work directory `folder`; taken up again if what is there was begun for the same `made_from`.

    num_done: how many steps are finished. progress: what the last of them left. batch_size: that of the first step, or
    what is given now: files are by batch. Raises `UsageError` where another process works in it.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], batch_size: int) -> None:
        self._folder = folder
        make_directory(folder)
        self._lock = (folder / LOCK).open("w")
        if not try_lock(self._lock.fileno()):
            self._lock.close()
            raise UsageError(f"Another process calibrates in {folder}: wait for it, or choose another output.")
        begun = read_object(folder / MADE_FROM)
        if begun is None:
            self._clear()
        elif begun != to_jsonable(made_from):
            self._begin_anew("other weights, examples or settings")
        elif self._kept_batch_size() > batch_size:
            self._begin_anew("batches that are too large for the memory that is given now")
        write_json(folder / MADE_FROM, made_from)
        self.num_done = max(self._steps(), default=0)
        self.progress: dict[str, Any] = {}
        for path in folder.iterdir():
            if path.name.startswith("step-") and path != self._step(self.num_done):
                remove(path)
        if self.num_done:
            self.progress = torch.load(self._step(self.num_done) / PROGRESS)
            batch_size = self.progress["batch_size"]
            say(f"the calibration in {folder} goes on after step {self.num_done}.")
        self.batch_size = batch_size
        self._begin()

    def _begin_anew(self, other: str) -> None:
        say(f"{self._folder} was begun with {other}: it is removed, and begins anew.")
        self._clear()

    def _kept_batch_size(self) -> int:
        """That of the finished steps, 0 if there are none."""
        last = max(self._steps(), default=0)
        return torch.load(self._step(last) / PROGRESS)["batch_size"] if last else 0

    def load(self, name: str, device: torch.device) -> Any:
        """What the last step saved under `name`; None if it saved nothing."""
        path = self._step(self.num_done) / f"{name}.pt"
        return torch.load(path, map_location=device) if path.is_file() else None

    def save(self, name: str, value: Any) -> None:
        """For the next step. Raises `UsageError` for a full disk."""
        try:
            torch.save(value, self._next / f"{name}.pt")
        except (OSError, RuntimeError) as error:
            if refusal(error) is None and "PytorchStreamWriter" not in str(error):
                raise
            raise UsageError(f"{self._next} cannot be written ({error}): make room on its disk.") from error

    def kept(self, name: str, default: Any) -> Any:
        """What `keep` was last told under `name`; it belongs to no step."""
        path = self._folder / f"{name}.pt"
        return torch.load(path) if path.is_file() else default

    def keep(self, name: str, value: Any) -> None:
        scratch = self._folder / f"{name}.tmp"
        torch.save(value, scratch)
        flush_file(scratch)
        scratch.replace(self._folder / f"{name}.pt")
        flush_file(self._folder)

    def finish_step(self, progress: dict[str, Any]) -> None:
        """What was saved is what the next step loads; from here on a killed calibration is taken up."""
        self.progress = {**progress, "batch_size": self.batch_size}
        torch.save(self.progress, self._next / PROGRESS)
        flush_tree(self._next)
        before = self._step(self.num_done)
        self._next.rename(self._step(self.num_done + 1))
        flush_file(self._folder)
        self.num_done += 1
        remove(before)
        self._begin()

    def close(self) -> None:
        """Leave it as it is, for another attempt; remove it if there is nothing to go on from."""
        if self.going_on() is None:
            remove(self._folder)
        self._lock.close()

    def going_on(self) -> str | None:
        """How an interrupted calibration goes on, in a sentence; None where nothing is done."""
        if not self.num_done and not any(self._folder.glob("*.pt")):
            return None
        return f"the calibration in {self._folder} goes on with the same command (a training also needs resume=true)."

    def _begin(self) -> None:
        self._next = self._folder / f"step-{self.num_done + 1}.part"
        self._next.mkdir()

    def _step(self, number: int) -> Path:
        return self._folder / f"step-{number}"

    def _steps(self) -> list[int]:
        return [int(found[1]) for path in self._folder.iterdir() if (found := STEP.fullmatch(path.name))]

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            if path.name != LOCK:
                remove(path)
