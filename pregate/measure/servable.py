"""What an evaluation could not be served with, refused before any work starts; and the device-driven engine for it.

Knows settings, headers and sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from pregate.config import Drive, Policy, Run, UsageError
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.device.generation_settings import read_request
from pregate.engine.device.limits import refuse_settings, slots_for
from pregate.engine.device.ops.language import require_triton
from pregate.engine.device.steps.registry import step_of
from pregate.engine.opening import serving_dtype
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.checkpoint import read_config
from pregate.models.experts import ExpertSpec
from pregate.models.family import config_of, experts_of, family_of
from pregate.models.loading import generation_config, open_model
from pregate.system.machine import pick_device


def check_servable(run: Run, directory: str) -> tuple[ExpertSpec, int]:
    """The expert family and slab size of a checkpoint that the engine can serve within the budget, from its headers."""
    opened = open_model(directory)
    config = config_of(opened.config)
    family = experts_of(config).as_found_in(opened.tensors)
    return family, check_config(run, config, serving_dtype(config, opened, family), generation_config(opened))


def check_reference(run: Run, reference: str | None, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse a reference that a model with `config` cannot be compared with on the text of `tokenizer`; None is no
    reference. Raises `UsageError`."""
    if not reference:
        return
    check_servable(run, reference)
    other = read_config(reference)
    family, its_family = (family_of(found).source_type for found in (config, other))
    if family != its_family:
        raise UsageError(
            f"reference={reference} is a model of type {its_family}, which one of type {family} cannot be compared "
            "with: name a reference of the same type."
        )
    rows = other.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise UsageError(
            f"reference={reference} has {rows} embeddings, and the tokenizer {len(tokenizer)} ids: name a reference "
            "with the same tokenizer."
        )


def check_config(run: Run, config: Any, dtype: torch.dtype, generation: GenerationConfig) -> int:
    """Refuse what a checkpoint with `config` and experts in `dtype` could not be served with; returns the bytes of one
    slab. `generation`: its generation settings."""
    slab_bytes = check_budget(run, experts_of(config), dtype)
    if run.engine.drive is Drive.device:
        check_driven(run, config, slab_bytes, generation)
    return slab_bytes


def check_engine(run: Run, config: Any, dtype: torch.dtype) -> None:
    """Refuse, before any training, what `then_eval` could not serve: device, budget. Raises `UsageError`. The
    reference is `check_reference`'s.

    `config` and `dtype` (of experts) are those that the trained checkpoint will have.
    """
    pick_device(run.engine.device)
    if not run.then_eval:
        return
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


# --- engine.drive=device --------------------------------------------------------------------------------------------


def check_driven(run: Run, config: Any, slab_bytes: int, settings: GenerationConfig) -> None:
    """Refuse what a device-driven evaluation of a checkpoint with `config` and these generation `settings` could not be
    served with. Raises `UsageError`."""
    step = step_of(config)
    if pick_device(run.engine.device).type == "cuda":
        require_triton()
    refuse_settings(
        run.eval.batch_size, run.task.max_source_tokens, _new_tokens(run), run.engine.cache, run.engine.tier, None
    )
    if run.eval.num_beams != 1:
        raise UsageError(
            f"eval.num_beams={run.eval.num_beams} needs the host: set eval.num_beams=1, or use engine.drive=host."
        )
    greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": _new_tokens(run)}
    read_request(settings, greedy, config.vocab_size, _new_tokens(run), 1 if step.continues_prompt else None)
    for policy in (run.engine.policy, *run.engine.policies):
        if policy is not Policy.gpu_only:
            slots_for(run.engine.device_budget, policy, config, slab_bytes, run.eval.batch_size)


def open_driven(run: Run, checkpoint: str, policy: Policy, device: torch.device, batch: int | None) -> DeviceEngine:
    """An engine for `batch` rows, by default those of the evaluation."""
    return DeviceEngine.open(
        checkpoint,
        batch=batch or run.eval.batch_size,
        max_source_len=run.task.max_source_tokens,
        max_new_tokens=_new_tokens(run),
        policy=policy,
        tier=run.engine.tier,
        device=device,
        device_budget=None if policy is Policy.gpu_only else run.engine.device_budget,
        cache=run.engine.cache,
        slab_dtype=run.engine.slab_dtype,
    )


def _new_tokens(run: Run) -> int:
    return max(run.eval.max_new_tokens or run.task.max_target_tokens, run.engine.bench_new_tokens)
