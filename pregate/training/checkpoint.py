"""What a training run leaves on disk and how it comes back: model directories, optimizer, random states, `TrainState`.

Knows files; knows nothing about the loop that calls it. Tensors go to safetensors and scalars to JSON, so opening
a checkpoint never runs code from it. A directory appears whole or not at all.
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pregate.config import UsageError
from pregate.runtime import silent_bars

STATE_FILE = "train_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"


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
def replaced(directory: Path) -> Iterator[Path]:
    """Give an empty directory to fill; on success it takes the place of `directory`, on failure nothing changes.

    A process killed between the two renames leaves the previous directory beside, where `recover` finds it.
    """
    fresh, previous = _beside(directory, "new"), _beside(directory, "old")
    recover(directory)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if directory.exists():
        directory.rename(previous)
    fresh.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def recover(directory: Path) -> None:
    """Undo a replacement of `directory` that was killed half-way."""
    previous = _beside(directory, "old")
    if previous.exists():
        if directory.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(directory)


def _beside(directory: Path, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{what}")


def save_model(directory: Path, model: Any, tokenizer: Any, carry: Sequence[Path] = ()) -> None:
    """Replace `directory` by a Hugging Face directory with model, tokenizer and copies of the files in `carry`."""
    with replaced(directory) as fresh:
        _write_model(fresh, model, tokenizer, carry)


def _write_model(directory: Path, model: Any, tokenizer: Any, carry: Sequence[Path]) -> None:
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
    """Replace `directory` by everything `load_last` needs; `random_states` has one entry a process."""
    tensors, numbers = optimizer_state(optimizer, model)
    with replaced(directory) as fresh:
        _write_model(fresh, model, tokenizer, carry)
        save_file(tensors, fresh / OPTIMIZER_FILE)
        record = {"state": asdict(state), "optimizer": numbers, "random": list(random_states)}
        (fresh / STATE_FILE).write_text(json.dumps(record))


def load_last(
    directory: Path, model: Any, optimizer: torch.optim.Optimizer
) -> tuple[TrainState, list[dict[str, Any]]] | None:
    """Restore `model` and `optimizer` in place; return the state and the random states, or None if nothing is there.

    Raises `UsageError` if what is there belongs to another model or optimizer.
    """
    recover(directory)
    if not (directory / STATE_FILE).is_file():
        return None
    record = json.loads((directory / STATE_FILE).read_text())
    with silent_bars():
        saved = type(model).from_pretrained(directory).state_dict()
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in model.state_dict().items()}:
        raise UsageError(
            f"{directory} holds a run of a different model: resume with the settings it was started with, "
            "or choose another run_dir."
        )
    model.load_state_dict(saved)
    load_optimizer_state(optimizer, model, load_file(directory / OPTIMIZER_FILE), record["optimizer"])
    return TrainState(**record["state"]), record["random"]


def steps_done(directory: Path) -> int:
    """How many steps the run that `save_last` left in `directory` had taken; 0 if there is none."""
    path = directory / STATE_FILE
    return int(json.loads(path.read_text())["state"]["step"]) if path.is_file() else 0


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
