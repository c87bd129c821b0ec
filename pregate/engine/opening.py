"""A checkpoint opened for serving: its headers and what follows from them, its experts in a store, its model without
them.

Knows checkpoints, families and stores; knows nothing about slots or drives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pregate.config import SlabDtype, Tier, UsageError
from pregate.config.validators import chosen
from pregate.engine.budget import resolve_tier
from pregate.engine.storage.origin import Unchanged
from pregate.engine.storage.pack import check_experts, default_pack_dir, pack
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.storage.store import DiskStore, DramStore, Store
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.experts import ExpertSpec
from pregate.models.family import config_of, dtype_name, experts_of, family_named
from pregate.models.loading import checked, generation_config, open_model
from pregate.models.pregated_models import compute_buffers, place, without_experts
from pregate.system.console import first_of
from pregate.system.machine import compute_device

Checkpoint = str | Path | SourceCheckpoint
COMPUTED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes that a model may have."""


def serving_dtype(config: Any, source: SourceCheckpoint, family: ExpertSpec) -> torch.dtype:
    """The dtype that `from_pretrained` gives every tensor of the resident model, experts included, whatever dtypes
    they are stored in: the config's, or where that names none, the weights' own. Raises `UsageError` for missing
    experts, and for a dtype that no model computes in."""
    check_experts(source, family)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else source.default_dtype()
    if dtype not in COMPUTED:
        raise UsageError(
            f"{source.directory} is a model of {dtype_name(dtype)}, in which no model computes: set "
            "dtype in its config.json to float32, bfloat16 or float16."
        )
    return dtype


class Opened:
    """A checkpoint's headers, and what follows from them. Raises `UsageError` for one that cannot be served."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        given = isinstance(checkpoint, SourceCheckpoint)
        self.source = checked(checkpoint) if given else open_model(str(checkpoint))
        self.config = config_of(self.source.config)
        self.family = experts_of(self.config).as_found_in(self.source.tensors)
        self.dtype = serving_dtype(self.config, self.source, self.family)

    def layout(self, stored: SlabDtype, store: Store | None = None) -> SlabLayout:
        """How an expert lies in its slab. Raises `UsageError` for a `store` that holds other experts than these."""
        layout = SlabLayout.of(self.family, self.dtype, store.layout.stored if store else stored)
        if store is None:
            return layout
        if store.layout != layout:
            raise UsageError(f"The store given holds no experts of {self.source.directory}: open one with open_store.")
        if store.made_from is not None and store.made_from != self.source.identity():
            raise UsageError(
                f"The store given holds other experts than {self.source.directory} does now: open one with open_store."
            )
        return layout

    def store(self, layout: SlabLayout, tier: Tier, device: torch.device, pack_dir: str | Path | None = None) -> Store:
        """See `open_store`."""
        if resolve_tier(tier, device) is Tier.disk:
            where = Path(pack_dir).expanduser() if pack_dir else default_pack_dir(self.source.directory, layout.stored)
            with Unchanged(self.source) as signs:
                packed = pack(self.source, self.family, layout, where)
            return DiskStore(packed, signs.identity)
        return DramStore(self.source, self.family, layout, page_locked=device.type == "cuda")

    @torch.inference_mode(False)
    def model(self, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        """The model with everything but its experts on `device`, in the dtype it is served in or in another; the
        experts' tensors stay unread."""
        config, source = self.config, self.source
        config.dtype = dtype = dtype or self.dtype
        with without_experts(), torch.device("meta"):
            model = family_named(config.model_type).model_class(config)
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name in source.tensors}
        # one at a time and the largest first: a tensor's mapped pages are resident memory beside its copy
        for name in sorted(wanted, key=source.num_bytes, reverse=True):
            found = source.tensors[name].shape
            if found != wanted[name]:
                raise UsageError(
                    f"{source.directory} holds {name} of shape {tuple(found)}, not {tuple(wanted[name])}: use the "
                    "complete weights of the model that its config.json describes."
                )
            place(model, name, source.read([name])[name], device, dtype)
        compute_buffers(model, device)
        # as from_pretrained: tables that are there and differ stay apart
        model.tie_weights(missing_keys=set(model.state_dict()) - set(wanted), recompute_mapping=False)
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise UsageError(f"{source.directory} lacks {first_of(missing)}: convert it again.")
        model.generation_config = generation_config(source)
        model.requires_grad_(False)
        return model.eval()


def open_store(
    checkpoint: Checkpoint,
    *,
    tier: Tier | str = Tier.auto,
    device: torch.device | str = "cpu",
    pack_dir: str | Path | None = None,
    slab_dtype: SlabDtype | str = SlabDtype.source,
) -> Store:
    """Where the experts of `checkpoint` live, ready to be read; several engines may share it. Close it after them.

    `tier`: host memory (page-locked for a GPU), or the disk, where the experts are packed once into `pack_dir`
    (default: `experts` in the checkpoint). `slab_dtype`: as the weights are, or quantised. Raises `UsageError` for a
    checkpoint that cannot be served, a full disk, or memory that cannot be page-locked.
    """
    tier, slab_dtype = chosen("tier", Tier, tier), chosen("slab_dtype", SlabDtype, slab_dtype)
    device, opened = compute_device(device), Opened(checkpoint)
    return opened.store(opened.layout(slab_dtype), tier, device, pack_dir)
