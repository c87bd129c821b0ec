"""Model directories that appear whole or not at all, also where the power fails.

Knows files and how a directory takes the place of another; knows nothing about the state of a run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pregate.config import UsageError
from pregate.system.console import silent_bars
from pregate.system.durable import flush_file, flush_tree, make_directory, read_object, refusal, remove, write_json
from pregate.training.lora import is_adapted, merged_state, plain_state, save_adapters
from pregate.training.weights_without_experts import lacks_experts, write_learnt

STEP_FILE = "train_step.json"
"""In a model that training keeps: the step that it is of. The state to resume from may be of an earlier one."""


@contextmanager
def replaced(directory: Path, earlier: Sequence[Path] = ()) -> Iterator[Path]:
    """Give an empty directory to fill; on success it takes the place of `directory`, on failure nothing changes.

    The old directory stays until the new one is on the disk, and moves to the first place of `earlier` if there is one,
    what lies there to the next, and so on. A process killed between the renames leaves the old one beside, where
    `recover` or `settle` finds it. Raises `UsageError` if the disk takes no more.
    """
    fresh, old = _beside(directory, "new"), _beside(directory, "old")
    recover(directory)
    try:
        make_directory(directory.parent)
        fresh.mkdir()
        yield fresh
        flush_tree(fresh)
    except BaseException as error:
        remove(fresh)
        reason = refusal(error)
        if reason is None:
            raise
        raise UsageError(
            f"{directory} cannot be written ({reason}), and what lay there is kept: make room or mend the disk, and "
            "go on with the same command and resume=true."
        ) from error
    if directory.exists():
        _move_on([directory, *(earlier or [old])])
    fresh.rename(directory)
    flush_file(directory.parent)
    if not earlier:
        remove(old)


def _move_on(places: Sequence[Path]) -> None:
    """Move what lies in each place to the next, as far as the first empty one; the last loses what it holds."""
    end = next((number for number, place in enumerate(places) if not place.exists()), len(places) - 1)
    remove(places[end])
    for number in range(end, 0, -1):
        places[number - 1].rename(places[number])


def recover(directory: Path) -> None:
    """Undo a replacement of `directory` that was killed half-way."""
    remove(_beside(directory, "new"))
    previous = _beside(directory, "old")
    if previous.exists():
        if directory.exists():
            remove(previous)
        else:
            previous.rename(directory)
            flush_file(directory.parent)


def _beside(directory: Path, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{what}")


def place_to_fill(directory: Path) -> Path:
    """The directory that `replaced` gives for `directory`."""
    return _beside(directory, "new")


def save_model(
    directory: Path, model: Any, tokenizer: Any, carry: Sequence[Path] = (), step: int | None = None
) -> None:
    """Replace `directory` by a Hugging Face directory with model, tokenizer and copies of the files in `carry`, and the
    `step` that the model is of. What adapters add is part of its weights."""
    with replaced(directory) as fresh:
        write_model(fresh, model, tokenizer, carry, merged=True)
        write_step(fresh, step)


def write_step(directory: Path, step: int | None) -> None:
    if step is not None:
        write_json(directory / STEP_FILE, {"step": step})


def step_of(directory: Path) -> int | None:
    """The step that the model in `directory` is of; None if that is unknown."""
    return (read_object(directory / STEP_FILE) or {}).get("step")


def write_model(directory: Path, model: Any, tokenizer: Any, carry: Sequence[Path] = (), merged: bool = False) -> None:
    """Of a model whose experts are elsewhere only what it has learnt. `merged`: what adapters add is part of the
    weights; else adapters have a file of their own."""
    if lacks_experts(model):
        write_learnt(directory, model)
        return
    options: dict[str, Any] = {}
    if is_adapted(model):
        options["state_dict"] = merged_state(model) if merged else plain_state(model)
        if not merged:
            save_adapters(model, directory)
    with silent_bars():
        model.save_pretrained(directory, **options)
    write_side_files(directory, tokenizer, carry)


def write_side_files(directory: Path, tokenizer: Any, carry: Sequence[Path]) -> None:
    tokenizer.save_pretrained(directory)
    for path in carry:
        shutil.copy2(path, directory / path.name)
