"""What an engine is compared with: the whole model in memory, and Hugging Face Accelerate's own offload.

Builds models from a checkpoint tensor by tensor, so that random weights need no directory and an offloaded model no
memory. Knows models, stores and Accelerate; knows nothing about rows or tables.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, offload_weight, save_offload_index
from torch import Tensor

from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.engine.storage.store import Store
from pregate.measure.bench.models import BenchModel
from pregate.models.family import ExpertKey, family_of
from pregate.models.loading import generation_config, load_resident
from pregate.models.pregated_models import Gate


def resident_model(model: BenchModel, device: torch.device) -> Any:
    """The whole model on `device`, in evaluation mode: a directory through Hugging Face, random weights in place."""
    if model.directory is not None:
        whole = load_resident(model.directory, dtype=model.dtype, device_map=str(device))
        whole.requires_grad_(False)
        return whole
    whole = _empty_model(model)
    source, names = model.source, model.source.names()
    weights = {name: source.read([name])[name].to(device=device, dtype=model.dtype) for name in names}
    whole.load_state_dict(weights, assign=True, strict=False)
    whole.tie_weights()
    return whole


def _empty_model(model: BenchModel) -> Any:
    """The architecture without storage, in the dtype it is served in."""
    family = family_of(model.source.config)
    with torch.device("meta"):
        empty = family.model_class(family.config(model.source.config))
    empty.requires_grad_(False)
    use_generation_config(empty, model)
    return empty.to(dtype=model.dtype).eval()


def use_generation_config(served: Any, model: BenchModel) -> None:
    """Generate as the checkpoint's own settings say."""
    served.generation_config = generation_config(model.source)


@torch.no_grad()
def dequantised_resident(whole: Any, model: BenchModel, store: Store) -> Any:
    """Give every expert of `whole`, the resident model, the weights that an engine computes with from `store`; in
    place. Returns `whole`: what a quantised store's tokens must equal."""
    slab = aligned_bytes(store.layout.slab_bytes)
    experts = {(block.stack, block.index): block.module.experts for block in whole.moe_blocks()}
    for key in model.family.keys():  # noqa: SIM118 - not a mapping
        store.read_into(key, slab)
        for name, matrix in zip(model.family.matrices, store.layout.decode(slab), strict=True):
            _matrix_of(experts, key, name).copy_(matrix)
    return whole


def _matrix_of(experts: dict[tuple[str, int], Any], key: ExpertKey, name: str) -> Tensor:
    return getattr(experts[key.stack, key.block][f"expert_{key.expert}"], name).weight


# --- Accelerate -----------------------------------------------------------------------------------------------------


def cpu_offloaded(model: BenchModel, device: torch.device) -> Any:
    """The model in host memory, its weights copied to `device` layer by layer by Accelerate's `cpu_offload`."""
    whole = resident_model(model, torch.device("cpu"))
    weights = {name: tensor.detach() for name, tensor in whole.state_dict().items()}
    offloaded = cpu_offload(whole, execution_device=device, state_dict=weights)
    return _with_gates(offloaded, weights, device)


def disk_offloaded(model: BenchModel, folder: Path, device: torch.device) -> Any:
    """The model with its weights in `folder` (see `write_offload_folder`), read by Accelerate's `disk_offload`."""
    offloaded = disk_offload(_empty_model(model), folder, execution_device=device)
    return _with_gates(offloaded, OffloadedWeightsLoader(save_folder=folder), device)


def write_offload_folder(model: BenchModel, folder: Path) -> None:
    """Write the weights as `disk_offload` wants them, one tensor in memory at a time, and have them on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    empty = _empty_model(model)
    index: dict[str, Any] = {}
    for name in (name for name in empty.state_dict() if name in model.source.tensors):
        offload_weight(model.source.read([name])[name].to(model.dtype), name, str(folder), index)
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


def free_memory(device: torch.device) -> int:
    """Memory that `device` has left: the GPU's, or the machine's within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - int(stat["anon"]))  # pages of files give way
    except (OSError, ValueError, KeyError):  # no such control group, or no limit
        pass
    return free
