"""Sparse upcycling (Komatsuzaki et al. 2023): every expert is a copy of the dense layer, with noise."""

from __future__ import annotations

from typing import Any

import torch

from studies.dense_to_moe.moe import UPCYCLE, Form, empty_moe


def upcycle(dense: Any, form: Form, seed: int = 0) -> Any:
    """The MoE model of `dense` whose experts are copies with noise, in evaluation mode."""
    assert form.kind == UPCYCLE
    model, generator = empty_moe(dense, form), torch.Generator().manual_seed(seed)
    for number, layer in enumerate(dense.model.layers):
        fill_copies(model.model.layers[number].mlp, layer.mlp, form, generator)
    return model


@torch.no_grad()
def fill_copies(block: Any, layer: Any, form: Form, generator: torch.Generator) -> None:
    """Make every expert of `block` a copy of the dense `layer` with noise, and the gate small and random."""
    gate_FD, up_FD, down_DF = (getattr(layer, f"{name}_proj").weight for name in ("gate", "up", "down"))
    for expert in range(form.experts):
        noisy = [
            weight + form.noise * weight.std() * torch.randn(weight.shape, generator=generator)
            for weight in (gate_FD, up_FD, down_DF)
        ]
        block.experts.gate_up_proj[expert].copy_(torch.cat(noisy[:2]))
        block.experts.down_proj[expert].copy_(noisy[2])
    shape = block.gate.weight.shape
    block.gate.weight.copy_(torch.randn(shape, generator=generator) * shape[1] ** -0.5)
