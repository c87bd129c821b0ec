"""The saved state of a run: a model directory with optimizer, random states and `TrainState`, and how it comes back.

Tensors go to safetensors and scalars to JSON, so opening a state never runs code from it. A saved state knows the
checksums of its files, and the state before it stays beside it. Knows nothing about the loop that calls it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pregate.config import UsageError
from pregate.system.console import say, silent_bars
from pregate.system.durable import flush_file, remove
from pregate.training.durable_directories import recover, replaced, write_model
from pregate.training.lora import load_weights
from pregate.training.state import TrainState, load_optimizer_state, optimizer_state

STATE_FILE = "train_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKSUMS_FILE = "checksums.json"
FORMAT = 2
"""Of `STATE_FILE`; the first named no format and had no checksums beside it."""
PREVIOUS = "previous"
"""The state before the newest one, beside it."""
DAMAGED = "damaged"
"""Where a newest state goes that is not as it was saved; the next one that is saved removes it."""


def save_last(
    directory: Path,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    random_states: Sequence[dict[str, Any]],
    carry: Sequence[Path] = (),
) -> None:
    """Replace `directory` by everything `load_last` needs; `random_states` has one entry a process.

    What lay there becomes the previous state.
    """
    tensors, numbers = optimizer_state(optimizer, model)
    with replaced(directory, directory.with_name(PREVIOUS)) as fresh:
        write_model(fresh, model, tokenizer, carry)
        save_file(tensors, fresh / OPTIMIZER_FILE)
        record = {"format": FORMAT, "state": asdict(state), "optimizer": numbers, "random": list(random_states)}
        (fresh / STATE_FILE).write_text(json.dumps(record))
        sums = {path.name: checksum(path) for path in sorted(fresh.iterdir())}
        (fresh / CHECKSUMS_FILE).write_text(json.dumps({"xxh3_64": sums}, indent=2))
    remove(directory.with_name(DAMAGED))


def checksum(path: Path) -> str:
    """XXH3-64 of a file, in hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def damage(directory: Path) -> str | None:
    """What is wrong with the saved state in `directory`, in words that name the file; None if nothing is.

    A state of the first format has no checksums. Its files must only be there and open.
    """
    name = STATE_FILE
    try:
        record = _read_record(directory)
        if record.get("format", 1) == 1 and not (directory / CHECKSUMS_FILE).exists():
            for name in sorted({OPTIMIZER_FILE, *(path.name for path in directory.glob("*.safetensors"))}):
                with safe_open(directory / name, "pt"):
                    pass
            return None
        name = CHECKSUMS_FILE
        sums = json.loads((directory / name).read_text())["xxh3_64"]
        for name, saved in {STATE_FILE: sums[STATE_FILE], **sums}.items():
            if checksum(directory / name) != saved:
                return f"{directory / name} is not as it was saved"
    except FileNotFoundError:
        return f"{directory / name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return f"{directory / name} cannot be read"
    return None


def _read_record(directory: Path) -> dict[str, Any]:
    """What `STATE_FILE` holds. Raises one of several errors if that is not what was once written there."""
    record = json.loads((directory / STATE_FILE).read_text())
    TrainState(**record["state"])
    return {"optimizer": record["optimizer"], "random": record["random"], **record}


def settle(directory: Path) -> None:
    """Put the newest whole state into `directory`, if one was ever saved.

    Where it is damaged, the state before it takes its place and a notice says so: training repeats some steps, which is
    better than ending, and the damaged one stays beside until the next is saved. Raises `UsageError` where no state is
    whole: training would start at step 0 and replace what can perhaps be mended.
    """
    recover(directory)
    previous, aside = directory.with_name(PREVIOUS), directory.with_name(DAMAGED)
    if not directory.exists():
        if not previous.exists():
            return
        previous.rename(directory)  # a replacement was cut between its two renames
        flush_file(directory.parent)
    wrong = damage(directory)
    if wrong is None:
        return
    if not previous.exists() or damage(previous):
        raise UsageError(
            f"{wrong} and there is no whole state before it in {previous}: put the file back from a copy, or choose "
            "another run_dir=DIR to start anew."
        )
    remove(aside)
    directory.rename(aside)
    previous.rename(directory)
    flush_file(directory.parent)
    say(
        f"{wrong}: going on from the state before it, that of step {steps_done(directory)} (the damaged one lies in "
        f"{aside} until the next is saved)."
    )


def load_last(
    directory: Path, model: Any, optimizer: torch.optim.Optimizer
) -> tuple[TrainState, list[dict[str, Any]]] | None:
    """Restore `model` and `optimizer` in place; return the state and the random states, or None if nothing is there.

    `settle` has looked for damage. Raises `UsageError` if what is there belongs to another model or optimizer.
    """
    if not directory.exists():
        return None
    record = _read_record(directory)
    with silent_bars():
        loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    saved = loaded.state_dict()
    del loaded
    if info["missing_keys"] or not load_weights(model, saved, directory):
        raise UsageError(
            f"{directory} holds a run of a different model: resume with the settings it was started with, "
            "or choose another run_dir."
        )
    load_optimizer_state(optimizer, model, load_file(directory / OPTIMIZER_FILE), record["optimizer"])
    return TrainState(**record["state"]), record["random"]


def steps_done(directory: Path) -> int:
    """How many steps the run that `save_last` left in `directory` had taken; 0 if there is none.

    Raises `UsageError` if that cannot be told.
    """
    for place in (directory, directory.with_name(PREVIOUS)):
        try:
            return int(_read_record(place)["state"]["step"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    if directory.exists():
        raise UsageError(
            f"{directory / STATE_FILE} is missing or cannot be read: put it back from a copy, or choose another "
            "run_dir=DIR to start anew."
        )
    return 0
