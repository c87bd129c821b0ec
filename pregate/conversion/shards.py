"""The files of a conversion, one after the other, in one pass over the source: hashed and copied as it is read.

Memory holds a few tensors at a time, whatever the size of a file. Knows names, tensors and files; knows nothing about
what the model is.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from torch import Tensor

from pregate.conversion.gate_starts import GateStart
from pregate.conversion.tensor_plan import TensorPlan, spelling
from pregate.models.checkpoint import SAFETENSORS_DTYPES, SourceCheckpoint
from pregate.models.family import family_of
from pregate.system.durable import flush_file, write_all, write_json
from pregate.system.unfinished import Unfinished

COPIED_AT_ONCE = 64 << 20
"""Tensors are read in runs of about this size: mapped pages are resident memory until they are dropped."""
READ_AHEAD = 10**9
"""The thread that hashes is ahead of the copies by no more, so that they find what it read in the page cache."""
BLOCK = 16 << 20
PART = ".part"
MAX_SHARD_BYTES = 10**9
"""Default size of an output shard; an interrupted conversion repeats at most two of them."""
HEADER_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def plan_shards(checkpoint: SourceCheckpoint, plan: TensorPlan, max_shard_bytes: int) -> dict[str, list[str]]:
    """Output file -> the output tensors in it, in model order. A file is larger than `max_shard_bytes` only where a
    single tensor is."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, origin in plan.origins.items():
        size = checkpoint.num_bytes(origin)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


@dataclass(frozen=True)
class Shards:
    """The files to write: to each its output tensors, with the source tensors that they are made from.

    spelt: the name of an output tensor in a file. starts: how those begin that are no copy.
    """

    checkpoint: SourceCheckpoint
    origins: Mapping[str, Mapping[str, str]]
    spelt: Callable[[str], str]
    starts: Mapping[str, GateStart] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: SourceCheckpoint, plan: TensorPlan, max_shard_bytes: int) -> Shards:
        """The output tensors of `plan`, with names as in the files of the opened `checkpoint`, and its extras."""
        spelt = spelling(checkpoint, family_of(checkpoint.config))
        checkpoint = plan.with_made(checkpoint.with_extras())
        shards = plan_shards(checkpoint, plan, max_shard_bytes)
        origins = {file: {name: plan.origins[name] for name in names} for file, names in shards.items()}
        return cls(checkpoint, origins, spelt)

    @property
    def sizes(self) -> dict[str, int]:
        """File -> the bytes of its tensors."""
        return {file: sum(map(self.checkpoint.num_bytes, names.values())) for file, names in self.origins.items()}

    def made_from(self) -> dict[str, Any]:
        """What decides the bytes of all files, as plain JSON."""
        names = [[f, *((self.spelt(n), o) for n, o in names.items())] for f, names in self.origins.items()]
        origins = {name: origin for names in self.origins.values() for name, origin in names.items()}
        gates = xxhash.xxh3_64()
        for name, start in ((n, s) for n, s in self.starts.items() if n in origins):  # most gates have no bias
            gates.update(_bytes_of(start(self.checkpoint.read([origins[name]])[origins[name]])))
        return {
            "directory": str(self.checkpoint.directory.absolute()),
            "source": self.checkpoint.identity(),
            "tensors": xxhash.xxh3_64_hexdigest(json.dumps(names).encode()),
            "gates": gates.hexdigest(),
        }


def write_shards(shards: Shards, unfinished: Unfinished, advance: Callable[[int], None]) -> dict[str, str]:
    """Write those files to `unfinished.folder` that are not there, and their index; the SHA-256 of each file of the
    source."""
    folder, sizes = unfinished.folder, shards.sizes
    for left in folder.glob(f"*{PART}"):
        left.unlink()
    known = unfinished.progress.get("source_sha256", {})
    with SourceHashes(shards.checkpoint.files, known, sum(sizes.values()), advance) as source:
        for file, names in shards.origins.items():
            if not (folder / file).is_file():
                write_shard(folder / f"{file}{PART}", shards, names, source.wait_for)
                unfinished.finish_step(partial(_finish, folder / file), {"source_sha256": dict(source.found)})
            else:
                source.wait_for(sizes[file])
            advance(sizes[file])
        unfinished.settle()
        write_index(folder, shards)
        return source.all()


def write_fresh(folder: Path, shards: Shards) -> None:
    """Write all files and their index to `folder`, which is empty."""
    for file, names in shards.origins.items():
        write_shard(folder / file, shards, names, lambda num_bytes: None)
    write_index(folder, shards)


def write_index(folder: Path, shards: Shards) -> None:
    """Which tensor lies in which file, where there are several."""
    if len(shards.origins) > 1:
        weight_map = {shards.spelt(name): file for file, names in shards.origins.items() for name in names}
        index = {"metadata": {"total_size": sum(shards.sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_shard(path: Path, shards: Shards, names: Mapping[str, str], reading: Callable[[int], None]) -> None:
    """A safetensors file, as safetensors itself writes it, but for what is in memory at a time. `reading` is told how
    many bytes will be read next."""
    tensors = shards.checkpoint.tensors
    # its order: wide numbers first, so that all are aligned
    order = sorted(names, key=lambda name: (-tensors[names[name]].dtype.itemsize, shards.spelt(name)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        info = tensors[names[name]]
        begin, end = end, end + info.num_bytes
        offsets = {"dtype": HEADER_DTYPES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
        header[shards.spelt(name)] = offsets
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), len(text).to_bytes(8, "little") + text)
        for run in _runs(order, lambda name: tensors[names[name]].num_bytes):
            reading(sum(tensors[names[name]].num_bytes for name in run))
            read = shards.checkpoint.read({names[name] for name in run})
            for name in run:
                tensor = read[names[name]]
                write_all(file.fileno(), _bytes_of(shards.starts[name](tensor) if name in shards.starts else tensor))


def _runs(names: list[str], size: Callable[[str], int]) -> Iterator[list[str]]:
    run: list[str] = []
    filled = 0
    for name in names:
        if run and filled + size(name) > COPIED_AT_ONCE:
            yield run
            run, filled = [], 0
        run.append(name)
        filled += size(name)
    if run:
        yield run


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(cast(Any, tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _finish(path: Path) -> None:
    """Give a written file its name, which says that it is whole."""
    part = path.with_name(f"{path.name}{PART}")
    flush_file(part)
    part.rename(path)
    flush_file(path.parent)


class SourceHashes:
    """The SHA-256 of each of `files`, found by a thread that reads ahead of what is copied: the disk is read once.

    found: those that are known so far, `known` ones from the start. num_bytes: of all copies.
    """

    def __init__(
        self, files: tuple[Path, ...], known: Mapping[str, str], num_bytes: int, advance: Callable[[int], None]
    ) -> None:
        self.found = {file.name: known[file.name] for file in files if file.name in known}
        self._files, self._advance = files, advance
        self._total = sum(file.stat().st_size for file in files)
        self._num_bytes = num_bytes
        self._changed = threading.Condition()
        self._hashed = self._copied = 0
        self._closed = self._waiting = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SourceHashes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def wait_for(self, num_bytes: int) -> None:
        """Told before so many bytes more are copied; returns when as large a share of the source has been read."""
        with self._changed:
            self._copied += num_bytes
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ahead() >= 0 or self._ended)
        self._check()

    def all(self) -> dict[str, str]:
        """All hashes, in the order of the files."""
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
        self._thread.join()
        self._check()
        return {file.name: self.found[file.name] for file in self._files}

    def _ahead(self) -> float:
        return self._hashed - self._total * self._copied / max(1, self._num_bytes)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for file in self._files:
                if file.name in self.found:
                    self._read(file.stat().st_size)
                else:
                    self._hash(file)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _hash(self, file: Path) -> None:
        digest, block = hashlib.sha256(), bytearray(BLOCK)
        with file.open("rb", buffering=0) as opened:
            while (count := opened.readinto(block)) and not self._closed:
                digest.update(memoryview(block)[:count])
                self._read(count)
        if not self._closed:
            self.found[file.name] = digest.hexdigest()

    def _read(self, count: int) -> None:
        self._advance(count)
        with self._changed:
            self._hashed += count
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ahead() < READ_AHEAD or self._waiting or self._closed)
