#!/usr/bin/env python3
"""Write a conventional checkpoint with random weights, as large as the real one, for what is measured without it.

    python scripts/random_checkpoint.py DIR model=olmoe_1b_7b [bench.dtype=fp32] [seed=1]

DIR gets config.json and safetensors shards of about 1 GB in bfloat16, with a tensor for each matrix of each expert
where the family has such a layout, as published checkpoints have. One shard is in memory at a time.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import DownloadColumn
from safetensors.torch import save_file

from pregate.cli import compose_run
from pregate.config import Precision, Run, UsageError
from pregate.conversion.disk_space import refuse_full_disk, refuse_occupied
from pregate.models.checkpoint import CONFIG, TensorInfo
from pregate.models.family import Family, family_named
from pregate.models.loading import parameter_shapes
from pregate.models.pregating import PreGating
from pregate.models.synthetic import SyntheticCheckpoint, synthetic_checkpoint
from pregate.system.console import progress
from pregate.system.durable import clear_abandoned, partial_beside, put, write_json

SHARD_BYTES = 10**9


def random_checkpoint(run: Run) -> tuple[Family, SyntheticCheckpoint]:
    """The checkpoint of the model's geometry, its experts in the layout that published checkpoints have."""
    if not run.model.geometry:
        raise UsageError(f"The model {run.model.name} has no geometry: choose another model=NAME.")
    dtype = torch.float32 if run.bench.dtype is Precision.fp32 else torch.bfloat16
    family = family_named(run.model.family)
    found = synthetic_checkpoint(family, run.model.geometry, PreGating(), dtype, run.seed)
    config = family.config(found.config)
    experts = family.experts(config)
    published = replace(experts, layouts=experts.layouts[::-1])
    tied = parameter_shapes(family, config, experts).keys() - found.tensors.keys()
    shapes = parameter_shapes(family, config, published)
    tensors = {name: TensorInfo(Path(), shape, dtype) for name, shape in shapes.items() if name not in tied}
    return family, replace(found, tensors=tensors)


def shards_of(source: SyntheticCheckpoint) -> dict[str, list[str]]:
    """File -> the tensors in it."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in source.names():
        if groups[-1] and filled + source.num_bytes(name) > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += source.num_bytes(name)
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": names for n, names in enumerate(groups, 1)}


def write(run: Run, output: Path) -> None:
    family, source = random_checkpoint(run)
    shards = shards_of(source)
    sizes = {file: sum(map(source.num_bytes, names)) for file, names in shards.items()}
    refuse_occupied(output)
    refuse_full_disk(output, sizes.values())
    clear_abandoned(output)
    with partial_beside(output) as folder, progress("writing", sum(sizes.values()), DownloadColumn()) as advance:
        for file, names in shards.items():
            save_file(source.read(names), folder / file, metadata={"format": "pt"})
            advance(sizes[file])
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
        config = json.loads(family.config(source.config).to_json_string(use_diff=False))
        write_json(folder / CONFIG, family.conventional_json(config))
        put(folder, output)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        write(compose_run(sys.argv[2:]), Path(sys.argv[1]))
    except UsageError as error:
        sys.exit(str(error))
