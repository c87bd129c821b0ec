"""Where all expert slabs live when they are not on the compute device: host memory (`dram`) or a file (`disk`).

A slab is all matrices of one expert as one contiguous run of bytes, a multiple of 4 KiB. Knows checkpoints and
bytes; knows nothing about slots, policies or models' arithmetic.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pregate.config import UsageError
from pregate.models.adapter import ExpertFamily, ExpertKey
from pregate.models.checkpoint import SourceCheckpoint
from pregate.runtime import human_bytes, write_json

PAGE = 4096
"""O_DIRECT wants addresses, offsets and lengths in multiples of the logical block, at most a page."""
CHUNK = 1 << 30
LINE = 64
"""Matrices start on cache lines, where BLAS reads fastest."""


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class SlabLayout:
    """Where each matrix of an expert lies inside its slab. All slabs of a checkpoint share one layout."""

    dtype: torch.dtype
    matrices: tuple[tuple[str, tuple[int, ...], int], ...]
    slab_bytes: int

    @classmethod
    def of(cls, family: ExpertFamily, dtype: torch.dtype) -> SlabLayout:
        offset, matrices = 0, []
        for name, shape in family.matrices.items():
            matrices.append((name, shape, offset))
            offset = _round_up(offset + torch.Size(shape).numel() * dtype.itemsize, LINE)
        return cls(dtype, tuple(matrices), _round_up(offset, PAGE))

    def views(self, slab: Tensor) -> list[Tensor]:
        """The matrices of a slab (uint8, slab_bytes) as tensors that share its memory."""
        return [
            slab[offset : offset + torch.Size(shape).numel() * self.dtype.itemsize].view(self.dtype).view(shape)
            for _, shape, offset in self.matrices
        ]

    def to_json(self) -> dict[str, Any]:
        matrices = [{"name": n, "shape": list(s), "offset": o} for n, s, o in self.matrices]
        return {"dtype": str(self.dtype).removeprefix("torch."), "slab_bytes": self.slab_bytes, "matrices": matrices}


def aligned_bytes(size: int) -> Tensor:
    """A uint8 tensor of `size` bytes on the CPU that starts at a page boundary."""
    raw = torch.empty(size + PAGE, dtype=torch.uint8)
    start = -raw.data_ptr() % PAGE
    return raw[start : start + size]


def as_buffer(slab: Tensor) -> memoryview:
    """The bytes of a CPU uint8 tensor, for reading and writing files."""
    return memoryview(cast(Any, slab.numpy()))


def page_lock(memory: Tensor) -> None:
    """Page-lock `memory` in place for CUDA copies. Raises `UsageError` if the system allows no more of it."""
    status = int(cast(Any, torch.cuda.cudart()).cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    if status != 0:
        raise UsageError(
            f"{human_bytes(memory.numel())} of host memory could not be page-locked (CUDA error {status}): raise the "
            "limit with ulimit -l, or use engine.tier=disk."
        )


def page_unlock(memory: Tensor) -> None:
    cast(Any, torch.cuda.cudart()).cudaHostUnregister(memory.data_ptr())


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
    """All slabs in the order of execution, one block of the checkpoint mapped at a time."""
    for stack, layers in family.layers.items():
        for block in range(len(layers)):
            keys = [ExpertKey(stack, block, expert) for expert in range(family.num_experts)]
            tensors = checkpoint.read([name for key in keys for name in family.tensor_names(key)])
            for key in keys:
                slab = torch.zeros(layout.slab_bytes, dtype=torch.uint8)
                for view, name in zip(layout.views(slab), family.tensor_names(key), strict=True):
                    view.copy_(tensors[name])
                yield key, slab
            del tensors


class Store(Protocol):
    """Where slabs are read from. `read_into` fills a CPU slab and may be called from several threads."""

    layout: SlabLayout
    in_host_memory: bool

    def read_into(self, key: ExpertKey, slab: Tensor) -> None: ...

    def slab(self, key: ExpertKey) -> Tensor | None:
        """The slab itself where it lies in (page-locked) host memory, else None."""
        ...

    def close(self) -> None: ...


class DramStore:
    """All slabs in host memory, in chunks of about 1 GiB; page-locked in place for a CUDA device.

    Registering plain memory avoids the power-of-two rounding of torch's pinned allocator.
    """

    in_host_memory = True

    def __init__(
        self, checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout, page_locked: bool
    ) -> None:
        self.layout = layout
        keys = family.keys()
        per_chunk = max(1, CHUNK // layout.slab_bytes)
        self._chunks = [
            aligned_bytes(min(per_chunk, len(keys) - first) * layout.slab_bytes)
            for first in range(0, len(keys), per_chunk)
        ]
        self._registered: list[Tensor] = []
        if page_locked:
            for chunk in self._chunks:
                try:
                    page_lock(chunk)
                except UsageError:
                    self.close()
                    raise
                self._registered.append(chunk)
        self._place = {key: divmod(number, per_chunk) for number, key in enumerate(keys)}
        for key, slab in read_slabs(checkpoint, family, layout):
            self.slab(key).copy_(slab)

    def slab(self, key: ExpertKey) -> Tensor:
        chunk, row = self._place[key]
        return self._chunks[chunk][row * self.layout.slab_bytes : (row + 1) * self.layout.slab_bytes]

    def read_into(self, key: ExpertKey, slab: Tensor) -> None:
        slab.copy_(self.slab(key))

    def close(self) -> None:
        for chunk in self._registered:
            page_unlock(chunk)
        self._registered.clear()
        self._chunks.clear()


class DiskStore:
    """Slabs in one file, read with O_DIRECT so that the page cache neither helps nor hides; buffered if it must."""

    in_host_memory = False

    def __init__(self, pack_dir: Path) -> None:
        index = read_index(pack_dir)
        self.layout = index.layout
        self._offsets = index.offsets
        self._path = pack_dir / SLABS
        self._file = -1
        flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
        try:
            self._file = os.open(self._path, flags)
            os.preadv(self._file, [as_buffer(aligned_bytes(PAGE))], 0)
            self.direct = bool(getattr(os, "O_DIRECT", 0))
        except OSError:
            self.close()
            self._file = os.open(self._path, os.O_RDONLY)
            self.direct = False
        if not self.direct:
            warnings.warn(
                f"{self._path}: no O_DIRECT on this file system, reads go through the page cache", stacklevel=2
            )

    def slab(self, key: ExpertKey) -> None:
        return None

    def read_into(self, key: ExpertKey, slab: Tensor) -> None:
        """Fill a page-aligned slab. Raises `OSError` on a short read."""
        offset, size = self._offsets[key], self.layout.slab_bytes
        buffer = as_buffer(slab)
        done = 0
        while done < size:
            got = os.preadv(self._file, [buffer[done:]], offset + done)
            if got <= 0:
                raise OSError(f"{self._path}: {key} ends after {done} of {size} bytes; pack the checkpoint again")
            done += got

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


# --- the pack on disk -----------------------------------------------------------------------------------------------

SLABS, INDEX = "slabs.bin", "index.json"
FORMAT = 1


@dataclass(frozen=True)
class PackIndex:
    layout: SlabLayout
    offsets: dict[ExpertKey, int]
    checksums: dict[ExpertKey, int]
    source: dict[str, Any]


def pack(checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout, pack_dir: Path) -> Path:
    """Write all slabs of `checkpoint` to `pack_dir`, or keep the pack there if it is this checkpoint's.

    Appears whole or not at all, also where another process packs the same checkpoint. Raises `UsageError` if
    something else lies there, if it cannot be written, or if the disk is too small.
    """
    if _belongs(pack_dir, checkpoint, layout):
        return pack_dir
    if pack_dir.exists() and not _is_pack(pack_dir):
        raise UsageError(f"{pack_dir} holds something that is not a pack of experts: choose another engine.pack_dir.")
    try:
        pack_dir.parent.mkdir(parents=True, exist_ok=True)
        scratch = pack_dir.with_name(f"{pack_dir.name}.partial-{os.getpid()}")
        _refuse_full_disk(pack_dir.parent, len(family.keys()) * layout.slab_bytes)
        scratch.mkdir()
    except OSError as error:
        raise UsageError(
            f"The experts cannot be written to {pack_dir} ({error.strerror}): set engine.pack_dir to a directory that "
            "can be made, or use engine.tier=dram."
        ) from error
    try:
        _write_pack(scratch, checkpoint, family, layout)
        _put_in_place(scratch, pack_dir, checkpoint, layout)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return pack_dir


def _write_pack(folder: Path, checkpoint: SourceCheckpoint, family: ExpertFamily, layout: SlabLayout) -> None:
    slabs = []
    with (folder / SLABS).open("wb") as file:
        for number, (key, slab) in enumerate(read_slabs(checkpoint, family, layout)):
            data = as_buffer(slab)
            file.write(data)
            slabs.append({**key._asdict(), "offset": number * layout.slab_bytes, "crc32": zlib.crc32(data)})
        file.flush()
        os.fsync(file.fileno())
    index = {"format": FORMAT, **layout.to_json(), "source": checkpoint.identity(), "slabs": slabs}
    write_json(folder / INDEX, index)


def _put_in_place(scratch: Path, pack_dir: Path, checkpoint: SourceCheckpoint, layout: SlabLayout) -> None:
    """Rename `scratch` to `pack_dir`, unless another process has meanwhile put the same pack there."""
    if _belongs(pack_dir, checkpoint, layout):
        return
    if pack_dir.exists():
        shutil.rmtree(pack_dir)
    try:
        scratch.rename(pack_dir)
    except OSError:
        if not _belongs(pack_dir, checkpoint, layout):
            raise


def _is_pack(folder: Path) -> bool:
    """Whether `folder` may be replaced: it holds a pack, whole or damaged, or nothing at all."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {SLABS, INDEX}


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"The experts need {human_bytes(needed)} under {folder}, which has {human_bytes(free)} free: "
            "set engine.pack_dir to a larger disk."
        )


def _belongs(pack_dir: Path, checkpoint: SourceCheckpoint, layout: SlabLayout) -> bool:
    try:
        index = read_index(pack_dir)
    except UsageError:
        return False
    return index.source == checkpoint.identity() and index.layout == layout


def read_index(pack_dir: Path) -> PackIndex:
    """The index of a pack. Raises `UsageError` if it is damaged or its slab file is too short."""
    try:
        raw = json.loads((pack_dir / INDEX).read_text())
        if raw["format"] != FORMAT:
            raise UsageError(f"{pack_dir} was packed by another version: remove it, and it is packed again.")
        matrices = tuple((m["name"], tuple(m["shape"]), m["offset"]) for m in raw["matrices"])
        layout = SlabLayout(getattr(torch, raw["dtype"]), matrices, raw["slab_bytes"])
        keys = {ExpertKey(s["stack"], s["block"], s["expert"]): s for s in raw["slabs"]}
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UsageError(f"{pack_dir / INDEX} cannot be read: remove {pack_dir}, and it is packed again.") from error
    size = (pack_dir / SLABS).stat().st_size if (pack_dir / SLABS).is_file() else 0
    if size != len(keys) * layout.slab_bytes:
        raise UsageError(f"{pack_dir / SLABS} is truncated: remove {pack_dir}, and it is packed again.")
    offsets = {key: slab["offset"] for key, slab in keys.items()}
    return PackIndex(layout, offsets, {key: slab["crc32"] for key, slab in keys.items()}, raw["source"])
