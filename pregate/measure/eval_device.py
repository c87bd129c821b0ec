"""An evaluation with `engine.drive=device`: which settings it needs, how its engines are opened, how their policies are
timed.

Knows runs and the device-driven engine; what is evaluated is `evaluation`'s matter.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from pregate.config import Policy, Run, UsageError
from pregate.engine.device import require_triton
from pregate.engine.device.engine import DeviceEngine, refuse_settings, slots_for
from pregate.engine.device.ops.experts import check_activation
from pregate.engine.device.request import read_request
from pregate.system.runtime import pick_device


def check_driven(run: Run, config: Any, slab_bytes: int, settings: GenerationConfig) -> None:
    """Refuse what a device-driven evaluation of a checkpoint with `config` and these generation `settings` could not be
    served with. Raises `UsageError`."""
    check_activation(config.dense_act_fn)
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
    read_request(settings, greedy, config.vocab_size, _new_tokens(run))
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
