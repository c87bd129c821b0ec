"""Low-rank adapters by `peft`, on parts of a frozen model: where they go, and the weights with and without them.

They are put into the model itself, which stays an object of its class. A saved model has the family's names: either its
own weights, with the adapters in a file beside, or both in one. Knows modules and names; knows nothing about the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pregate.config import LoraConfig, LoraTarget, UsageError
from pregate.models.family import family_of_model

ADAPTERS_FILE = "adapters.safetensors"
ADAPTER = "default"
BASE, PARTS = ".base_layer", (".lora_A.", ".lora_B.")
"""What peft puts into the names of weights that it adapts, and of its own."""


def check_installed() -> None:
    """Raises `UsageError` where there is no peft."""
    if find_spec("peft") is None:
        raise UsageError(
            "train.trainable=lora needs the package peft: pip install '.[lora]' in the directory of pregate, or "
            "pip install peft."
        )


def add_adapters(model: Any, lora: LoraConfig) -> None:
    """Freeze `model`, and put adapters, which learn, on what `lora` names; they are neutral until they have learnt.

    Raises `UsageError` where the model has no such part, and for dropout before experts that are one tensor.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    modules, tensors = targets_of(model, lora)
    inject_adapter_in_model(
        PeftConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=modules,
            target_parameters=tensors,
        ),
        model,
        ADAPTER,
    )


def targets_of(model: Any, lora: LoraConfig) -> tuple[list[str], list[str]]:
    """The names of the linear layers to adapt, and of the tensors that hold all experts of a block. Raises `UsageError`
    as `add_adapters`."""
    names = {module: name for name, module in model.named_modules()}
    modules, tensors = [], []
    for target in lora.targets:
        layers, held = [], []
        for part in parts_of(model, target):
            layers += [m for m in part.modules() if isinstance(m, nn.Linear)]
            if target is LoraTarget.experts:
                held += [f"{names[part]}.{name}" for name, p in part.named_parameters(recurse=False) if p.ndim == 3]
        if not layers and not held:
            raise UsageError(
                f"train.lora.targets names {target}, of which this model has no matrix that an adapter can be put on: "
                "leave it out."
            )
        if held and lora.dropout:
            raise UsageError(
                f"train.lora.dropout={lora.dropout} cannot act before the experts of this model, one tensor for all of "
                "a block: set it to 0, or leave experts out of train.lora.targets."
            )
        modules += [names[layer] for layer in layers]
        tensors += held
    return modules, tensors


def parts_of(model: Any, target: LoraTarget) -> Iterator[nn.Module]:
    """The modules that are `target` in each layer, with all that is in them."""
    blocks = {id(block.layer_module): block for block in model.moe_blocks()}
    for stack in family_of_model(model).stacks:
        for layer in model.stack_layers(stack):
            block = blocks.get(id(layer))
            dense = (module for name, module in layer.named_modules() if name.split(".")[-1] == "mlp")
            fed = next(dense) if block is None else block.module
            if target is LoraTarget.attention:
                inside = set(fed.modules())
                yield from (m for m in layer.modules() if isinstance(m, nn.Linear) and m not in inside)
            elif target is LoraTarget.dense and block is None:
                yield fed
            elif target is LoraTarget.experts and block is not None:
                yield block.module.experts
            elif target is LoraTarget.shared_experts and block is not None:
                yield from (child for name, child in block.module.named_children() if "shared" in name)


# --- weights --------------------------------------------------------------------------------------------------------


def is_adapted(model: nn.Module) -> bool:
    return any(PARTS[0] in name for name, _ in model.named_parameters())


def plain_name(name: str) -> str:
    """The name that a weight of an adapted model has without adapters."""
    return name.replace(BASE, "")


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights without adapters, in the family's names; the tensors of the model themselves."""
    return {plain_name(name): t for name, t in model.state_dict().items() if not _is_adapter(name)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if _is_adapter(name)}


def _is_adapter(name: str) -> bool:
    return any(part in name for part in PARTS)


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """The weights with what the adapters add, in the family's names. Those that are adapted are copies in host memory;
    the others are the tensors of the model."""
    state = plain_state(model)
    for prefix, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            name = f"{plain_name(prefix)}.{getattr(module, 'parameter_name', 'weight')}"
            state[name] = (state[name] + module.get_delta_weight(ADAPTER)).cpu()
    return state


def save_adapters(model: nn.Module, directory: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in adapter_state(model).items()}, directory / ADAPTERS_FILE)


@torch.no_grad()
def load_weights(model: nn.Module, saved: Mapping[str, Tensor], directory: Path) -> bool:
    """Bring back the weights `saved` and the adapters in `directory`; False, and nothing changed, if `model` has
    others."""
    file = directory / ADAPTERS_FILE
    adapters = load_file(file) if file.is_file() else {}
    pairs = ((plain_state(model), saved), (adapter_state(model), adapters))
    if any({k: v.shape for k, v in own.items()} != {k: v.shape for k, v in found.items()} for own, found in pairs):
        return False
    for own, found in pairs:
        for name, tensor in own.items():
            tensor.copy_(found[name])
    return True
