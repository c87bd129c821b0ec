"""Checkpoints as the hub has them: OLMoE in block fp8, gpt-oss in MXFP4, named and shaped as published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, OlmoeConfig, OlmoeForCausalLM

BLOCK = (16, 8)
"""Rows and columns of a block of fp8. The matrices end inside of a block."""
VOCABULARY = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.3}
OLMOE: dict[str, Any] = {
    **VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
GPT_OSS: dict[str, Any] = {
    **VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: int = 2) -> Path:
    """Tensors go to the files in turn, so that numbers and their scales lie in two."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config, default=str))
    weight_map = {name: f"model-{place % files + 1:05}.safetensors" for place, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        inside = {name: tensors[name].contiguous() for name in tensors if weight_map[name] == file}
        save_file(inside, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def olmoe(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a conventional model in bfloat16, one tensor for each matrix of an expert."""
    torch.manual_seed(0)
    config = OlmoeConfig(**{**OLMOE, **changes})
    tensors: dict[str, Tensor] = {}
    for name, tensor in OlmoeForCausalLM(config).bfloat16().state_dict().items():
        before, _, matrix = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(matrix)
        if parts and before.endswith("experts"):
            for expert, matrices in enumerate(tensor):
                halves = zip(parts, matrices.chunk(len(parts)), strict=True)
                tensors |= {f"{before}.{expert}.{part}.weight": half.clone() for part, half in halves}
        else:
            tensors[name] = tensor.clone()
    return {**config.to_dict(), "architectures": ["OlmoeForCausalLM"], "dtype": "bfloat16"}, tensors


def spread(scales: Tensor, shape: torch.Size, block: tuple[int, int] = BLOCK) -> Tensor:
    """The scale of each number."""
    rows, columns = (torch.arange(side) // size for side, size in zip(shape[-2:], block, strict=True))
    return scales.float()[..., rows, :][..., columns]


def in_block_fp8(
    tensors: dict[str, Tensor], scale_dtype: torch.dtype = torch.float32, matrices: str = r"_proj\.weight$"
) -> dict[str, Tensor]:
    """The matrices with such names as fp8 numbers, with the largest number of a block at most 448."""
    quantised: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        quantised[name] = tensor
        if tensor.ndim > 1 and re.search(matrices, name):
            missing = [-side % size for side, size in zip(tensor.shape[-2:], BLOCK, strict=True)]
            padded = torch.nn.functional.pad(tensor.float(), (0, missing[1], 0, missing[0]))
            blocks = padded.unflatten(-1, (-1, BLOCK[1])).unflatten(-3, (-1, BLOCK[0]))
            scales = (blocks.abs().amax((-3, -1)) / 440).to(scale_dtype)
            quantised[name] = (tensor.float() / spread(scales, tensor.shape)).to(torch.float8_e4m3fn)
            quantised[f"{name}_scale_inv"] = scales
    return quantised


def from_block_fp8(quantised: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The model that those numbers mean."""
    return {
        name: (tensor.float() * spread(quantised[f"{name}_scale_inv"], tensor.shape)).to(dtype)
        if tensor.dtype is torch.float8_e4m3fn
        else tensor
        for name, tensor in quantised.items()
        if not name.endswith("_scale_inv")
    }


def gpt_oss() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a conventional model, its experts in random MXFP4."""
    torch.manual_seed(0)
    config = GptOssConfig(**GPT_OSS)
    tensors: dict[str, Tensor] = {}
    for name, tensor in GptOssForCausalLM(config).bfloat16().state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            E, C, R = tensor.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (E, R, C // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 126, (E, R, C // 32), dtype=torch.uint8)
        else:
            tensors[name] = (
                tensor + torch.randn(tensor.shape).to(tensor.dtype) / 4 if "bias" in name else tensor.clone()
            )
    described = {name: value for name, value in config.to_dict().items() if name != "dtype"}
    return {**described, "architectures": ["GptOssForCausalLM"], "quantization_config": MXFP4}, tensors
