"""A tiny random Llama, in the place of SmolLM2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

NEURONS = 128


def llama(vocabulary: int = 97, **changes: Any) -> Any:
    """Grouped heads and tied embeddings, as SmolLM2 has them, and neurons of which some add much more than others."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 24,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.uniform_(0.5, 1.5)
            layer.mlp.down_proj.weight *= torch.rand(NEURONS) * 2
    return model


def rows(count: int = 6, length: int = 16, vocabulary: int = 97) -> Tensor:
    return torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))
