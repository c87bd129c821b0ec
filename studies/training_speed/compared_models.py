"""What is compared: the models, which experts implementation of transformers each meets, and the settings of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

BATCH_SEQUENCES = 16
LEARNING_RATE = 3e-4
EAGER, GROUPED = "eager", "grouped_mm"
"""transformers' loop over experts, and its grouped products."""

SWITCH = {
    "d_model": 384,
    "d_kv": 64,
    "d_ff": 1024,
    "num_heads": 6,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "num_sparse_encoder_layers": 3,
    "num_sparse_decoder_layers": 3,
    "expert_capacity": 64,
    "dropout_rate": 0.1,
    "router_jitter_noise": 0.01,
}
OLMOE = {
    "hidden_size": 384,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Case:
    """One line of the table. stock: the experts implementation that transformers runs with."""

    family: str
    num_experts: int
    stock: str
    geometry: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.family}_{self.num_experts}_{self.stock}"

    def cut_to(self, layers: int) -> Case:
        """The same with so many layers a stack, for a quick look."""
        sizes = {key: layers for key in self.geometry if key in ("num_layers", "num_decoder_layers")}
        sizes |= {key: layers // 2 for key in self.geometry if key.startswith("num_sparse_")}
        sizes |= {key: layers for key in self.geometry if key == "num_hidden_layers"}
        return replace(self, geometry={**self.geometry, **sizes})


def cases(device: torch.device) -> list[Case]:
    """The rows for this kind of device. Switch has no choice of an experts implementation upstream."""
    many = (8, 128) if device.type == "cuda" else (8, 64)
    switch = [_case("switch", SWITCH, count, EAGER) for count in many]
    kinds = (EAGER, GROUPED)
    olmoe = [_case("olmoe", OLMOE, count, kind) for count in many for kind in kinds]
    return switch + olmoe


def _case(family: str, geometry: dict[str, Any], num_experts: int, stock: str) -> Case:
    return Case(family, num_experts, stock, {**geometry, "num_experts": num_experts})
