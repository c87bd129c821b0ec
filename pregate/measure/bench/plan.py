"""`plan=true`: one short table of what every row would give, and a sentence on what pays, without packing the model.

A model of the same geometry with few experts is packed and timed in its place. Leaves `plan.json` and `plan.md` in
the run directory.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pregate.config import Run, SlabDtype, Tier
from pregate.engine.opening import open_store
from pregate.measure.bench.grid import BenchModel, RowSpec
from pregate.measure.bench.planner import Profile, few_experts, is_predictable, predict, profile, verdict
from pregate.measure.bench.probes import Ground
from pregate.measure.bench.table import command
from pregate.measure.tables import ABSENT, three_digits
from pregate.system.console import console, say
from pregate.system.durable import write_json, write_text
from pregate.system.machine import environment
from pregate.system.sizes import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

SCRATCH = "plan-scratch"
HEADERS = ("policy", "cache", "slots", "ms/token", "tokens/s", "waiting ms", "MB/step", "memory GB")


def plan(run: Run, rows: dict[BenchModel, list[RowSpec]], device: torch.device, out_dir: Path) -> list[dict[str, Any]]:
    """Predict every row of the grid that the engine would serve; returns what `plan.json` holds."""
    loads: list[dict[str, Any]] = []
    try:
        for model, specs in rows.items():
            small = few_experts(model)
            grouped: dict[tuple[Any, ...], list[RowSpec]] = {}
            for spec in filter(is_predictable, specs):
                grouped.setdefault((spec.tier, spec.slab_dtype, spec.batch, spec.forced_experts), []).append(spec)
            for same in grouped.values():
                say(f"Timing {model.name}, {same[0].tier}, {same[0].slab_dtype}, batch {same[0].batch} …")
                profiled = _profile(run, small, same[0], device, out_dir / SCRATCH)
                loads.append(_load(model, same, profiled))
    finally:
        shutil.rmtree(out_dir / SCRATCH, ignore_errors=True)
    facts = environment()
    write_json(out_dir / "plan.json", {"loads": loads, "environment": facts})
    write_text(out_dir / "plan.md", _markdown(run, loads, facts))
    _print(loads, console())
    return loads


def _profile(run: Run, small: BenchModel, spec: RowSpec, device: torch.device, scratch: Path) -> Profile:
    place = scratch / f"{small.label}-{spec.slab_dtype}"
    tier, slab_dtype = Tier(str(spec.tier)), SlabDtype(str(spec.slab_dtype))
    store = open_store(small.source, tier=tier, device=device, pack_dir=place, slab_dtype=slab_dtype)
    try:
        ground = Ground(store, device, run.engine.io_threads, run.engine.io_uring)
        return profile(small, ground, spec.batch, spec.prompt_len)
    finally:
        store.close()


def _load(model: BenchModel, specs: Sequence[RowSpec], profiled: Profile) -> dict[str, Any]:
    """The predicted rows of one model, tier, slab dtype and batch, and what was measured for them."""
    first, found = specs[0], []
    for spec in specs:
        row = {**spec.to_dict(), **predict(model, spec, profiled)}
        row["link_ms"] = row["bytes_per_step"] / profiled.link_gb_per_s / 1e6
        row["compute_ms"] = compute_ms(profiled, row)
        found.append(row)
    return {
        "model": model.name,
        "dtype": model.dtype_name,
        "tier": first.tier,
        "slab_dtype": first.slab_dtype,
        "batch": first.batch,
        "link_gb_per_s": profiled.link_gb_per_s,
        "slab_bytes": profiled.slab_bytes,
        "durations_ms": vars(profiled.durations),
        "verdict": verdict(found),
        "rows": found,
    }


def compute_ms(profiled: Profile, row: dict[str, Any]) -> float:
    """T_compute of a row: a step in which nothing waits and nothing slows the computation."""
    parts = profiled.durations
    experts = len(parts.before_block) * row["active_experts"] * parts.expert
    return sum(parts.before_block) + experts + parts.after_blocks


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["policy"],
        row.get("cache") or ABSENT,
        str(row["slots"]),
        three_digits(row["tpot_ms"]),
        three_digits(row["tokens_per_s"]),
        three_digits(row["exposed_ms_per_token"]) if row["exposed_ms_per_token"] > 1e-9 else "0",
        three_digits(row["bytes_per_step"] / 1e6) if row["bytes_per_step"] else "0",
        three_digits(row["peak_device_bytes"] / 1e9),
    ]


def _title(load: dict[str, Any]) -> str:
    return f"{load['model']}, {load['dtype']}, {load['tier']}, slabs {load['slab_dtype']}, batch {load['batch']}"


def _caption(load: dict[str, Any]) -> str:
    compute = next(row["compute_ms"] for row in load["rows"])
    return (
        f"Measured: {three_digits(load['link_gb_per_s'])} GB/s for slabs of {human_bytes(load['slab_bytes'])}, a step "
        f"computes for {three_digits(compute)} ms. Predicted:"
    )


def _markdown(run: Run, loads: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    parts = [f"# Plan: {run.name}", f"```\n{command(run.overrides)}\n```"]
    for load in loads:
        lines = [HEADERS, ["---", "---", *["---:"] * (len(HEADERS) - 2)], *map(_cells, load["rows"])]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts += [f"## {_title(load)}", _caption(load), table, load["verdict"]]
    plain = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "git")
    return "\n\n".join([*parts, f"Environment: {plain}."]) + "\n"


def _print(loads: Sequence[dict[str, Any]], out: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for load in loads:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, header in enumerate(HEADERS):
            table.add_column(header, justify="left" if number < 2 else "right")
        for row in load["rows"]:
            table.add_row(*_cells(row), style="bold" if row["policy"] == "pre_gated" else "")
        out.print(Text(_title(load), "bold"))
        out.print(Text(_caption(load), "dim"))
        out.print(table)
        out.print(Text(load["verdict"]))
        out.print()
