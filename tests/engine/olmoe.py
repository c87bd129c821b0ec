"""A tiny OLMoE for the engine's tests, and what they ask of it. An expert of it fills a slab without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pregate.models.families.olmoe import PreGatedOlmoeConfig, PreGatedOlmoeForCausalLM

VOCABULARY, EXPERTS = 97, 8


def olmoe(lookahead: int = 1, **changes: Any) -> Any:
    torch.manual_seed(0)
    geometry: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 3,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "pregate": {"lookahead": lookahead},
    }
    return PreGatedOlmoeForCausalLM(PreGatedOlmoeConfig(**geometry | changes)).eval()


def prompts(rows: int, length: int = 7, padding: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """The last row padded on the left, if there are several."""
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, :padding] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def decode(**inputs: Any) -> dict[str, Any]:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    return options | {"return_dict_in_generate": True, "output_logits": True} | inputs
