"""Training with `train.experts=offloaded`: the engines of a run, and the whole checkpoint at its end.

The saved states hold no experts. At the end the checkpoint that the engine was opened with is written again, shard by
shard, with what was learnt in its place. Knows settings, engines and checkpoints; knows nothing about losses.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pregate.config import Drive, Experts, Run, UsageError
from pregate.conversion.gate_starts import GateStart
from pregate.conversion.shards import MAX_SHARD_BYTES, Shards, write_fresh
from pregate.conversion.tensor_plan import TensorPlan
from pregate.engine.budget import host_buffers_within
from pregate.engine.storage.pack import default_pack_dir
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.training_engine import TrainingEngine, training_slots
from pregate.models.checkpoint import CONFIG, SourceCheckpoint
from pregate.models.family import experts_of
from pregate.models.loading import open_model
from pregate.models.side_files import side_files
from pregate.system.console import say
from pregate.system.durable import write_json
from pregate.system.process_group import join
from pregate.training.durable_directories import replaced, write_side_files
from pregate.training.optimizer_and_schedule import autocast_dtype
from pregate.training.run_dir_lock import CHECKPOINT, KEPT
from pregate.training.weights_without_experts import LEARNT

STUDENT, TEACHER = "checkpoint", "reference"
"""Where in `engine.pack_dir` the experts are packed: where the evaluation looks for those of the two models."""


@dataclass(frozen=True)
class Offloaded:
    """model: to train. teacher: frozen, or None. engines: that of the model, and that of a teacher with other
    experts."""

    model: Any
    teacher: Any | None
    engines: Sequence[TrainingEngine]

    @property
    def checkpoint_bytes(self) -> int:
        """The size of the whole checkpoint of the model."""
        source = self.engines[0].source.with_extras()
        return sum(map(source.num_bytes, source.names()))

    @contextmanager
    def passes(self) -> Iterator[None]:
        """For a forward and a backward pass, or for a validation."""
        with ExitStack() as stack:
            for engine in self.engines:
                stack.enter_context(engine.step())
            yield

    def start_clock(self) -> None:
        for engine in self.engines:
            engine.start_clock()

    def figures(self) -> dict[str, float]:
        """Since `start_clock`, to be logged: how long the computation waited for experts, and what was moved."""
        waited, moved = zip(*(engine.stop_clock() for engine in self.engines), strict=True)
        return {"waited_ms": sum(waited), "bytes_moved": float(sum(moved))}


def check_offloaded(run: Run, config: Any, dtype: torch.dtype) -> None:
    """Refuse, before any work, what cannot be trained with offloaded experts. `config` and `dtype` (of experts) are
    those that the trained checkpoint will have. Raises `UsageError`."""
    if run.train.experts is not Experts.offloaded:
        return
    if run.model.source is None and run.source_train is None:
        raise UsageError(
            "train.experts=offloaded takes the experts of a checkpoint: set model.source=DIR_OR_ID, or "
            "train.experts=resident."
        )
    if run.engine.drive is not Drive.host:
        raise UsageError(
            "train.experts=offloaded is driven by the host: set engine.drive=host, and measure engine.drive=device "
            "with pregate.eval."
        )
    if join().num_processes > 1:
        raise UsageError(
            "train.experts=offloaded trains in one process: start python -m pregate.train without a launcher, or set "
            "train.experts=resident."
        )
    family = experts_of(config)
    slab_bytes = SlabLayout.of(family, dtype, run.engine.slab_dtype).slab_bytes
    training_slots(run.engine.device_budget, family, slab_bytes)
    host_buffers_within(run.engine.host_budget, family, slab_bytes)


@contextmanager
def open_offloaded(run: Run, source: SourceCheckpoint, device: torch.device) -> Iterator[Offloaded]:
    """The model in `source`, and the teacher of `run.train`, with their experts in stores. A teacher whose experts are
    those of the model computes with the same slots."""
    train = run.train
    with ExitStack() as stack:
        engine = stack.enter_context(_open(run, source, device, STUDENT, torch.float32))
        engines, teacher = [engine], None
        if train.teacher is not None:
            dtype = autocast_dtype(train.precision, device) or torch.float32
            teacher = engine.teacher(train.teacher, dtype)
            if teacher is None:
                say(f"the teacher {train.teacher} has other experts than the model: they get slots of their own.")
                engines.append(stack.enter_context(_open(run, open_model(train.teacher), device, TEACHER, dtype)))
                teacher = engines[-1].model
            teacher.requires_grad_(False)
        yield Offloaded(engine.model, teacher, engines)


def _open(run: Run, source: SourceCheckpoint, device: torch.device, name: str, dtype: torch.dtype) -> TrainingEngine:
    engine = run.engine
    return TrainingEngine.open(
        source,
        tier=engine.tier,
        device=device,
        device_budget=engine.device_budget,
        host_budget=engine.host_budget,
        pack_dir=None if engine.pack_dir is None else Path(engine.pack_dir) / name,
        io_threads=engine.io_threads,
        io_uring=engine.io_uring,
        slab_dtype=engine.slab_dtype,
        dtype=dtype,
    )


def complete(run_dir: Path, source: SourceCheckpoint, tokenizer: Any, carry: Sequence[Path] = ()) -> None:
    """Make `run_dir/checkpoint` from `source` and from what the run has learnt. After an interruption it is made anew.

    Every tensor keeps its name and its dtype. Raises `UsageError` if the disk takes no more.
    """
    kept = run_dir / KEPT
    if not kept.is_dir():  # complete since an earlier command
        return
    found = load_file(kept / LEARNT)
    plan = TensorPlan({name: name for name in source.with_extras().names()}, (), ())
    assert found.keys() <= plan.origins.keys(), found.keys() - plan.origins.keys()
    with replaced(run_dir / CHECKPOINT) as fresh:
        files = Shards.of(source, plan, MAX_SHARD_BYTES)
        write_fresh(fresh, replace(files, starts={name: _in_place_of(tensor) for name, tensor in found.items()}))
        for file in side_files(str(source.directory)):
            shutil.copyfile(file, fresh / file.name)
        # the code that auto_map points to is not copied
        write_json(fresh / CONFIG, {name: value for name, value in source.config.items() if name != "auto_map"})
        write_side_files(fresh, tokenizer, carry)
    shutil.rmtree(kept)


def _in_place_of(learnt: Tensor) -> GateStart:
    return lambda stored: learnt.to(stored.dtype)


def hand_on_pack(run: Run, converted: Path, checkpoint: Path) -> None:
    """The packed experts beside a converted model that is removed are those of its trained checkpoint."""
    packed = default_pack_dir(converted, run.engine.slab_dtype)
    target = default_pack_dir(checkpoint, run.engine.slab_dtype)
    if packed.is_dir() and not target.exists():
        packed.rename(target)
