"""An MoE checkpoint as an upstream model, whose routers can be exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pregate.system.console import silent_bars


def open_moe(directory: Path) -> Any:
    """In float32 and in evaluation mode."""
    with silent_bars():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
