"""The pack: all slabs of a checkpoint in one file, with an index of where each lies and what it must contain.

Written block by block, appears whole or not at all, and is kept until its checkpoint changes. Knows checkpoints and
files; knows nothing about who reads the slabs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pregate.config import SlabDtype, UsageError
from pregate.durable import LOCK, clear_abandoned, free_bytes, partial_beside, put
from pregate.engine.slabs import SlabLayout, aligned_bytes, as_buffer
from pregate.models.adapter import ExpertFamily, ExpertKey
from pregate.models.checkpoint import SourceCheckpoint
from pregate.runtime import human_bytes, write_json

SLABS, INDEX = "slabs.bin", "index.json"
FORMAT = 3
MAPPED_BYTES = 64 << 20
"""Experts are read from the checkpoint in runs of about this size: mapped pages are resident memory until dropped."""


@dataclass(frozen=True)
class PackIndex:
    """Offsets in the slab file and XXH3 checksums, by expert."""

    layout: SlabLayout
    offsets: dict[ExpertKey, int]
    checksums: dict[ExpertKey, int]
    source: dict[str, Any]


def checksum(slab_B: Tensor) -> int:
    """XXH3-64 of a CPU slab: about as fast as memory, so that checking does not slow reading."""
    return xxhash.xxh3_64_intdigest(as_buffer(slab_B))


def expert_dtype(checkpoint: SourceCheckpoint, family: ExpertFamily) -> torch.dtype:
    """The dtype of the experts in `checkpoint`. Raises `UsageError` if it lacks one of them, or has it in another
    shape than its config.json says."""
    for key in family.keys():  # noqa: SIM118 - not a mapping
        for name, shape in zip(family.tensor_names(key), family.matrices.values(), strict=True):
            found = checkpoint.tensors.get(name)
            if found is None or found.shape != shape:
                what = f"lacks {name}" if found is None else f"holds {name} of shape {found.shape}, not {shape}"
                raise UsageError(
                    f"{checkpoint.directory} {what}: use the complete weights of the model that its config.json "
                    "describes."
                )
    return checkpoint.dtype(family.tensor_names(family.keys()[0])[0])


def read_slabs(
    checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout
) -> Iterator[tuple[ExpertKey, Tensor]]:
    """All slabs in the order of execution. The slab handed out is overwritten by the next."""
    keys = family.keys()
    at_once = max(1, MAPPED_BYTES // layout.matrix_bytes)
    slab = aligned_bytes(layout.slab_bytes)
    for first in range(0, len(keys), at_once):
        run = keys[first : first + at_once]
        tensors = checkpoint.read([name for key in run for name in family.tensor_names(key)])
        for key in run:
            layout.encode([tensors[name].to(layout.dtype) for name in family.tensor_names(key)], slab)
            yield key, slab
        del tensors


def default_pack_dir(directory: Path, stored: SlabDtype) -> Path:
    """Beside the weights; each slab dtype has a pack of its own."""
    return directory / ("experts" if stored is SlabDtype.source else f"experts-{stored}")


def pack(checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout, pack_dir: Path) -> Path:
    """Write all slabs of `checkpoint` to `pack_dir`, or keep the pack there if it is this checkpoint's.

    Appears whole or not at all, also where another process packs the same checkpoint. Raises `UsageError` if
    something else lies there, if it cannot be written, or if the disk is too small.
    """
    clear_abandoned(pack_dir)
    if _belongs(pack_dir, checkpoint, family, layout):
        return pack_dir
    if pack_dir.exists() and not _is_pack(pack_dir):
        raise UsageError(f"{pack_dir} holds something that is not a pack of experts: choose another engine.pack_dir.")
    try:
        _refuse_full_disk(pack_dir.parent, len(family.keys()) * layout.slab_bytes)
        with partial_beside(pack_dir) as scratch:
            _write_pack(scratch, checkpoint, family, layout)
            _put_in_place(scratch, pack_dir, checkpoint, family, layout)
    except OSError as error:
        raise UsageError(
            f"The experts cannot be written to {pack_dir} ({error.strerror or error}): set engine.pack_dir to a "
            "directory that can be made and filled, or use engine.tier=dram."
        ) from error
    return pack_dir


def _write_pack(folder: Path, checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout) -> None:
    slabs = []
    with (folder / SLABS).open("wb") as file:
        for number, (key, slab) in enumerate(read_slabs(checkpoint, family, layout)):
            file.write(as_buffer(slab))
            slabs.append({**key._asdict(), "offset": number * layout.slab_bytes, "xxh3_64": checksum(slab)})
    index = {"format": FORMAT, **layout.to_json(), "source": checkpoint.identity(), "slabs": slabs}
    write_json(folder / INDEX, index)


def _put_in_place(
    scratch: Path, pack_dir: Path, checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout
) -> None:
    """Rename `scratch` to `pack_dir`, unless another process has meanwhile put the same pack there."""
    if _belongs(pack_dir, checkpoint, family, layout):
        return
    with partial_beside(pack_dir) as aside:  # what lay there goes once the new one is on the disk
        if pack_dir.exists():
            pack_dir.rename(aside / pack_dir.name)
        try:
            put(scratch, pack_dir)
        except OSError:
            if not _belongs(pack_dir, checkpoint, family, layout):
                raise


def _is_pack(folder: Path) -> bool:
    """Whether `folder` may be replaced: it holds a pack, whole or damaged, or nothing at all."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {SLABS, INDEX, LOCK}


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise UsageError(
            f"The experts need {human_bytes(needed)} under {folder}, which has {human_bytes(free)} free: "
            "set engine.pack_dir to a larger disk."
        )


def _belongs(pack_dir: Path, checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout) -> bool:
    try:
        index = read_index(pack_dir)
    except UsageError:
        return False
    return (
        index.source == checkpoint.identity() and index.layout == layout and index.offsets.keys() == set(family.keys())
    )


def read_index(pack_dir: Path) -> PackIndex:
    """The index of a pack. Raises `UsageError` if it is damaged or its slab file is too short."""
    try:
        raw = json.loads((pack_dir / INDEX).read_text())
        if raw["format"] != FORMAT:
            raise UsageError(f"{pack_dir} was packed by another version: remove it, and it is packed again.")
        layout = SlabLayout.from_json(raw)
        slabs = {ExpertKey(s["stack"], s["block"], s["expert"]): s for s in raw["slabs"]}
        offsets = {key: slab["offset"] for key, slab in slabs.items()}
        checksums = {key: slab["xxh3_64"] for key, slab in slabs.items()}
        if list(offsets.values()) != [number * layout.slab_bytes for number in range(len(raw["slabs"]))]:
            raise ValueError("slabs that overlap or leave gaps")
        source = raw["source"]
    except UsageError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{pack_dir / INDEX} cannot be read: remove {pack_dir}, and it is packed again.") from error
    size = (pack_dir / SLABS).stat().st_size if (pack_dir / SLABS).is_file() else 0
    if size != len(slabs) * layout.slab_bytes:
        raise UsageError(f"{pack_dir / SLABS} is truncated: remove {pack_dir}, and it is packed again.")
    return PackIndex(layout, offsets, checksums, source)
