"""What offloading will give before anything is packed: tokens/s and memory of every policy, and which one pays.

Runs the engine's own scheduler against a clock (`simulation`) with the times of a `profile`. Knows models and sizes;
knows nothing about files of results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pregate.config import CacheRule, Policy
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.simulation import Load, simulate
from pregate.measure.bench.step_times import Profile
from pregate.measure.table_format import three_digits
from pregate.system.sizes import human_bytes


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


def advice(rows: list[dict[str, Any]]) -> str:
    """One sentence on predicted rows of one load: whether pre-gating pays, and what would help more where it does
    not. Each row has `policy`, `cache`, `tokens_per_s`, `link_ms`, `compute_ms`."""
    plain = {row["policy"]: row for row in rows if row.get("cache") in (None, "none")}
    ahead, behind = plain.get(Policy.pre_gated), plain.get(Policy.on_demand)
    if ahead is None or behind is None:
        return "Plan both pre_gated and on_demand without a cache to learn whether pre-gating pays."
    gain = ahead["tokens_per_s"] / behind["tokens_per_s"]
    link, compute = ahead["link_ms"], ahead["compute_ms"]
    cached = max((row for row in rows if row.get("cache") not in (None, "none")), key=_speed, default=None)
    better = ""
    if cached is not None and _speed(cached) > 1.05 * _speed(ahead):
        better = f"; {cached['policy']} with an {cached['cache']} cache reaches {_speed(cached) / _speed(ahead):.2f}×"
    if link > 3 * compute:
        return (
            f"The link needs {link / compute:.1f} times as long as the computation, so overlap gives {gain:.2f}× at "
            f"best: a cache, smaller slabs or a larger batch help more{better}."
        )
    if link < 0.1 * compute or gain < 1.05:
        return f"Fetching takes {100 * link / compute:.0f} % of the computation: there is little to hide ({gain:.2f}×)."
    return f"Pre-gating pays: {gain:.2f}× the tokens/s of fetching on demand{better}."


def cpu_advice(
    model: BenchModel, rows: Sequence[Mapping[str, Any]], profiled: Profile, host_gb_per_s: float, free_bytes: int
) -> str:
    """One sentence on predicted rows of one load: whether to compute the experts on the CPU, from host memory, would be
    faster than to move them; empty where no row moves any. `free_bytes`: host memory that is free.

    At few tokens a step an expert is a product of matrices and a few vectors, whose time is that of reading the
    matrices once: bytes of the distinct experts ÷ bandwidth, the memory side of the roofline model (Williams, Waterman
    and Patterson, 2009). It is a lower bound. The rest of a step computes where it was measured.
    """
    moving = [row for row in rows if row["policy"] != Policy.gpu_only]
    if not moving:
        return ""
    best = min(moving, key=lambda row: row["tpot_ms"])
    needed = model.experts_bytes(best["slab_dtype"])
    if needed > free_bytes:
        return (
            f"Computing the experts on the CPU is no choice here: they need {human_bytes(needed)} of host memory, "
            f"{human_bytes(free_bytes)} are free."
        )
    num_bytes = best["active_experts"] * len(profiled.durations.before_block) * profiled.slab_bytes
    experts_ms = num_bytes / host_gb_per_s / 1e6
    whole_ms = profiled.durations.compute_ms(0) + experts_ms
    cache = "" if best.get("cache") in (None, "none") else f" and {best['cache']} cache"
    gain = best["tpot_ms"] / whole_ms
    return (
        f"Computing the experts on the CPU from host memory takes {human_bytes(num_bytes)} a step ÷ "
        f"{three_digits(host_gb_per_s)} GB/s = {three_digits(experts_ms)} ms at best, with the rest of the step "
        f"{three_digits(whole_ms)} ms a token. Moving them at {three_digits(profiled.link_gb_per_s)} GB/s takes "
        f"{three_digits(best['tpot_ms'])} ms a token with {best['policy']}{cache}: "
        + (f"the CPU would be {gain:.2f}× as fast." if gain > 1 else "moving them is faster.")
    )


def _speed(row: dict[str, Any]) -> float:
    return row["tokens_per_s"]


def is_predictable(spec: RowSpec) -> bool:
    """Whether a row can be predicted: it is served by the host-driven engine, whose scheduler the planner runs."""
    return spec.policy in {str(policy) for policy in Policy} and not spec.device_driven
