"""What offloading will give before anything is packed: tokens/s and memory of every policy. `advice` says what pays.

Runs the engine's own scheduler against a clock (`simulation`) with the times of a `profile`. Knows models and sizes;
knows nothing about files of results.
"""

from __future__ import annotations

from typing import Any

import torch

from pregate.config import CacheRule, Policy
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.simulated_routes import Load
from pregate.measure.bench.simulation import simulate
from pregate.measure.bench.step_times import Profile


def predicted_row(
    model: BenchModel,
    spec: RowSpec,
    profiled: Profile,
    link_gb_per_s: float | None = None,
    compute_ms: float | None = None,
) -> dict[str, Any]:
    """Predicted figures of one engine row: `tpot_ms`, `tokens_per_s`, `exposed_ms_per_token`, `bytes_per_step`,
    `active_experts` a block and step, `slots`, `peak_device_bytes`. `link_gb_per_s` and `compute_ms`: of the moment;
    None for the profile's own."""
    layout = model.layout(str(spec.slab_dtype))
    policy, cache = Policy(spec.policy), CacheRule(spec.cache or CacheRule.none)
    budget = None if policy is Policy.gpu_only else spec.budget
    slots = slots_within(budget, policy, model.family, layout.slab_bytes)
    if link_gb_per_s is None and policy is Policy.prefetch_all:
        link_gb_per_s = profiled.in_order_gb_per_s
    found = simulate(
        model.family,
        model.gating,
        profiled.at(link_gb_per_s, compute_ms),
        policy=policy,
        cache=cache,
        num_slots=slots,
        slab_bytes=layout.slab_bytes,
        load=Load(spec.batch, spec.forced_experts),
        prompt_tokens=spec.prompt_len,
        new_tokens=spec.new_tokens,
        seed=spec.seed,
    )
    return {
        "tpot_ms": found.tpot_ms,
        "tokens_per_s": spec.batch * 1e3 / found.tpot_ms,
        "exposed_ms_per_token": found.exposed_ms_per_token,
        "bytes_per_step": found.bytes_per_step,
        "active_experts": found.active_experts,
        "slots": slots,
        "peak_device_bytes": memory_bytes(model, spec, slots),
    }


def memory_bytes(model: BenchModel, spec: RowSpec, slots: int) -> int:
    """Weights that are not experts, slots, scratch for dequantised experts, and on a CPU the host buffers too; on a
    GPU those are host memory and not counted. Activations are not in it."""
    layout = model.layout(str(spec.slab_dtype))
    expert_names = {name for key in model.family.keys() for name in model.family.tensor_names(key)}  # noqa: SIM118
    numel = sum(
        torch.Size(info.shape).numel() for name, info in model.source.tensors.items() if name not in expert_names
    )
    total = numel * model.dtype.itemsize + slots * layout.slab_bytes
    if layout.is_quantised:
        total += layout.matrix_bytes
    if spec.host_budget is not None:
        total += host_buffers_within(spec.host_budget, model.family, layout.slab_bytes) * layout.slab_bytes
    return total


def is_predictable(spec: RowSpec) -> bool:
    """Whether a row can be predicted: it is served by the host-driven engine, whose scheduler the planner runs."""
    return spec.policy in {str(policy) for policy in Policy} and not spec.device_driven
