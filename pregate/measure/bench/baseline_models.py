"""What an engine is compared with: the whole model in memory, and Hugging Face Accelerate's own offload.

Builds models from a checkpoint tensor by tensor, so that random weights need no directory and an offloaded model no
memory. Knows models, stores and Accelerate; knows nothing about rows or tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, offload_weight, save_offload_index
from torch import Tensor

from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.engine.storage.store import Store
from pregate.measure.bench.models import BenchModel
from pregate.models.family import config_of, experts_of, family_of
from pregate.models.loading import generation_config, in_own_layout, load_resident
from pregate.models.pregated_models import Gate, compute_buffers

HEADROOM = 1.1
"""Activations and the allocator's own take, as a factor on weights."""


def bytes_needed(model: BenchModel) -> float:
    """How much free memory the whole model is loaded into, at least."""
    return model.num_bytes() * HEADROOM


def resident_model(model: BenchModel, device: torch.device) -> Any:
    """The whole model on `device`, in evaluation mode: a directory through Hugging Face, random weights in place."""
    if model.directory is not None:
        whole = load_resident(model.directory, dtype=model.dtype, device_map=str(device))
        whole.requires_grad_(False)
        return whole
    whole = _empty_model(model)
    dtypes = {name: tensor.dtype for name, tensor in whole.state_dict().items()}
    weights = {name: tensor.to(device, dtypes[name]) for name, tensor in _tensors(model)}
    whole.load_state_dict(weights, assign=True, strict=False)
    compute_buffers(whole, device)
    whole.tie_weights()
    return whole


def _tensors(model: BenchModel) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the model in memory, a tensor or a block of experts at a time."""
    names, blocks = in_own_layout(model.source, experts_of(config_of(model.source.config)))
    for name in names:
        yield from model.source.read([name]).items()
    for held in blocks:
        yield from held.items()


def _empty_model(model: BenchModel) -> Any:
    """The architecture without storage, its parameters in the dtype they are served in; buffers keep their own."""
    family = family_of(model.source.config)
    with torch.device("meta"):
        empty = family.model_class(family.config(model.source.config))
    for parameter in empty.parameters():
        parameter.data = parameter.data.to(model.dtype)
    empty.requires_grad_(False)
    use_generation_config(empty, model)
    return empty.eval()


def use_generation_config(served: Any, model: BenchModel) -> None:
    """Generate as the checkpoint's own settings say."""
    served.generation_config = generation_config(model.source)


@torch.no_grad()
def dequantised_resident(whole: Any, model: BenchModel, store: Store) -> Any:
    """Give every expert of `whole`, the resident model, the weights that an engine computes with from `store`; in
    place. Returns `whole`: what a quantised store's tokens must equal."""
    slab = aligned_bytes(store.layout.slab_bytes)
    family, parameters = experts_of(whole.config), dict(whole.named_parameters())
    for key in model.family.keys():  # noqa: SIM118 - not a mapping
        store.read_into(key, slab)
        for part, matrix in zip(family.slices(key), store.layout.decode(slab), strict=True):
            part.of(parameters[part.tensor]).copy_(matrix)
    return whole


# --- Accelerate -----------------------------------------------------------------------------------------------------


def cpu_offloaded(model: BenchModel, device: torch.device) -> Any:
    """The model in host memory, its weights copied to `device` layer by layer by Accelerate's `cpu_offload`."""
    whole = resident_model(model, torch.device("cpu"))
    weights = {name: tensor.detach() for name, tensor in whole.state_dict().items()}
    offloaded = cpu_offload(whole, execution_device=device, state_dict=weights)
    return _with_gates(offloaded, weights, device)


def disk_offloaded(model: BenchModel, folder: Path, device: torch.device) -> Any:
    """The model with its weights in `folder` (see `write_offload_folder`), read by Accelerate's `disk_offload`."""
    empty, weights = _empty_model(model), OffloadedWeightsLoader(save_folder=folder)
    stored = {name: weights[name].to(device) for name, _ in empty.named_buffers() if name in weights}
    empty.load_state_dict(stored, assign=True, strict=False)
    compute_buffers(empty, device)
    return _with_gates(disk_offload(empty, folder, execution_device=device), weights, device)


def write_offload_folder(model: BenchModel, folder: Path) -> None:
    """Write the weights as `disk_offload` wants them, little of them in memory at a time, and have them on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    empty = _empty_model(model)
    dtypes = {name: tensor.dtype for name, tensor in empty.state_dict().items()}
    index: dict[str, Any] = {}
    for name, tensor in _tensors(model):
        offload_weight(tensor.to(dtypes[name]), name, str(folder), index)
    for alias, name in (getattr(empty, "all_tied_weights_keys", None) or {}).items():
        if alias not in index and name in index:
            # one file for all names of a tied weight, as they are one tensor in memory
            index[alias] = index[name]
            (folder / f"{alias}.dat").unlink(missing_ok=True)
            (folder / f"{alias}.dat").symlink_to(f"{name}.dat")
    save_offload_index(index, str(folder))
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())  # the page cache cannot forget what is not yet on the disk


def _with_gates(offloaded: Any, weights: Any, device: torch.device) -> Any:
    """Keep the gates, a thousandth of the model, on `device`: Accelerate fetches a module's weights when its forward
    runs, and a gate's are used without it."""
    for prefix, gate in offloaded.named_modules():
        if isinstance(gate, Gate):
            remove_hook_from_module(gate, recurse=True)
            owned = {f"{prefix}.{name}": weights[f"{prefix}.{name}"].to(device) for name in gate.state_dict()}
            offloaded.load_state_dict(owned, assign=True, strict=False)
    return offloaded
