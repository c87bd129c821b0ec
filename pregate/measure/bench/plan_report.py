"""`plan=true`: one short table of what every row would give, and a sentence on what pays, without packing the model.

Leaves `plan.json` and `plan.md` in the run directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from pregate.config import Run
from pregate.measure.bench.advice import advice, cpu_advice
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.speed_prediction import is_predictable, predicted_row
from pregate.measure.bench.step_times import Profile, profile
from pregate.measure.bench.table import command
from pregate.measure.bench.transfer_speed import Reading, host_gb_per_s
from pregate.measure.table_format import Row, Table, facts_line, number, text, three_digits
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import console, say
from pregate.system.durable import write_json, write_text
from pregate.system.machine import environment
from pregate.system.memory import free_memory

SCRATCH = "plan-scratch"
COLUMNS = {
    "policy": text("policy"),
    "cache": text("cache"),
    "slots": text("slots"),
    "ms/token": number("tpot_ms"),
    "tokens/s": number("tokens_per_s"),
    "waiting ms": lambda row: three_digits(ms) if (ms := row["exposed_ms_per_token"]) > 1e-9 else "0",
    "MB/step": number("bytes_per_step", 1e6),
    "memory GB": number("peak_device_bytes", 1e9),
}


def write_plan(
    run: Run, rows: dict[BenchModel, list[RowSpec]], device: torch.device, reading: Reading, out_dir: Path
) -> list[dict[str, Any]]:
    """Predict every row of the grid that the engine would serve; returns what `plan.json` holds."""
    loads: list[dict[str, Any]] = []
    # on a CPU the experts compute there whatever moves
    host = None if device.type == "cpu" else host_gb_per_s()
    for model, specs in rows.items():
        grouped: dict[tuple[Any, ...], list[RowSpec]] = {}
        for spec in filter(is_predictable, specs):
            grouped.setdefault((spec.tier, spec.slab_dtype, spec.batch, spec.forced_experts), []).append(spec)
        for same in grouped.values():
            say(f"Timing {model.name}, {same[0].tier}, {same[0].slab_dtype}, batch {same[0].batch} …")
            loads.append(_load(model, same, profile(model, same[0], device, reading, out_dir / SCRATCH), host))
    facts, tables = environment(), [_table(load) for load in loads]
    write_json(out_dir / "plan.json", {"loads": loads, "environment": facts})
    parts = [f"# Plan: {run.name}", f"```\n{command(run.overrides)}\n```"]
    for load, table in zip(loads, tables, strict=True):
        parts += [f"## {table.title}", table.caption, table.markdown(), *load["verdicts"]]
        table.print(console())
        console().print(Text("\n".join(load["verdicts"]) + "\n"))
    write_text(out_dir / "plan.md", "\n\n".join([*parts, f"Environment: {facts_line(facts)}."]) + "\n")
    return loads


def _load(
    model: BenchModel, specs: Sequence[RowSpec], profiled: Profile, host_gb_per_s: float | None
) -> dict[str, Any]:
    """The predicted rows of one model, tier, slab dtype and batch, and what was measured for them. `host_gb_per_s`:
    of host memory; None where experts are computed there anyway."""
    first, found = specs[0], []
    for spec in specs:
        row = {**spec.to_dict(), **predicted_row(model, spec, profiled)}
        row["link_ms"] = row["bytes_per_step"] / profiled.link_gb_per_s / 1e6
        row["compute_ms"] = profiled.durations.compute_ms(row["active_experts"])
        found.append(row)
    verdicts, measured = [advice(found)], {}
    if host_gb_per_s is not None:
        on_cpu = cpu_advice(model, found, profiled, host_gb_per_s, free_memory(torch.device("cpu")))
        verdicts += [on_cpu] if on_cpu else []
        measured["host_gb_per_s"] = host_gb_per_s
    return {
        "model": model.name,
        "blocks": model.blocks,
        "lookahead": model.gating.lookahead,
        "entry": model.gating.entry,
        "gates": model.gates,
        "dtype": model.dtype_name,
        "tier": first.tier,
        "slab_dtype": first.slab_dtype,
        "batch": first.batch,
        "link_gb_per_s": profiled.link_gb_per_s,
        **measured,
        "slab_bytes": profiled.slab_bytes,
        "durations_ms": vars(profiled.durations),
        "verdicts": verdicts,
        "rows": found,
    }


def _table(load: Row) -> Table:
    title = f"{load['model']}, {load['dtype']}, {load['tier']}, slabs {load['slab_dtype']}, batch {load['batch']}"
    caption = (
        f"Lookahead {load['lookahead']}, entry {load['entry']}"
        + (f", {load['gates']}" if load.get("gates") else "")
        + (f", {load['blocks']} MoE blocks" if load["blocks"] else "")
        + f". Measured: {three_digits(load['link_gb_per_s'])} GB/s for slabs of {human_bytes(load['slab_bytes'])}, a "
        f"step computes for {three_digits(load['rows'][0]['compute_ms'])} ms. Predicted:"
    )
    return Table.of(COLUMNS, load["rows"], title=title, caption=caption, left=2)
