"""Measuring a row of the device-driven engine, and what T_compute means for it.

Knows the device-driven engine and rows; what stands beside a row is `bench_row`'s matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pregate.config import CacheRule, Drive, Policy
from pregate.engine.device.engine import DeviceEngine
from pregate.measure.bench.active_experts import forced_experts
from pregate.measure.bench.baselines import use_generation_config
from pregate.measure.bench.grid import BenchModel, RowSpec
from pregate.measure.bench.probes import Ground, Probes
from pregate.measure.bench.row import (
    LOGIT_TOKENS,
    WARM_UP,
    Beside,
    Effort,
    Requests,
    both_report,
    first_logits,
    greedy,
    logits_record,
    tokens_given,
)
from pregate.measure.device_steps import StepsTimed, stepped_logits, time_steps
from pregate.measure.logits import check_moved, logit_difference
from pregate.system.memory import PeakMemory


def captured_compute_ms(
    spec: RowSpec, new_tokens: int, find: Callable[[RowSpec], dict[str, Any] | None]
) -> float | None:
    """T_compute of a device-driven row: a token's time with all experts on the device, driven the same way and for
    `new_tokens`. None until that row is measured."""
    row = find(
        replace(spec, policy=str(Policy.gpu_only), cache=None, budget=None, host_budget=None, new_tokens=new_tokens)
    )
    return None if row is None else row["tpot_ms"]


def serve_by_device(
    spec: RowSpec, model: BenchModel, ground: Ground, effort: Effort, beside: Beside, probes: Probes
) -> dict[str, Any]:
    """See `Serve`. Nothing is read from a disk here."""
    device, store = ground.device, ground.store
    requests = Requests.of(spec, model, device)
    with (
        PeakMemory(device) as peak,
        DeviceEngine.open(
            model.source,
            batch=spec.batch,
            max_source_len=spec.prompt_len,
            max_new_tokens=spec.new_tokens,
            policy=Policy(spec.policy),
            device=device,
            device_budget=spec.budget,
            cache=CacheRule(spec.cache or CacheRule.none),
            store=store,
        ) as engine,
        forced_experts(engine.model, spec.forced_experts),
    ):
        use_generation_config(engine.model, model)
        for number in range(effort.warmup):
            serve_one(engine, requests, WARM_UP + number, spec.new_tokens)
        timed: list[Any] = effort.run(
            lambda number: serve_one(engine, requests, number, spec.new_tokens), lambda: probes.take(peak)
        )
        link_bytes = [(one.readings[-1] - one.readings[0]) / one.steps for one in timed]
        row = both_report(engine, peak, requests, timed, link_bytes, spec, beside)
        for one in timed:  # nothing stays in a slot from request to request
            check_moved(spec.policy, one.counted["bytes_moved"])
        given = tokens_given(beside.reference, timed)
        if spec.forced_experts is None:
            given = given[:, : min(LOGIT_TOKENS, spec.new_tokens)].to(device)
            logits = stepped_logits(engine, **requests.prompt(0), tokens_BT=given)
            if beside.reference is not None and beside.reference.logits is not None:
                differs = logit_difference(logits, beside.reference.logits[:, : spec.new_tokens])
                row |= {f"step_{name}": share for name, share in differs.items() if name == "logits_rel_diff"}
        else:  # forced by its place in a call, a token has another route alone than among others
            logits = first_logits(engine.forward, requests, given)
        broke = not all(one.finite for one in timed)
        row |= logits_record(logits, beside.reference, broke, (model.dtype, engine.model.dtype))
    row |= {name: round(statistics.mean(one.counted[name] for one in timed), 2) for name in timed[0].counted}
    if spec.forced_experts is None and spec.policy in (Policy.on_demand, Policy.pre_gated):
        # the other policies fetch without regard to routes, so their counts do not tell
        row["active_experts"] = round(statistics.mean(one.distinct for one in timed), 2)
    return row


def serve_one(engine: DeviceEngine, requests: Requests, number: int, new_tokens: int) -> StepsTimed:
    prompt = requests.prompt(number)
    return time_steps(engine, **prompt, new_tokens=new_tokens, device=requests.device, **greedy(new_tokens))


def is_device_driven(spec: RowSpec) -> bool:
    return spec.drive == Drive.device
