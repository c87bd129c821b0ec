"""How far a run has come, as values that files can hold: progress, the optimizer's state and random states.

Knows torch, NumPy and Python's generator; knows nothing about files.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pregate.config import UsageError
from pregate.training.optimizer_and_schedule import has_8bit_state
from pregate.training.sharding import local


@dataclass
class TrainState:
    """How far a run has come. Separate from its configuration, saved with every checkpoint.

    `epoch` counts passes over the training examples (fractional) or over a stream (whole ones), whose `position` is
    that of `tasks.span_corruption`. The token counts leave padding out, `data` is the fingerprint of what was trained
    on, `elapsed_seconds` adds up over resumed runs, `metrics` holds the latest logged values.
    """

    step: int = 0
    epoch: float = 0.0
    sequences: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    position: list[int] = field(default_factory=list)
    data: str = ""
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


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that files hold, tied ones once."""
    kept = model.state_dict().keys()  # which also lets go what was gathered
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept:
            yield name, tensor.detach()


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, float | int]]:
    """The optimizer's state under flat names `{parameter}/{key}`: its tensors, and its plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float | int] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # the code book of 8-bit moments is one tensor for all parameters, and files hold no tensor twice
                place = local(value).data_ptr()  # 0 for one without elements
                shared = place in seen and place != 0
                seen.add(place)
                tensors[f"{name}/{key}"] = value.detach().clone() if shared else value.detach().contiguous()
            elif value is not None:
                numbers[f"{name}/{key}"] = value
    return tensors, numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], numbers: dict[str, float | int]
) -> None:
    """The inverse of `optimizer_state`. Raises `UsageError` if the state is that of another kind of optimizer."""
    parameters = dict(model.named_parameters())
    keys = {flat.rpartition("/")[2] for flat in (*tensors, *numbers)}
    kinds = {"exp_avg": isinstance(optimizer, torch.optim.AdamW), "state1": has_8bit_state(optimizer)}
    if keys and any((key in keys) != is_kind for key, is_kind in kinds.items()):
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
