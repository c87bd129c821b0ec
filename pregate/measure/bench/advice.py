"""Whether pre-gating pays, and whether computing experts on the CPU would beat moving them.

Sentences on predicted rows. Knows the fields of a predicted row; knows nothing about how it was predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pregate.config import Policy
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.step_times import Profile
from pregate.measure.table_format import three_digits
from pregate.system.byte_sizes import human_bytes


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
