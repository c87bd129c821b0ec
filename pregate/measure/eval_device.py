"""An evaluation with `engine.drive=device`: which settings it needs, how its engines are opened, how their policies are
timed.

Knows runs and the device-driven engine; what is evaluated is `evaluation`'s matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from pregate.config import Policy, Run, UsageError
from pregate.engine.device.engine import DeviceEngine
from pregate.engine.device.limits import refuse_settings, slots_for
from pregate.engine.device.ops.expert_outputs import check_activation
from pregate.engine.device.ops.language import require_triton
from pregate.engine.device.request import read_request
from pregate.measure.device_steps import StepsTimed, stepped_logits, time_steps
from pregate.measure.latency import BenchRequest, Expected, judged, medians
from pregate.measure.logits import check_moved
from pregate.system.machine import pick_device
from pregate.system.memory import PeakMemory


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


def measure_driven(
    open_engine: Callable[[], DeviceEngine],
    request: BenchRequest,
    device: torch.device,
    expected: Expected | None,
) -> dict[str, Any]:
    """One engine record as `measure_policy` gives it, without what cannot be seen inside a captured step: `block_ms`,
    `exposed_ms_per_token` and a timeline."""
    with PeakMemory(device) as peak, open_engine() as engine:
        prompts = [prompt.to(device) for prompt in request.prompts]

        def serve(prompt: Tensor) -> StepsTimed:
            options = request.options(prompt)
            ids, mask = options.pop("input_ids"), options.pop("attention_mask")
            return time_steps(engine, ids, mask, request.new_tokens, device, **options)

        serve(prompts[0])
        timed = [[serve(prompt) for prompt in prompts] for _ in range(request.repeats)]
        peak_bytes = peak.read()
        flat = [served for repeat in timed for served in repeat]
        for served in flat:  # nothing stays in a slot from request to request
            check_moved(engine.policy, served.counted["bytes_moved"])
        wanted = expected.tokens if expected is not None else [served.tokens for served in flat]
        logits = [
            stepped_logits(engine, prompt, torch.ones_like(prompt), tokens[:, :-1].to(device))
            for prompt, tokens in zip(prompts, wanted, strict=False)
        ]
        logits_record = judged(logits, expected, not all(served.finite for served in flat))
    record: dict[str, Any] = {
        **medians(flat),
        "tokens_per_s": request.new_tokens / statistics.median(served.seconds[-1] for served in flat),
        # of the last pass over all prompts, as the host-driven engine has it
        **{name: sum(served.counted[name] for served in timed[-1]) for name in ("bytes_moved", "hits", "misses")},
    }
    if expected is not None:
        same = [
            torch.equal(served.tokens, tokens)
            for repeat in timed
            for served, tokens in zip(repeat, expected.tokens, strict=True)
        ]
        record["tokens_equal_resident"] = all(same) and logits_record["logits_finite"]
    record |= logits_record
    if peak_bytes is not None:
        record["peak_device_bytes"] = peak_bytes
    return record
