"""What a model has learnt whose experts are elsewhere: its trained parameters alone, as a file of a state.

Knows parameters and safetensors; knows nothing about checkpoints or the loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pregate.config import UsageError

LEARNT = "learnt.safetensors"


def lacks_experts(model: Any) -> bool:
    """Whether `model` computes with experts that are none of its parameters."""
    return not getattr(model, "has_experts", True)


def learnt(model: Any) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def write_learnt(directory: Path, model: Any) -> None:
    save_file({name: tensor.contiguous() for name, tensor in learnt(model).items()}, directory / LEARNT)


@torch.no_grad()
def load_learnt(directory: Path, model: Any) -> None:
    """Put back what `write_learnt` wrote. Raises `UsageError` if that are parameters of another model."""
    mine = learnt(model)
    saved = load_file(directory / LEARNT) if (directory / LEARNT).exists() else {}
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in mine.items()}:
        raise UsageError(
            f"{directory} holds a run of a different model, or one with its experts in memory: resume with the "
            "settings it was started with, or choose another run_dir."
        )
    for name, tensor in mine.items():
        tensor.copy_(saved[name])
