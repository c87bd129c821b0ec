"""The settings of the conventional model that everything begins with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pregate.config.validators import need

SIZES = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "num_experts", "expert_capacity")
"""Those parts of a geometry of which there must be at least one."""


@dataclass
class ModelConfig:
    """Where the conventional model comes from: `source` (directory or hub id), or `geometry` trained from scratch.

    `family`: the `model_type` of a model of that geometry; a source says its own.
    """

    name: str = "switch-base-8"
    family: str = "switch_transformers"
    source: str | None = None
    revision: str | None = None
    geometry: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None

    def check(self, prefix: str) -> None:
        for key, value in self.geometry.items():
            whole = isinstance(value, int) and key in SIZES
            need(not whole or value > 0, f"{prefix}geometry.{key}={value} must be at least 1.")
            rate = isinstance(value, int | float) and key == "dropout_rate"
            need(not rate or 0 <= value <= 1, f"{prefix}geometry.{key}={value} must lie between 0 and 1.")
