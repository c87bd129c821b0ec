"""What an evaluation could not be served with, refused before any work starts.

Knows settings, headers and sizes; opens no engine.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from pregate.config import Drive, Policy, Run
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.engine.opening import serving_dtype
from pregate.engine.storage.slabs import SlabLayout
from pregate.measure.eval_device import check_driven
from pregate.models.family import ExpertSpec, config_of, experts_of
from pregate.models.loading import generation_config, open_model
from pregate.system.machine import pick_device


def check_servable(run: Run, directory: str) -> tuple[ExpertSpec, int]:
    """The expert family and slab size of a checkpoint that the engine can serve within the budget, from its headers."""
    opened = open_model(directory)
    config = config_of(opened.config)
    family = experts_of(config).as_found_in(opened.tensors)
    return family, check_config(run, config, serving_dtype(config, opened, family), generation_config(opened))


def check_config(run: Run, config: Any, dtype: torch.dtype, generation: GenerationConfig) -> int:
    """Refuse what a checkpoint with `config` and experts in `dtype` could not be served with; returns the bytes of one
    slab. `generation`: its generation settings."""
    slab_bytes = check_budget(run, experts_of(config), dtype)
    if run.engine.drive is Drive.device:
        check_driven(run, config, slab_bytes, generation)
    return slab_bytes


def check_engine(run: Run, config: Any, dtype: torch.dtype) -> None:
    """Refuse, before any training, what `then_eval` could not serve: reference, device, budget. Raises `UsageError`.

    `config` and `dtype` (of experts) are those that the trained checkpoint will have.
    """
    pick_device(run.engine.device)
    if not run.then_eval:
        return
    if run.reference is not None:
        check_servable(run, run.reference)
    source, revision = run.model.source, run.model.revision
    settings = generation_config(open_model(source, revision)) if source else GenerationConfig.from_model_config(config)
    check_config(run, config, dtype, settings)


def check_budget(run: Run, family: ExpertSpec, dtype: torch.dtype) -> int:
    """Refuse a budget that some policy cannot serve with; returns the bytes of one slab."""
    slab_bytes = SlabLayout.of(family, dtype, run.engine.slab_dtype).slab_bytes
    host_buffers_within(run.engine.host_budget, family, slab_bytes)
    for policy in (run.engine.policy, *run.engine.policies):
        if policy is not Policy.gpu_only:
            slots_within(run.engine.device_budget, policy, family, slab_bytes)
    return slab_bytes
