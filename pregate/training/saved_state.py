"""The saved state of a run: a model directory with optimizer, random states and `TrainState`, and how it comes back.

Tensors go to safetensors and scalars to JSON, so opening a state never runs code from it. A saved state knows the
checksums of its files, and the state before it stays beside it. Knows nothing about the loop that calls it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from pregate.config import UsageError
from pregate.system.console import say, silent_bars
from pregate.system.durable import digest_file, flush_file, remove
from pregate.training.durable_directories import recover, replaced, write_model
from pregate.training.lora import load_weights
from pregate.training.state_values import TrainState, load_optimizer_state, optimizer_state
from pregate.training.weights_without_experts import LEARNT, lacks_experts, load_learnt

STATE_FILE = "train_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKSUMS_FILE = "checksums.json"
FORMAT = 2
"""Of `STATE_FILE`; the first named no format and had no checksums beside it."""
PREVIOUS = "previous"
"""The state before the newest one, beside it; `previous_2` is the one before that, and so on."""
Value = TypeVar("Value")
DAMAGED = "damaged"
"""Where a newest state goes that is not as it was saved, `damaged_2` the one before it; the next save removes them."""


def save_last(
    directory: Path,
    model: Any,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    random_states: Sequence[dict[str, Any]],
    carry: Sequence[Path] = (),
    keep: int = 2,
) -> None:
    """Replace `directory` by everything `load_last` needs; `random_states` has one entry a process.

    What lay there becomes the previous state, and so on, until there are `keep` states.
    """
    tensors, numbers = optimizer_state(optimizer, model)
    with replaced(directory, earlier := places_before(directory, keep)) as fresh:
        write_model(fresh, model, tokenizer, carry)
        save_file(tensors, fresh / OPTIMIZER_FILE)
        write_record(fresh, state, numbers, random_states)
        write_checksums(fresh, {path.name: checksum(path) for path in fresh.iterdir()})
    clear_superseded(directory, earlier)


def write_record(
    directory: Path,
    state: TrainState,
    numbers: dict[str, Any],
    random_states: Sequence[dict[str, Any]],
    **more: Any,
) -> None:
    """The scalars of a state: how far the run is, `numbers` of the optimizer, and the random states."""
    record = {"format": FORMAT, **more, "state": asdict(state), "optimizer": numbers, "random": list(random_states)}
    (directory / STATE_FILE).write_text(json.dumps(record))


def write_checksums(directory: Path, sums: dict[str, str]) -> None:
    (directory / CHECKSUMS_FILE).write_text(json.dumps({"xxh3_64": dict(sorted(sums.items()))}, indent=2))


def places_before(directory: Path, keep: int) -> list[Path]:
    """Where the states before the newest one in `directory` go, the latest first, if there are to be `keep` in all."""
    return [_numbered(directory, PREVIOUS, number) for number in range(1, keep)]


def clear_superseded(directory: Path, earlier: Sequence[Path]) -> None:
    """After a save: remove what is damaged, and earlier states in other places than `earlier`."""
    for place in (*damaged_states(directory), *(place for place in earlier_states(directory) if place not in earlier)):
        remove(place)


def _numbered(directory: Path, name: str, number: int) -> Path:
    return directory.with_name(name if number == 1 else f"{name}_{number}")


def _lying_beside(directory: Path, name: str) -> list[Path]:
    found = {path.name for path in directory.parent.glob(f"{name}*")}
    numbers = {int(rest) for other in found if (rest := other.removeprefix(f"{name}_")).isdecimal()}
    places = [_numbered(directory, name, number) for number in sorted({1, *numbers})]
    return [place for place in places if place.name in found]


def earlier_states(directory: Path) -> list[Path]:
    """The states before the newest one in `directory`, the latest first."""
    return _lying_beside(directory, PREVIOUS)


def damaged_states(directory: Path) -> list[Path]:
    return _lying_beside(directory, DAMAGED)


def checksum(path: Path) -> str:
    """XXH3-64 of a file, in hexadecimal digits."""
    digest = xxhash.xxh3_64()
    digest_file(digest, path)
    return digest.hexdigest()


def damage(directory: Path) -> str | None:
    """What is wrong with the saved state in `directory`, in words that name the file; None if nothing is.

    A state of the first format has no checksums. Its files must only be there and open.
    """
    name = STATE_FILE
    try:
        record = record_of(directory)
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


def record_of(directory: Path) -> dict[str, Any]:
    """What `STATE_FILE` holds. Raises one of several errors if that is not what was once written there."""
    record = json.loads((directory / STATE_FILE).read_text())
    TrainState(**record["state"])
    return {"optimizer": record["optimizer"], "random": record["random"], **record}


def settle(directory: Path) -> None:
    """Put the newest whole state into `directory`, if one was ever saved.

    Where it is damaged, the latest whole state before it takes its place and a notice says so: training repeats some
    steps, which is better than ending, and what is damaged stays beside until the next is saved. Raises `UsageError`
    where no state is whole: training would start at step 0 and replace what can perhaps be mended.
    """
    recover(directory)
    # without the newest, a replacement was cut between its renames
    states = [place for place in (directory, *earlier_states(directory)) if place.exists()]
    wrong: list[str] = []
    while len(wrong) < len(states) and (found := damage(states[len(wrong)])):
        wrong.append(found)
    if states and len(wrong) == len(states):
        before = ", ".join(map(str, states[1:])) or str(directory.with_name(PREVIOUS))
        raise UsageError(
            f"{wrong[0]} and there is no whole state before it in {before}: put the file back from a copy, or choose "
            "another run_dir=DIR to start anew."
        )
    if wrong:
        for place in damaged_states(directory):
            remove(place)
    aside = [_numbered(directory, DAMAGED, number) for number in range(1, len(wrong) + 1)]
    for place, there in zip(states, aside, strict=False):
        place.rename(there)
    if states and states[len(wrong)] != directory:
        states[len(wrong)].rename(directory)
        flush_file(directory.parent)
    if wrong:
        say(
            f"{'; '.join(wrong)}: going on from the state before it, that of step {steps_done(directory)} (what is "
            f"damaged lies in {', '.join(map(str, aside))} until the next is saved)."
        )


def load_last(
    directory: Path, model: Any, optimizer: torch.optim.Optimizer
) -> tuple[TrainState, list[dict[str, Any]]] | None:
    """Restore `model` and `optimizer` in place; return the state and the random states, or None if nothing is there.

    `settle` has looked for damage. Raises `UsageError` if what is there belongs to another model or optimizer.
    """
    if not directory.exists():
        return None
    record = record_of(directory)
    if lacks_experts(model):
        load_learnt(directory, model)
    else:
        _load_whole(directory, model)
    load_optimizer_state(optimizer, model, load_file(directory / OPTIMIZER_FILE), record["optimizer"])
    return TrainState(**record["state"]), record["random"]


def _load_whole(directory: Path, model: Any) -> None:
    if (directory / LEARNT).exists():
        raise UsageError(
            f"{directory} holds a run with train.experts=offloaded: resume with that, or choose another run_dir."
        )
    with silent_bars():
        loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
    saved = loaded.state_dict()
    del loaded
    if info["missing_keys"] or not load_weights(model, saved, directory):
        raise other_model(directory)


def _of_latest(directory: Path, read: Callable[[dict[str, Any]], Value]) -> Value | None:
    """What `read` gives for the record of the newest state, in `directory` or beside it, of which that can be read."""
    for place in (directory, *earlier_states(directory)):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return read(record_of(place))
    return None


def data_of(directory: Path) -> str:
    """The fingerprint of the training examples of what `save_last` left in `directory`; empty if that is unknown."""
    return _of_latest(directory, lambda record: str(record["state"]["data"])) or ""


def processes_of(directory: Path) -> int | None:
    """How many processes trained what `save_last` left in `directory`; None if that cannot be told."""
    return _of_latest(directory, lambda record: len(record["random"]))


def other_model(directory: Path | str) -> UsageError:
    return UsageError(
        f"{directory} holds a run of a different model: resume with the settings it was started with, or choose "
        "another run_dir."
    )


def steps_done(directory: Path) -> int:
    """How many steps the run that `save_last` left in `directory` had taken; 0 if there is none.

    Raises `UsageError` if that cannot be told.
    """
    done = _of_latest(directory, lambda record: int(record["state"]["step"]))
    if done is None and directory.exists():
        raise UsageError(
            f"{directory / STATE_FILE} is missing or cannot be read: put it back from a copy, or choose another "
            "run_dir=DIR to start anew."
        )
    return done or 0
