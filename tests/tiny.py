"""Tiny Switch models for tests: small enough for milliseconds, odd enough to catch a swapped dimension."""

from __future__ import annotations

from typing import Any

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from pregate import PreGatedSwitchTransformersConfig, PreGatedSwitchTransformersForConditionalGeneration
from pregate.models.families.switch import SwitchFamily

SEQ2SEQ = SwitchFamily.objective
GEOMETRY: dict[str, Any] = {
    "vocab_size": 67,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 28,
    "num_layers": 6,
    "num_decoder_layers": 6,
    "num_sparse_encoder_layers": 3,
    "num_sparse_decoder_layers": 3,
    "num_heads": 3,
    "num_experts": 5,
    "expert_capacity": 64,
    "router_jitter_noise": 0.0,
    "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}


def geometry(**changes: Any) -> dict[str, Any]:
    return {**GEOMETRY, **changes}


def upstream_model(seed: int = 0, **changes: Any) -> SwitchTransformersForConditionalGeneration:
    """A random conventional model in evaluation mode, with routers soft enough that routes vary."""
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**geometry(**changes)))
    for name, parameter in model.named_parameters():
        if "router" in name or "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "layer_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def pregated_model(
    seed: int = 0,
    lookahead: int = 1,
    stacks: tuple[str, ...] = ("encoder", "decoder"),
    entry: str = "own",
    path: str = "grouped",
    weights: str = "early",
    start: int = 0,
    gate: str = "linear",
    **changes: Any,
) -> PreGatedSwitchTransformersForConditionalGeneration:
    """A random pre-gated model in evaluation mode. With `gate` mlp, what is beside linear maps is random too."""
    torch.manual_seed(seed)
    gating = {"lookahead": lookahead, "stacks": list(stacks), "entry": entry, "init": "random"}
    gating |= {"weights": weights, "start": start, "gate": gate, "gate_width": 11}
    model = PreGatedSwitchTransformersForConditionalGeneration(
        PreGatedSwitchTransformersConfig(**geometry(**changes), pregate=gating)
    )
    for name, parameter in model.named_parameters():
        if "classifier" in name or "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "layer_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif ".nonlinear." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.set_expert_path(path)
    return model.eval()


def layer_passes(model: Any) -> dict[str, int]:
    """How often each layer of `model` computes for a backward pass from now on: twice as often where layers are
    recomputed. A layer is seen by its first linear map, because upstream recomputes within the call of a layer."""
    passes: dict[str, int] = {}

    def counted(name: str, linear: torch.nn.Module) -> None:
        def count(*_: Any) -> None:
            passes[name] += torch.is_grad_enabled() and model.training

        passes[name] = 0
        linear.register_forward_pre_hook(count)

    for stack in {block.stack for block in model.moe_blocks()}:
        for index, layer in enumerate(model.stack_layers(stack)):
            counted(f"{stack} {index}", next(m for m in layer.modules() if isinstance(m, torch.nn.Linear)))
    return passes


def batch(
    seed: int = 0, size: int = 3, source: int = 9, target: int = 7, vocab: int = 67, padded: bool = True
) -> dict[str, torch.Tensor]:
    """Random input_ids, attention_mask (right padding) and labels (-100 where padded)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, vocab, (size, source), generator=generator)
    labels = torch.randint(2, vocab, (size, target), generator=generator)
    mask = torch.ones_like(input_ids)
    if padded:
        for row in range(1, size):
            cut = int(torch.randint(2, source, (1,), generator=generator))
            input_ids[row, cut:], mask[row, cut:] = 0, 0
            labels[row, max(2, cut % target) :] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
