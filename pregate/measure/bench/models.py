"""Which models a benchmark serves: a checkpoint, or members of the model group with random weights.

Knows settings, geometries and sizes; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import xxhash
from omegaconf import OmegaConf

from pregate.config import Drive, Policy, Precision, Run, SlabDtype, UsageError
from pregate.config.groups import config_dir
from pregate.engine.budget import host_buffers_within, slots_within
from pregate.engine.device.limits import MOST_ROWS, slots_for
from pregate.engine.device.ops.language import require_triton
from pregate.engine.device.steps.registry import step_of
from pregate.engine.opening import serving_dtype
from pregate.engine.storage.slabs import SlabLayout
from pregate.measure.evaluation import check_gates
from pregate.models.checkpoint import WEIGHT_FILES, SourceCheckpoint, read_config
from pregate.models.experts import ExpertSpec
from pregate.models.family import config_of, dtype_name, experts_of, family_named, family_of
from pregate.models.loading import open_model
from pregate.models.pregating import PreGating
from pregate.models.synthetic import synthetic_checkpoint
from pregate.system.machine import pick_device

LEFT_OUT = ("torch_dtype", "quantization_config")
"""Settings of a config.json that a plan decides by itself."""
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


@dataclass(frozen=True, eq=False)
class BenchModel:
    """A model to be measured. `directory` is None for random weights."""

    name: str
    directory: str | None
    source: SourceCheckpoint
    family: ExpertSpec
    dtype: torch.dtype
    vocab_size: int
    blocks: str | None = None
    """How many of the geometry's MoE blocks it has, where not all: "2 of 16"."""

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def gating(self) -> PreGating:
        return PreGating.from_dict(self.source.config.get("pregate"))

    @property
    def gates(self) -> str | None:
        """How they differ from the usual ones, in words; None if they do not."""
        return self.gating.other_settings(family_of(self.source.config).stacks)

    @property
    def label(self) -> str:
        """Names its files among those of other models."""
        few = f"-{self.blocks}".replace(" ", "-") if self.blocks else ""
        return f"{self.name}{few}-{self.dtype_name}"

    @cached_property
    def fingerprint(self) -> str:
        """Of its weights and config: models of one name may differ."""
        made_of = {"weights": self.source.identity(), "config": self.source.config}
        return xxhash.xxh3_64_hexdigest(json.dumps(made_of, sort_keys=True, default=str).encode())

    def num_bytes(self) -> int:
        """Of the whole model in memory."""
        numel = sum(torch.Size(info.shape).numel() for info in self.source.tensors.values())
        return numel * self.dtype.itemsize

    def experts_bytes(self, slab_dtype: SlabDtype | str) -> int:
        """Of all experts as slabs."""
        return len(self.family.keys()) * self.layout(slab_dtype).slab_bytes

    def layout(self, slab_dtype: SlabDtype | str) -> SlabLayout:
        return SlabLayout.of(self.family, self.dtype, SlabDtype(slab_dtype))


def bench_models(run: Run) -> list[BenchModel]:
    """The models asked for: `checkpoint`, or members of the model group, or the run's own model.

    Raises `UsageError` for an unknown one, one without a geometry, and one that cannot be served.
    """
    if run.checkpoint is not None:
        if run.bench.num_blocks is not None:
            raise UsageError("bench.num_blocks is for models with random weights: leave it or the checkpoint out.")
        return [(_planned_model if run.plan else _checkpoint_model)(run, run.checkpoint)]
    if not run.bench.models:
        return [_random_model(run, run.model.name, run.model.family, run.model.geometry, run.bench.dtype)]
    models = []
    for entry in run.bench.models:
        name, _, dtype = entry.partition("@")
        if dtype not in ("", *Precision):
            raise UsageError(f"bench.models has {entry}: write one of {', '.join(DTYPES)} behind the @.")
        settings = _group_member(name)
        precision = Precision(dtype) if dtype else run.bench.dtype
        family = settings.get("family", run.model.family)
        named = settings.get("name", name)
        models.append(_random_model(run, named, family, settings.get("geometry") or {}, precision))
    labels = [model.label for model in models]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"bench.models names {twice} twice: name each model once.")
    return models


def _group_member(name: str) -> dict[str, Any]:
    folder = config_dir() / "model"
    file = folder / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise UsageError(f"bench.models has {name!r}, but there is no such model: choose from {names}.")
    settings = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _random_model(run: Run, name: str, family: str, geometry: dict[str, Any], precision: Precision) -> BenchModel:
    if not geometry:
        raise UsageError(f"The model {name} has no geometry to fill with random weights: set checkpoint=DIR.")
    dtype, gating = DTYPES.get(precision, torch.float32), PreGating.of_config(run.pregate)
    whole = bench_model(name, None, synthetic_checkpoint(family_named(family), geometry, gating, dtype, run.seed))
    wanted, most = run.bench.num_blocks, num_blocks(whole)
    if wanted is None or wanted == most:
        return whole
    if wanted > most:
        raise UsageError(f"bench.num_blocks={wanted}, but {name} has {most} MoE blocks in a stack: lower it.")
    return replace(smaller(whole, wanted, whole.family.num_experts, run.seed), blocks=f"{wanted} of {most}")


def num_blocks(model: BenchModel) -> int:
    """The MoE blocks of the stack that has the most."""
    return max(len(layers) for layers in model.family.layers.values())


def smaller(model: BenchModel, blocks: int, num_experts: int, seed: int = 0) -> BenchModel:
    """A random-weight model of the same widths with so many MoE blocks in each stack, and experts in each of them."""
    family = family_of(model.source.config)
    geometry = family.smaller(model.source.config, min(1.0, blocks / num_blocks(model)), num_experts)
    return bench_model(model.name, None, synthetic_checkpoint(family, geometry, model.gating, model.dtype, seed))


def _planned_model(run: Run, checkpoint: str) -> BenchModel:
    """What a plan needs to know of a directory or hub id, from its config.json. A conventional model is planned as it
    will be after conversion."""
    config = read_config(checkpoint)
    family = family_of(config)
    gating = PreGating.of_config(run.pregate)
    if family.is_pregated(config):
        check_gates(run, checkpoint)
        gating = PreGating.from_dict(config.get("pregate"))
    dtype = DTYPES.get(run.bench.dtype, family.config(config).dtype)
    if not isinstance(dtype, torch.dtype):
        dtype = torch.float32 if _is_description(checkpoint) else open_model(checkpoint).default_dtype()
    described = {key: value for key, value in config.items() if key not in LEFT_OUT}
    return bench_model(_name_of(checkpoint), None, synthetic_checkpoint(family, described, gating, dtype, run.seed))


def _is_description(checkpoint: str) -> bool:
    """Whether a directory holds a config.json without weights."""
    place = Path(checkpoint).expanduser()
    return place.is_dir() and not any((place / name).is_file() for name in WEIGHT_FILES)


def _name_of(checkpoint: str) -> str:
    # a training run calls every checkpoint by that name, and its directory by the run's
    place = Path(checkpoint).resolve()
    return place.parent.name if place.name == "checkpoint" else place.name


def _checkpoint_model(run: Run, checkpoint: str) -> BenchModel:
    check_gates(run, checkpoint)
    source = open_model(checkpoint)
    if run.bench.dtype in DTYPES:
        stored = {key: value for key, value in source.config.items() if key != "torch_dtype"}  # the older name
        dtype = dtype_name(DTYPES[run.bench.dtype])
        source = replace(source, config={**stored, "dtype": dtype})
    return bench_model(_name_of(checkpoint), checkpoint, source)


def bench_model(name: str, directory: str | None, source: SourceCheckpoint) -> BenchModel:
    """`source` as a model to measure. Raises `UsageError` if it cannot be served."""
    config = config_of(source.config)
    family = experts_of(config).as_found_in(source.tensors)
    return BenchModel(name, directory, source, family, serving_dtype(config, source, family), config.vocab_size)


def check_models(run: Run, models: Sequence[BenchModel]) -> None:
    """Refuse budgets and numbers of experts that some model cannot be measured with. Raises `UsageError`."""
    for model in models:
        family, batch = model.family, min(run.bench.batches)
        fewest, most = family.top_k, min(family.num_experts, batch * family.top_k)
        if outside := [number for number in run.bench.active_experts if not fewest <= number <= most]:
            raise UsageError(
                f"bench.active_experts={outside[0]}, but at batch {batch} a block of {model.name} uses {fewest} to "
                f"{most} of its {family.num_experts} experts: give a number between."
            )
        for slab_dtype in run.bench.slab_dtypes:
            slab_bytes = model.layout(slab_dtype).slab_bytes
            host_buffers_within(run.engine.host_budget, model.family, slab_bytes)
            for policy, budget in product(run.engine.policies, run.bench.budgets):
                if policy is not Policy.gpu_only:
                    slots_within(budget, policy, model.family, slab_bytes)
            if Drive.device in drives_of(run, model):
                _check_steps(run, model, slab_bytes)


def drives_of(run: Run, model: BenchModel) -> list[Drive]:
    """Those of `bench.drives` that can serve `model`. Raises `UsageError` if none can."""
    config, drives = config_of(model.source.config), list(dict.fromkeys(run.bench.drives))
    if family_named(config.model_type).step is None and Drive.device in drives:
        drives.remove(Drive.device)
        if not drives:
            step_of(config)
    return drives


def _check_steps(run: Run, model: BenchModel, slab_bytes: int) -> None:
    """Refuse experts that the device cannot compute, and budgets with which some batch could not be decoded by it."""
    config = config_of(model.source.config)
    step_of(config)
    if pick_device(run.engine.device).type == "cuda":
        require_triton()
    for policy, budget, batch in product(run.engine.policies, run.bench.budgets, run.bench.batches):
        if policy is not Policy.gpu_only and batch <= MOST_ROWS:
            slots_for(budget, policy, config, slab_bytes, batch)
