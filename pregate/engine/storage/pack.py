"""The pack: all slabs of a checkpoint in one file, with an index of where each lies and what it must contain.

Written block by block, appears whole or not at all, and is kept until the content it was made from changes (`origin`).
Knows checkpoints and files; knows nothing about movers.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from pregate.config import SlabDtype, UsageError
from pregate.engine.storage.aligned_memory import aligned_bytes, as_buffer
from pregate.engine.storage.origin import MAPPED_BYTES, SEEN, Unchanged, content, is_origin, read_experts, remember
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.checkpoint import CONFIG, SourceCheckpoint
from pregate.models.experts import ExpertKey, ExpertSpec
from pregate.system.byte_sizes import human_bytes
from pregate.system.console import say
from pregate.system.directory_lock import is_held, try_lock
from pregate.system.durable import (
    MARKS,
    clear_abandoned,
    clear_scratch,
    flush_file,
    free_bytes,
    partial_beside,
    put,
    write_all,
    write_json,
)
from pregate.system.unfinished import Unfinished, reclaimable_bytes, unfinished_beside

SLABS, INDEX = "slabs.bin", "index.json"
FORMAT = 4
RECORDED_BYTES = 10**9
"""So much is written between two points from which an interrupted packing goes on."""
PUT_WAIT_S = 10.0
"""How long another process is waited for that puts a pack into the same folder, which takes it milliseconds."""
_put_lock = threading.Lock()


@dataclass(frozen=True)
class PackIndex:
    """By expert: offsets in the slab file, XXH3 checksums of the slabs, and the `content` each was made from; and a
    digest of the index itself."""

    layout: SlabLayout
    offsets: dict[ExpertKey, int]
    checksums: dict[ExpertKey, int]
    contents: dict[ExpertKey, int]
    digest: str


def checksum(slab_B: Tensor) -> int:
    """XXH3-64 of a CPU slab: about as fast as memory, so that checking does not slow reading."""
    return xxhash.xxh3_64_intdigest(as_buffer(slab_B))


def check_experts(checkpoint: SourceCheckpoint, family: ExpertSpec) -> None:
    """Raises `UsageError` if `checkpoint` lacks an expert, or has it in another shape than its config.json says."""
    blocks = ((stack, block) for stack, layers in family.layers.items() for block in range(len(layers)))
    for name, shape in ((n, s) for stack, block in blocks for n, s in family.tensors_of(stack, block).items()):
        found = checkpoint.tensors.get(name)
        if found is None or found.shape != shape:
            what = f"lacks {name}" if found is None else f"holds {name} of shape {found.shape}, not {shape}"
            raise UsageError(
                f"{checkpoint.directory} {what}: use the complete weights of the model that its config.json describes."
            )


def read_slabs(
    checkpoint: SourceCheckpoint, family: ExpertSpec, layout: SlabLayout
) -> Iterator[tuple[ExpertKey, Tensor]]:
    """All slabs in the order of execution. The slab handed out is overwritten by the next."""
    slab = aligned_bytes(layout.slab_bytes)
    for key, matrices in read_experts(checkpoint, family):
        layout.encode([matrix.to(layout.dtype) for matrix in matrices], slab)
        yield key, slab


def default_pack_dir(directory: Path, stored: SlabDtype) -> Path:
    """Beside the weights; each slab dtype has a pack of its own."""
    return directory / ("experts" if stored is SlabDtype.source else f"experts-{stored}")


def refuse_output(setting: str, place: Path) -> None:
    """Raises `UsageError` for a directory of results that is a model's own, or that lies where a model's experts are
    packed: they would replace each other's files."""
    place = place.expanduser().resolve()
    if (place / CONFIG).is_file():
        raise UsageError(f"{place} holds a model: choose another {setting}=DIR.")
    names = {default_pack_dir(place, stored).name for stored in SlabDtype}
    for folder in (place, *place.parents):
        if (folder / SLABS).is_file() or (folder.name in names and (folder.parent / CONFIG).is_file()):
            raise UsageError(f"{folder} is where the experts of a model are packed: choose another {setting}=DIR.")


def pack(checkpoint: SourceCheckpoint, family: ExpertSpec, layout: SlabLayout, pack_dir: Path) -> Path:
    """Write all slabs of `checkpoint` to `pack_dir`, or keep the pack there if it was made from the same content.

    Appears whole or not at all, also where another process packs the same checkpoint. Where it is stopped, the same
    call goes on from the last `RECORDED_BYTES`. Raises `UsageError` if something else lies there, if it cannot be
    written, if the disk is too small, or if the weights are written to meanwhile.
    """
    if (reason := _mismatch(pack_dir, checkpoint, family, layout)) is None:
        clear_abandoned(pack_dir)
        clear_scratch(pack_dir)  # another process that writes there meanwhile writes the signs, and does without
        return pack_dir
    if pack_dir.exists() and not _is_pack(pack_dir):
        raise UsageError(f"{pack_dir} holds something that is not a pack of experts: choose another engine.pack_dir.")
    if (pack_dir / INDEX).is_file():
        say(f"{pack_dir} {reason}: the experts are packed again.")
    try:
        needed = len(family.keys()) * layout.slab_bytes - reclaimable_bytes(pack_dir)
        _refuse_full_disk(pack_dir.parent, needed)
        with unfinished_beside(pack_dir, _made_from(checkpoint, family, layout)) as unfinished:
            try:
                _write_pack(unfinished, checkpoint, family, layout)
            except UsageError:  # the weights are not what they were
                unfinished.forget()
                raise
            _put_in_place(unfinished.folder, pack_dir, checkpoint, family, layout)
            unfinished.forget()  # another process may have put the same there
    except OSError as error:
        raise UsageError(
            f"The experts cannot be written to {pack_dir} ({error.strerror or error}): set engine.pack_dir to a "
            "directory that can be made and filled, or use engine.tier=dram."
        ) from error
    return pack_dir


def _made_from(checkpoint: SourceCheckpoint, family: ExpertSpec, layout: SlabLayout) -> dict[str, Any]:
    """What decides every byte of a pack."""
    names = xxhash.xxh3_64_hexdigest(repr([family.slices(key) for key in family.keys()]).encode())  # noqa: SIM118
    return {"format": FORMAT, "source": checkpoint.identity(), "experts": names, "layout": layout.to_json()}


def _write_pack(unfinished: Unfinished, checkpoint: SourceCheckpoint, family: ExpertSpec, layout: SlabLayout) -> None:
    folder, slabs = unfinished.folder, list(unfinished.progress.get("slabs", []))
    at_once = max(1, RECORDED_BYTES // layout.slab_bytes)
    # one is written while the next is made, unless they are so large that memory would tell
    buffers = [aligned_bytes(layout.slab_bytes) for _ in range(2 if layout.slab_bytes <= MAPPED_BYTES else 1)]
    written: deque[Future[dict[str, Any]]] = deque()

    def write(slab: Tensor, described: dict[str, Any]) -> dict[str, Any]:
        write_all(file.fileno(), as_buffer(slab))
        return described | {"xxh3_64": checksum(slab)}

    def wait(left: int) -> None:
        while len(written) > left:
            slabs.append(written.popleft().result())
            if len(slabs) % at_once == 0:
                unfinished.finish_step(partial(flush_file, folder / SLABS), {"slabs": list(slabs)})

    with (
        Unchanged(checkpoint) as signs,
        (folder / SLABS).open("r+b" if slabs else "wb", buffering=0) as file,
        ThreadPoolExecutor(1) as writer,
    ):
        file.truncate(len(slabs) * layout.slab_bytes)
        file.seek(0, os.SEEK_END)
        for number, (key, matrices) in enumerate(read_experts(checkpoint, family, len(slabs)), len(slabs)):
            wait(len(buffers) - 1)
            slab = buffers[number % len(buffers)]
            layout.encode([matrix.to(layout.dtype) for matrix in matrices], slab)
            place = {"offset": number * layout.slab_bytes, "source_xxh3_64": content(matrices)}
            written.append(writer.submit(write, slab, key._asdict() | place))
        wait(0)
        unfinished.settle()
    write_json(folder / INDEX, {"format": FORMAT, **layout.to_json(), "slabs": slabs})
    remember(folder, read_index(folder).digest, signs, family)


def _put_in_place(
    scratch: Path, pack_dir: Path, checkpoint: SourceCheckpoint, family: ExpertSpec, layout: SlabLayout
) -> None:
    """Rename `scratch` to `pack_dir`, unless another process has meanwhile put the same pack there."""
    # what lay there goes once the new one is on the disk
    with _alone_in(pack_dir.parent), partial_beside(pack_dir) as aside:
        if _mismatch(pack_dir, checkpoint, family, layout) is None:
            return
        try:
            if pack_dir.exists():
                pack_dir.rename(aside / pack_dir.name)
            put(scratch, pack_dir)
        except OSError:  # where nothing was locked, another may have come in between
            if _mismatch(pack_dir, checkpoint, family, layout) is not None:
                raise


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While no other thread that asks for the same is here too, and no other process, where the file system has locks.

    A command may hold the folder to its end. Then no other process is waited for, or not for long.
    """
    limit = time.monotonic() + (0.0 if is_held(folder) else PUT_WAIT_S)
    opened = os.open(folder, os.O_RDONLY)
    try:
        with _put_lock:
            while not try_lock(opened) and time.monotonic() < limit:
                time.sleep(0.01)
            yield
    finally:
        os.close(opened)


def _is_pack(folder: Path) -> bool:
    """Whether `folder` may be replaced: it holds a pack, whole or damaged, or nothing at all."""
    # the last is what is left where writing it was cut short
    return folder.is_dir() and all(
        path.name in (SLABS, INDEX, SEEN, *MARKS) or path.name.startswith(f".{SEEN}.") for path in folder.iterdir()
    )


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise UsageError(
            f"The experts need {human_bytes(needed)} under {folder}, which has {human_bytes(free)} free: "
            "set engine.pack_dir to a larger disk."
        )


def _mismatch(pack_dir: Path, checkpoint: SourceCheckpoint, family: ExpertSpec, layout: SlabLayout) -> str | None:
    """Why the pack in `pack_dir` is not that of `checkpoint`, or None if it is."""
    try:
        index = read_index(pack_dir)
    except OtherVersionError:
        return "was packed by another version"
    except UsageError:
        return "is damaged"
    if index.layout != layout or index.offsets.keys() != set(family.keys()):
        return "holds experts of another form or dtype"
    if not is_origin(pack_dir, index.digest, index.contents, checkpoint, family):
        return f"was packed from other weights than {checkpoint.directory} holds now"
    return None


class OtherVersionError(UsageError):
    """A pack of another format."""


def read_index(pack_dir: Path) -> PackIndex:
    """The index of a pack. Raises `UsageError` if it is damaged or its slab file is too short."""
    try:
        text = (pack_dir / INDEX).read_bytes()
        raw = json.loads(text)
        if raw["format"] != FORMAT:
            raise OtherVersionError(f"{pack_dir} was packed by another version: remove it, and it is packed again.")
        layout = SlabLayout.from_json(raw)
        slabs = {ExpertKey(s["stack"], s["block"], s["expert"]): s for s in raw["slabs"]}
        offsets = {key: slab["offset"] for key, slab in slabs.items()}
        checksums = {key: slab["xxh3_64"] for key, slab in slabs.items()}
        if list(offsets.values()) != [number * layout.slab_bytes for number in range(len(raw["slabs"]))]:
            raise ValueError("slabs that overlap or leave gaps")
        contents = {key: int(slab["source_xxh3_64"]) for key, slab in slabs.items()}
    except UsageError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{pack_dir / INDEX} cannot be read: remove {pack_dir}, and it is packed again.") from error
    size = (pack_dir / SLABS).stat().st_size if (pack_dir / SLABS).is_file() else 0
    if size != len(slabs) * layout.slab_bytes:
        raise UsageError(f"{pack_dir / SLABS} is truncated: remove {pack_dir}, and it is packed again.")
    return PackIndex(layout, offsets, checksums, contents, xxhash.xxh3_64_hexdigest(text))
