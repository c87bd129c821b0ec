"""Whether the disk has room for what a run writes, before it writes.

Knows sizes and free bytes; a damaged state and the one before the newest may give way.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pregate.config import UsageError
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import say
from pregate.system.durable import free_bytes, num_bytes, remove
from pregate.training.optimizer_and_schedule import optimizer_bytes
from pregate.training.run_dir_lock import CHECKPOINT, LAST
from pregate.training.saved_state import damaged_states, earlier_states
from pregate.training.state_values import tensors_of
from pregate.training.weights_without_experts import lacks_experts, learnt


def model_bytes(model: nn.Module) -> int:
    """The size of the weights of `model` in files, of all processes together; tied ones once."""
    return sum(tensor.nbytes for _, tensor in tensors_of(model))


def saved_bytes(model: nn.Module) -> int:
    """The size of the weights that a saved state holds: without experts that are elsewhere, what learns."""
    if lacks_experts(model):
        return sum(tensor.nbytes for tensor in learnt(model).values())
    return model_bytes(model)


def check_space(
    out_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, saves: int, checkpoint: int | None = None
) -> None:
    """Refuse, before its first step, a run that will save `saves` times more and finds no room for that.

    It needs room for a checkpoint and two states, as the newest stays while another is written. `checkpoint`: its size,
    where that is not the size of the weights in a state. Raises `UsageError`.
    """
    weights, last = saved_bytes(model), out_dir / LAST
    state = weights + optimizer_bytes(optimizer)
    held = sum(map(num_bytes, (last, *earlier_states(last), *damaged_states(last), out_dir / CHECKPOINT)))
    checkpoint = weights if checkpoint is None else checkpoint
    needed = checkpoint + state * (2 if saves > 1 or last.exists() else 1) - held
    free = free_bytes(out_dir)
    if saves > 0 and needed > free:
        raise UsageError(
            f"Training writes {human_bytes(needed)} to {out_dir} (states of {human_bytes(state)} to resume from and a "
            f"checkpoint of {human_bytes(checkpoint)}), which has {human_bytes(free)} free: make room, or choose a "
            "run_dir=DIR on another disk."
        )


def make_room(directory: Path, needed: int) -> None:
    """Let damaged states and those before that in `directory` go, the oldest first, if the disk has no room for
    `needed` bytes.

    Raises `UsageError` if there is too little even so.
    """
    for spare in (*reversed(damaged_states(directory)), *reversed(earlier_states(directory))):
        if free_bytes(directory) < needed and directory.exists():
            say(f"the disk is nearly full: {spare} is removed to make room, {directory} stays.")
            remove(spare)
    free = free_bytes(directory)
    if free < needed:
        raise UsageError(
            f"Saving to {directory.parent} needs {human_bytes(needed)} and {human_bytes(free)} are free: make room, "
            "and go on from the last saved state with the same command and resume=true."
        )
