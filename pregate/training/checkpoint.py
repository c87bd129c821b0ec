"""What a training run leaves on disk and how it comes back: model directories, optimizer, random states, `TrainState`.

Knows files; knows nothing about the loop that calls it. Tensors go to safetensors and scalars to JSON, so opening
a checkpoint never runs code from it. A directory appears whole or not at all, also where the power fails. A saved state
knows the checksums of its files, and the state before it stays beside it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pregate.config import UsageError
from pregate.system.console import say, silent_bars
from pregate.system.durable import flush_file, flush_tree, free_bytes, make_directory, num_bytes, refusal, remove
from pregate.system.sizes import human_bytes
from pregate.training.optim import optimizer_bytes

STATE_FILE = "train_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKSUMS_FILE = "checksums.json"
FORMAT = 2
"""Of `STATE_FILE`; the first named no format and had no checksums beside it."""
PREVIOUS = "previous"
"""The state before the newest one, beside it."""
DAMAGED = "damaged"
"""Where a newest state goes that is not as it was saved; the next one that is saved removes it."""


@dataclass
class TrainState:
    """How far a run has come. Separate from its configuration, saved with every checkpoint.

    `epoch` counts passes over the training examples (fractional) or over a stream (whole ones), whose `position` is
    that of `tasks.span_corruption`. The token counts leave padding out,
    `elapsed_seconds` adds up over resumed runs, `metrics` holds the latest logged values.
    """

    step: int = 0
    epoch: float = 0.0
    sequences: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    position: list[int] = field(default_factory=list)
    best_score: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    elapsed_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)

    def improves(self, score: float, loss: float, lower: bool = False) -> bool:
        """Whether `score` is a new best, the highest or the lowest; if equal, with a lower validation loss."""
        if self.best_score is None or (score < self.best_score if lower else score > self.best_score):
            return True
        return score == self.best_score and (self.best_loss is None or loss < self.best_loss)


@contextmanager
def replaced(directory: Path, previous: Path | None = None) -> Iterator[Path]:
    """Give an empty directory to fill; on success it takes the place of `directory`, on failure nothing changes.

    The old directory stays until the new one is on the disk, and becomes `previous` if that is given. A process killed
    between the two renames leaves the old one beside, where `recover` or `settle` finds it. Raises `UsageError` if the
    disk takes no more.
    """
    fresh, old = _beside(directory, "new"), previous or _beside(directory, "old")
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
        remove(old)
        directory.rename(old)
    fresh.rename(directory)
    flush_file(directory.parent)
    if previous is None:
        remove(old)


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


def save_model(directory: Path, model: Any, tokenizer: Any, carry: Sequence[Path] = ()) -> None:
    """Replace `directory` by a Hugging Face directory with model, tokenizer and copies of the files in `carry`."""
    with replaced(directory) as fresh:
        write_model(fresh, model, tokenizer, carry)


def write_model(directory: Path, model: Any, tokenizer: Any, carry: Sequence[Path] = ()) -> None:
    with silent_bars():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in carry:
        shutil.copy2(path, directory / path.name)


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

    A state of the first format has no checksums: of it, it is asked only whether its files can be opened.
    """
    name = STATE_FILE
    try:
        record = _read_record(directory)
        if record.get("format", 1) == 1 and not (directory / CHECKSUMS_FILE).exists():
            for path in directory.glob("*.safetensors"):
                name = path.name
                with safe_open(path, "pt"):
                    pass
            return None if (directory / (name := OPTIMIZER_FILE)).is_file() else f"{directory / name} is missing"
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
    """See to it that the newest state lies in `directory` whole, if one was ever saved.

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
    same = {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in model.state_dict().items()}
    if not same or info["missing_keys"]:
        raise UsageError(
            f"{directory} holds a run of a different model: resume with the settings it was started with, "
            "or choose another run_dir."
        )
    model.load_state_dict(saved)
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


def model_bytes(model: nn.Module) -> int:
    """The size of the weights of `model` in a file, tied ones once."""
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


def check_space(out_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saves: int) -> None:
    """Refuse, before its first step, a run that will save `saves` times more and finds no room for that.

    It needs room for a checkpoint and two states, as the newest stays while another is written. Raises `UsageError`.
    """
    weights, last = model_bytes(model), out_dir / "last"
    state = weights + optimizer_bytes(optimizer)
    held = sum(num_bytes(out_dir / name) for name in ("last", PREVIOUS, DAMAGED, "checkpoint"))
    needed = weights + state * (2 if saves > 1 or last.exists() else 1) - held
    free = free_bytes(out_dir)
    if saves > 0 and needed > free:
        raise UsageError(
            f"Training writes {human_bytes(needed)} to {out_dir} (states of {human_bytes(state)} to resume from and a "
            f"checkpoint of {human_bytes(weights)}), which has {human_bytes(free)} free: make room, or choose a "
            "run_dir=DIR on another disk."
        )


def make_room(directory: Path, needed: int) -> None:
    """Let a damaged state and the one before that in `directory` go if the disk has no room for `needed` bytes.

    Raises `UsageError` if there is too little even so.
    """
    for spare in (directory.with_name(DAMAGED), directory.with_name(PREVIOUS)):
        if free_bytes(directory) < needed and directory.exists() and spare.exists():
            say(f"the disk is nearly full: {spare} is removed to make room, {directory} stays.")
            remove(spare)
    free = free_bytes(directory)
    if free < needed:
        raise UsageError(
            f"Saving to {directory.parent} needs {human_bytes(needed)} and {human_bytes(free)} are free: make room, "
            "and go on from the last saved state with the same command and resume=true."
        )


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, float | int]]:
    """The optimizer's state under flat names `{parameter}/{key}`: its tensors, and its plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float | int] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach().contiguous()
            elif value is not None:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], numbers: dict[str, float | int]
) -> None:
    """The inverse of `optimizer_state`. Raises `UsageError` if the state is that of another kind of optimizer."""
    parameters = dict(model.named_parameters())
    keys = {flat.rpartition("/")[2] for flat in (*tensors, *numbers)}
    if keys and ("exp_avg" in keys) != isinstance(optimizer, torch.optim.AdamW):
        raise UsageError(
            f"The run to resume was not trained with {type(optimizer).__name__}: "
            "set train.optimizer as it was, or start anew in another run_dir."
        )
    optimizer.state.clear()
    for flat, value in {**tensors, **numbers}.items():
        name, _, key = flat.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device) if isinstance(value, Tensor) else value


def random_state() -> dict[str, Any]:
    """The random states of this process (Python, NumPy, torch, the current CUDA device) as JSON-able values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Bring this process back to a state that `random_state` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numpy_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(numpy_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
