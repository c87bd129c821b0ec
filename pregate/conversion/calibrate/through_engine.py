"""Calibration of a source that is larger than memory: its experts are streamed by the engine.

Knows settings, the engine and the work directory; `streamed` knows the order of the computation.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pregate.config import CacheRule, CalibrationConfig, CalibrationData, Policy, Run
from pregate.conversion.calibrate.examples import Batches, answered_rows, rows_of, within_budget
from pregate.conversion.calibrate.gates_alone import GatesAlone
from pregate.conversion.calibrate.memory_budget import room_for
from pregate.conversion.calibrate.outcome import FittedGate, outcome
from pregate.conversion.calibrate.states import mean_agreement, tensors_of
from pregate.conversion.calibrate.streamed import COPIED, FITTED, StreamedFit
from pregate.conversion.calibrate.work_dir import WorkDir
from pregate.conversion.tensor_plan import TensorPlan
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import Opened
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.family import dtype_name
from pregate.models.packing_and_padding import Row
from pregate.system.machine import fast_dtype
from pregate.system.memory import PeakMemory, bytes_in_use
from pregate.system.stopping import going_on
from pregate.tasks.base import Task
from pregate.tasks.tokens import Collator

SPEED_ALONE = ("memory", "batch_size")
"""Settings that a calibration may go on with otherwise than it was begun: files keep the batch size that they have."""


def work_of(output: Path) -> Path:
    """Where a calibration for `output` keeps what it has done, until it is complete."""
    output = Path(output).expanduser()
    return output.with_name(f"{output.name}.calibration")


def fit_through_engine(
    run: Run,
    source: SourceCheckpoint,
    config: Any,
    plan: TensorPlan,
    task: Task | None,
    collate: Collator,
    folder: Path,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the fitted gates, and what makes a `Calibration`.

    Computes in the dtype of the source, as an engine does, or in float32 on a CPU that is slow in it. `folder`: the
    work directory. Raises `UsageError` for a `calibration.memory` that is too small.
    """
    before, opened = bytes_in_use(device), Opened(source)
    layout, dtype = opened.layout(run.engine.slab_dtype), fast_dtype(opened.dtype, device)
    longest = collate.max_source_tokens + collate.max_target_tokens
    room = room_for(run.calibration, opened, layout, run.engine.tier, longest, device, dtype)
    rows = rows_of(run, task, collate)
    slot_bytes = room.num_slots * layout.slab_bytes

    def highest() -> int | None:
        above = peak.read()
        return None if above is None else before + above

    with (
        PeakMemory(device) as peak,
        closing(WorkDir(folder, _made_from(run, source, config, rows, dtype), room.batch_size)) as work,
        going_on(work.going_on),
        _open_engine(run, source, device, dtype, slot_bytes) as engine,
    ):
        settings = replace(run.calibration, batch_size=work.batch_size)
        if settings.data is CalibrationData.generations:
            rows = _answers(engine, rows, collate, settings, work)
        batches = Batches.of_rows(rows, collate, settings)
        batches.to(device)
        return _fit(engine, source, config, plan, batches, settings.steps, work, highest)


def _open_engine(
    run: Run, source: SourceCheckpoint, device: torch.device, dtype: torch.dtype, slot_bytes: int
) -> OffloadEngine:
    engine = run.engine
    opened = OffloadEngine.open(
        source,
        policy=Policy.on_demand,
        cache=CacheRule.lru,
        tier=engine.tier,
        device=device,
        device_budget=f"{slot_bytes}B",
        host_budget=engine.host_budget,
        pack_dir=engine.pack_dir,
        io_threads=engine.io_threads,
        io_uring=engine.io_uring,
        slab_dtype=engine.slab_dtype,
        dtype=dtype,
    )
    for block in opened.model.moe_blocks():
        block.module.experts.few_sizes = True
    return opened


def _answers(
    engine: OffloadEngine, prompts: Sequence[Row], collate: Collator, settings: CalibrationConfig, work: WorkDir
) -> list[Row]:
    """What the model answers, as much as the token budget holds. What a killed process was told is not asked again."""
    told: list[Row] = [Row(array("i", source), array("i", target)) for source, target in work.kept("answers", [])]

    def chunks() -> Iterator[list[Row]]:
        yield from [told[:]] if told else []
        for part in answered_rows(prompts[len(told) :], engine.model, engine.generate, collate, settings):
            told.extend(part)
            work.keep("answers", [(row.source.tolist(), row.target.tolist()) for row in told])
            yield part

    return within_budget(chunks(), collate, settings)


def _fit(
    engine: OffloadEngine,
    source: SourceCheckpoint,
    config: Any,
    plan: TensorPlan,
    batches: Batches,
    steps: int,
    work: WorkDir,
    highest: Callable[[], int | None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = engine.model
    gates = {name: GatesAlone(source, config, plan, model.device, model.dtype) for name in (FITTED, COPIED)}
    found = StreamedFit(engine, gates, batches, steps, work, highest)
    found.run()
    before, after = found.agreement[COPIED], found.agreement[FITTED]
    kept = mean_agreement(after) >= mean_agreement(before)
    chosen = gates[FITTED if kept else COPIED]
    tensors = tensors_of(chosen.model, [gate for gate in chosen.to_fit.values() if not gate.exact])
    fitted = [FittedGate(*key, fit) for key, fit in found.fits.items()]
    told = outcome(list(before), fitted, batches, before, after, kept)
    sizes = {"bytes_read": found.bytes_read, "peak_bytes": found.peak_bytes}
    return tensors, {**told, "seconds": found.seconds, **sizes}


def _made_from(
    run: Run, source: SourceCheckpoint, config: Any, rows: Sequence[Row], dtype: torch.dtype
) -> dict[str, Any]:
    """What a work directory depends on: another source, other examples or other settings begin anew."""
    digest = xxhash.xxh3_64()
    for ids in (ids for row in rows for ids in (row.source, row.target)):
        digest.update(f"{len(ids)} ".encode() + ids.tobytes())
    return {
        "source": source.identity(),
        "config": source.config,
        "pregate": config.pregating.to_dict(),
        "calibration": {name: value for name, value in asdict(run.calibration).items() if name not in SPEED_ALONE},
        "lengths": [run.task.max_source_tokens, run.task.max_target_tokens],
        "slab_dtype": run.engine.slab_dtype,
        "dtype": dtype_name(dtype),
        "examples": digest.hexdigest(),
    }
