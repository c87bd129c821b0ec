"""Calibration of a source that is larger than memory: its experts are streamed by the engine.

Knows settings, the engine and the work directory; `streamed` knows the order of the computation.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pregate.config import CacheRule, Policy, Run
from pregate.conversion.calibrate.account import FittedGate, outcome
from pregate.conversion.calibrate.examples import Batches
from pregate.conversion.calibrate.gates_alone import GatesAlone
from pregate.conversion.calibrate.states import mean_agreement, tensors_of
from pregate.conversion.calibrate.streamed import COPIED, FITTED, StreamedFit
from pregate.conversion.calibrate.work_dir import WorkDir
from pregate.conversion.plan import TensorPlan
from pregate.engine.engine import OffloadEngine
from pregate.models.checkpoint import SourceCheckpoint
from pregate.tasks.base import Task
from pregate.tasks.tokens import Collator


def work_of(output: Path) -> Path:
    """Where a calibration for `output` keeps what it has done, until it is complete."""
    output = Path(output).expanduser()
    return output.with_name(f"{output.name}.calibration")


def fit_through_engine(
    run: Run,
    source: SourceCheckpoint,
    config: Any,
    plan: TensorPlan,
    task: Task,
    collate: Collator,
    folder: Path,
    device: torch.device | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the fitted gates, and what makes a `Calibration`.

    Computes in the dtype of the source, as an engine does. `folder`: the work directory. Raises `UsageError` for a
    `calibration.memory` that is too small.
    """
    examples = task.examples(run.task.train_split, run.data.max_train_examples)
    with open_engine(run, source, device or torch.device("cpu")) as engine:
        batches = Batches.of(examples, collate, run.calibration, run.seed)
        batches.to(engine.model.device)
        work = WorkDir(folder, _made_from(run, source, config, batches))
        try:
            return _fit(engine, source, config, plan, batches, run.calibration.steps, work)
        finally:
            work.close()


def open_engine(run: Run, source: SourceCheckpoint, device: torch.device) -> OffloadEngine:
    engine = run.engine
    return OffloadEngine.open(
        source,
        policy=Policy.on_demand,
        cache=CacheRule.lru,
        tier=engine.tier,
        device=device,
        host_budget=engine.host_budget,
        pack_dir=engine.pack_dir,
        io_threads=engine.io_threads,
        io_uring=engine.io_uring,
        slab_dtype=engine.slab_dtype,
    )


def _fit(
    engine: OffloadEngine,
    source: SourceCheckpoint,
    config: Any,
    plan: TensorPlan,
    batches: Batches,
    steps: int,
    work: WorkDir,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = engine.model
    gates = {name: GatesAlone(source, config, plan, model.device, model.dtype) for name in (FITTED, COPIED)}
    found = StreamedFit(engine, gates, batches, steps, work)
    found.run()
    before, after = found.agreement[COPIED], found.agreement[FITTED]
    kept = mean_agreement(after) >= mean_agreement(before)
    chosen = gates[FITTED if kept else COPIED]
    tensors = tensors_of(chosen.model, [gate for gate in chosen.to_fit.values() if not gate.exact])
    fitted = [FittedGate(*key, fit) for key, fit in found.fits.items()]
    told = outcome(list(before), fitted, batches, before, after, kept)
    return tensors, {**told, "seconds": found.seconds, "bytes_read": found.bytes_read}


def _made_from(run: Run, source: SourceCheckpoint, config: Any, batches: Batches) -> dict[str, Any]:
    """What a work directory depends on: another source, other examples or other settings begin anew."""
    digest = xxhash.xxh3_64()
    for batch in (*batches.fit, *batches.held_out):
        for name, tensor in sorted(batch.inputs.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return {
        "source": source.identity(),
        "pregate": config.pregating.to_dict(),
        "calibration": asdict(replace(run.calibration, memory=None)),
        "slab_dtype": run.engine.slab_dtype,
        "examples": digest.hexdigest(),
    }
