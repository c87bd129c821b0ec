"""Make a directory with the tensor names, shapes, config and file form of google/switch-base-8, with random weights.

    python tests/make_switch_base.py OUTPUT --form bin|safetensors [--experts 8] [--shards N] [--tiny] [--tokenizer DIR]

Names and shapes are read off transformers' own class. Weights depend on the seed and the tensor's name alone, so the
same model comes out in every file form. One file's tensors are in memory at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

SWITCH_BASE_8: dict[str, Any] = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "model_type": "switch_transformers",
    "is_encoder_decoder": True,
    "vocab_size": 32128,
    "d_model": 768,
    "d_ff": 3072,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 8,
    "expert_capacity": 64,
    "router_bias": False,
    "router_dtype": "float32",
    "router_ignore_padding_tokens": False,
    "router_jitter_noise": 0.01,
    "router_type": "tokens_masked",
    "router_aux_loss_coef": 0.001,
    "router_z_loss_coef": 0.001,
    "add_router_probs": False,
    "dense_act_fn": "relu",
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "dropout_rate": 0.1,
    "initializer_factor": 1.0,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 24,
    "d_ff": 40,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_sparse_encoder_layers": 4,
    "num_sparse_decoder_layers": 4,
    "num_experts": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
TIED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


def sparse_steps(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the sparse steps that upstream derives from the numbers of sparse layers."""
    steps = {
        "encoder_sparse_step": config["num_layers"] // config["num_sparse_encoder_layers"],
        "decoder_sparse_step": config["num_decoder_layers"] // config["num_sparse_decoder_layers"],
    }
    return {**config, **steps}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig.from_dict(dict(config)))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def weight(name: str, shape: tuple[int, ...], config: dict[str, Any], seed: int) -> Tensor:
    """A random tensor at the scale of upstream's initialisation; routers at one that leaves their choice open."""
    if "layer_norm" in name:
        scale = 0.1
    elif name in ("shared.weight", *TIED):
        scale = 1.0
    elif ".q." in name:
        scale = (config["d_model"] * config["d_kv"]) ** -0.5
    elif ".o." in name:
        scale = (config["num_heads"] * config["d_kv"]) ** -0.5
    elif ".wo." in name:
        scale = config["d_ff"] ** -0.5
    else:
        scale = config["d_model"] ** -0.5
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    drawn = torch.randn(shape, generator=generator).mul_(scale)
    return drawn.add_(1.0) if "layer_norm" in name else drawn


def groups(sizes: dict[str, tuple[int, ...]], num_files: int) -> list[list[str]]:
    """The names in order, cut into `num_files` runs of about equal size."""
    total = sum(torch.Size(shape).numel() for shape in sizes.values())
    runs: list[list[str]] = [[] for _ in range(num_files)]
    seen = 0
    for name, shape in sizes.items():
        runs[min(seen * num_files // total, num_files - 1)].append(name)
        seen += torch.Size(shape).numel()
    return [run for run in runs if run]


def tensors_of(names: Iterable[str], sizes: dict[str, tuple[int, ...]], config: dict[str, Any], seed: int):
    """The named weights. Tied names share one storage within a file, as a saved model's do."""
    shared: dict[str, Tensor] = {}
    for name in names:
        table = name in TIED and (config["tie_word_embeddings"] or name != "lm_head.weight")
        origin = "shared.weight" if table else name
        if origin not in shared:
            shared[origin] = weight(origin, sizes[origin], config, seed)
        yield name, shared[origin]
        if origin != "shared.weight":
            del shared[origin]


def make(
    output: Path,
    form: str = "bin",
    num_files: int = 1,
    seed: int = 0,
    tokenizer: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Write the directory; `changes` go into the config. Returns the config.

    `.bin` files hold all names, tied ones included. safetensors hold tied tables once, and those of an untied model
    each on its own.
    """
    config = sparse_steps({**SWITCH_BASE_8, **changes})
    sizes = shapes(config)
    suffix = "safetensors" if form == "safetensors" else "bin"
    stem = "model" if form == "safetensors" else "pytorch_model"
    stored = {n: s for n, s in sizes.items() if not (suffix != "bin" and config["tie_word_embeddings"] and n in TIED)}
    output.mkdir(parents=True)
    (output / "config.json").write_text(json.dumps(config, indent=2))
    runs = groups(stored, num_files)
    weight_map: dict[str, str] = {}
    for number, run in enumerate(runs, 1):
        file = f"{stem}.{suffix}" if num_files == 1 else f"{stem}-{number:05}-of-{len(runs):05}.{suffix}"
        tensors = dict(tensors_of(run, sizes, config, seed))
        if suffix == "bin":
            torch.save(tensors, output / file)
        else:
            seen: set[int] = set()
            for name, tensor in tensors.items():
                tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
                seen.add(tensor.data_ptr())
            save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(run, file))
    if num_files > 1:
        total = sum(torch.Size(shape).numel() * 4 for shape in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    if tokenizer is not None:
        for path in tokenizer.iterdir():
            shutil.copyfile(path, output / path.name)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--form", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    changes = dict(TINY) if args.tiny else {}
    if args.experts is not None:
        changes["num_experts"] = args.experts
    if args.untied:
        changes["tie_word_embeddings"] = False
    make(args.output, args.form, args.shards, args.seed, args.tokenizer, **changes)
    print(f"{args.output}: {sum(f.stat().st_size for f in args.output.iterdir()) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
