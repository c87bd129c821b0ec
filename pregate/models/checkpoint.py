"""Reading a Hugging Face model directory tensor by tensor, whatever its weight files look like.

Knows directories, the hub and the two weight formats (safetensors, `.bin`), single or sharded; knows nothing about
model families. Everything is memory-mapped: opening reads headers only, and no whole model is ever in memory.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from pregate.config import UsageError
from pregate.system.console import first_of
from pregate.system.memory import read_ahead

CONFIG = "config.json"
GENERATION = "generation_config.json"
TEXT = "text_config"
"""The section of a config.json that describes the language model, where the whole also reads images or sound."""
QUANTISATION = "quantization_config"
"""The section of a config.json that says how the weights are quantised. `quantised_checkpoints` reads it."""
# in transformers' own order of preference: what it would load is what is read
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

SETTLED_NS = 2 * 10**9
"""The coarsest tick of a file system's clock."""
SAMPLES, SAMPLE_BYTES = 32, 4096


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is, without its data. `key`: its name in the file, where that is another.
    `encoding`: how it is stored where it is quantised; `shape` and `dtype` are those of the decoded tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str | None = None
    encoding: Encoding | None = None

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Encoding:
    """parts: the stored tensors, each with its key, that a tensor of the model is made from. decode: from these to
    it."""

    parts: tuple[TensorInfo, ...]
    decode: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class SourceCheckpoint:
    """An opened checkpoint: its config, its weight files, and what tensors they hold.

    generation: what its `generation_config.json` says. ignored: tensors of the files that the model has no use for.
    extras: tensors that other programs read and the model does not.
    """

    directory: Path
    config: dict[str, Any]
    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    generation: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    extras: dict[str, TensorInfo] = field(default_factory=dict)

    def with_extras(self) -> SourceCheckpoint:
        """The same with the extra tensors among the others."""
        return replace(self, tensors=self.tensors | self.extras, extras={})

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def num_bytes(self, name: str) -> int:
        return self.tensors[name].num_bytes

    def identity(self) -> dict[str, Any]:
        """What the file system says of the weight files, a few of their bytes, and what lies in which: plain JSON.

        Equal to an earlier one, it says that nothing was written in between: a write sets the time of change, which no
        copy keeps and no user sets. The bytes are for file systems that have no such time. Another identity says
        nothing: the same content may have been copied here.
        """
        where = "\n".join(f"{name} {t.file.name} {t.shape} {t.dtype}" for name, t in sorted(self.tensors.items()))
        try:
            files = {file.name: _signs(file) for file in self.files}
        except OSError as error:
            raise UsageError(f"{error.filename} cannot be read any more ({error.strerror}): is it complete?") from error
        return {"files": files, "tensors": xxhash.xxh3_64_hexdigest(where.encode())}

    def settled(self) -> bool:
        """Whether a write from now on is sure to give another identity: not so shortly after the last one, which may
        have the same time by the file system's clock."""
        return time.time_ns() - max((file.stat().st_ctime_ns for file in self.files), default=0) > SETTLED_NS

    def default_dtype(self) -> torch.dtype:
        """The dtype that transformers gives every tensor of a model whose config names none: what the index of the
        weights says, else that of the first tensor of floating-point numbers in the first file."""
        index = next((self.directory / name for name in WEIGHT_FILES if (self.directory / name).is_file()), None)
        if self.files and index is not None and index.suffix == ".json":
            said = (_read_json(index, str(self.directory)).get("metadata") or {}).get("dtype")
            if isinstance(found := getattr(torch, str(said).removeprefix("torch."), None), torch.dtype):
                return found
        dtypes = [tensor.dtype for tensor in self.tensors.values() if not self.files or tensor.file == self.files[0]]
        # of one byte: float8, in which no model is built
        return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), dtypes[0])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, contiguous, on the CPU and mapped from their files; no two of them share memory. Those
        that are quantised are decoded.

        Pages that are touched count as resident memory until the last tensor of the returned dictionary is
        dropped, so read a part of the model, use it, and drop it before reading the next. Treat them as read-only.
        """
        wanted = {name: self.tensors[name] for name in names}
        keys: dict[Path, set[str]] = {}
        for name, info in wanted.items():
            for part in info.encoding.parts if info.encoding else (info,):
                keys.setdefault(part.file, set()).add(part.key or name)
        mapped = {file: _mapped(file, inside) for file, inside in keys.items()}
        read: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, info in wanted.items():
            if info.encoding:
                tensor = info.encoding.decode([mapped[part.file][part.key or name] for part in info.encoding.parts])
            else:
                tensor = mapped[info.file][info.key or name]
            # a view into a larger storage would keep, and let writers save, the whole of that storage
            if not _fills_storage(tensor) or tensor.data_ptr() in seen:
                tensor = tensor.clone().contiguous()
            seen.add(tensor.data_ptr())
            read[name] = tensor
        return read

    def will_read(self, names: Iterable[str]) -> None:
        """Have the system read the named tensors ahead, as far as they are stored as they are; returns at once."""
        for tensor in self.read(name for name in names if not self.tensors[name].encoding).values():
            read_ahead(tensor)

    def same_bits(self, one: str, other: str) -> bool:
        """Whether two tensors of the same shape hold the same bits; compared only where they lie in two places."""
        first, second = self.tensors[one], self.tensors[other]
        if first.dtype != second.dtype:
            return False
        read = self.read([one, other])
        return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in read.values()))


def _signs(file: Path) -> list[int | str]:
    """Size, times of writing and of change, number, and a digest of bytes spread over the file."""
    stat, digest = file.stat(), xxhash.xxh3_64()
    with file.open("rb", buffering=0) as opened:
        for sample in range(SAMPLES):
            opened.seek(max(0, stat.st_size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
            digest.update(opened.read(SAMPLE_BYTES))
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, digest.hexdigest()]


def _fills_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def read_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a directory or hub id; of a hub id, nothing else is downloaded. Where the model has other
    parts beside the language model, the settings of the language model, with those that are told for the whole.

    Raises `UsageError` where there is no such directory or id, or no readable config in it.
    """
    whole = _read_json(local_directory(source, revision, [CONFIG]) / CONFIG, source)
    text = whole.get(TEXT)
    if not isinstance(text, dict) or "model_type" not in text:
        return whole
    return {name: value for name, value in whole.items() if name != TEXT} | text


def read_generation_settings(source: str, revision: str | None = None) -> dict[str, Any]:
    """What the `generation_config.json` of a directory or hub id says; nothing where there is none. Raises `UsageError`
    for one that cannot be read."""
    path = local_directory(source, revision, [GENERATION]) / GENERATION
    return _read_json(path, source) if path.is_file() else {}


def open_checkpoint(source: str, revision: str | None = None) -> SourceCheckpoint:
    """Open a model directory or hub id and check every weight file in it; no tensor data is read.

    Raises `UsageError` for an unknown source, missing or unreadable files, and shards that lack a tensor that
    their index promises.
    """
    config = read_config(source, revision)
    directory, found = _locate_weights(source, revision)
    promised: dict[str, str] = {}
    if found.suffix == ".json":
        promised = _weight_map(found, source)
        files = tuple(directory / name for name in sorted(set(promised.values())))
    else:
        files = (found,)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise UsageError(f"{directory} lacks {file.name}, which {found.name} lists: fetch that shard again.")
        for name, info in _describe(file).items():
            if promised.get(name, file.name) == file.name:
                tensors[name] = info
    lost = sorted(set(promised) - set(tensors))
    if lost:
        raise UsageError(
            f"{directory / promised[lost[0]]} lacks {first_of(lost)}, which {found.name} promises: "
            "fetch that shard and its index again."
        )
    return SourceCheckpoint(directory, config, files, tensors)


def _locate_weights(source: str, revision: str | None) -> tuple[Path, Path]:
    """The directory, and the weight file or index that transformers would choose; of a hub id, only that is fetched."""
    directory = Path()
    for name in WEIGHT_FILES:
        directory = local_directory(source, revision, [name])
        if (directory / name).is_file():
            if name.endswith(".index.json"):
                shards = set(_weight_map(directory / name, source).values())
                directory = local_directory(source, revision, sorted(shards))
            return directory, directory / name
    raise UsageError(
        f"{source} holds no weights: give a directory or hub id with one of {', '.join(WEIGHT_FILES)} in it."
    )


def _weight_map(index: Path, source: str) -> dict[str, str]:
    """Tensor -> file of an index. Raises `UsageError` where it is no such table, or a file lies elsewhere than beside
    the index."""
    promised = _read_json(index, source).get("weight_map")
    if not promised:
        raise UsageError(f"{index} has no weight_map: fetch the checkpoint again.")
    if not isinstance(promised, dict) or not all(isinstance(file, str) for file in promised.values()):
        raise UsageError(
            f"The weight_map of {index} does not say which tensor lies in which file: fetch the index again."
        )
    for name, file in promised.items():
        if file in ("", ".", "..") or any(mark in file for mark in "/\\\0"):
            raise UsageError(
                f"{index} says that {name} lies in {file!r}, which is no name of a file beside it: do not trust this "
                "checkpoint, and fetch it from its publisher."
            )
    return promised


def local_directory(source: str, revision: str | None, names: list[str]) -> Path:
    """`source` itself if it is a directory, else the local snapshot of the hub id with the files `names` fetched."""
    local = Path(source).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise UsageError(f"{source} is a file: give the directory that holds config.json and the weights.")
    where = f"hub id {source!r}" + (f" at revision {revision!r}" if revision else "")
    advice = "give the path of a directory with config.json and weights, or an id such as google/switch-base-8."
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=names))
    except HFValidationError as error:
        raise UsageError(f"There is no directory {source!r} and it cannot be a hub id either: {advice}") from error
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"There is no directory {source!r}, the local cache lacks such a {where}, and the hub cannot be reached: "
            f"{advice}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise UsageError(f"There is no directory {source!r} and the hub denies access to {where}: {advice}") from error


def _read_json(path: Path, source: str) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{source} holds no {path.name}: give a directory or hub id of a Hugging Face model.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: fetch it again.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold a JSON object: fetch it again.")
    return content


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}


def _describe(file: Path) -> dict[str, TensorInfo]:
    """What one weight file holds, from its header where it has one: making a tensor would fault its first pages in."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no iteration)
                known = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        except Exception as error:
            raise UsageError(_unreadable(file)) from error
        if all(dtype in SAFETENSORS_DTYPES for _, dtype in known.values()):
            return {n: TensorInfo(file, shape, SAFETENSORS_DTYPES[dtype]) for n, (shape, dtype) in known.items()}
    return {name: TensorInfo(file, tuple(t.shape), t.dtype) for name, t in _mapped(file).items()}


def _mapped(file: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of one weight file (those of `names`, or all), mapped and not yet read.

    Raises `UsageError` if the file cannot be opened whole.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                return {name: opened.get_tensor(name) for name in names or opened.keys()}
        state = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    # a damaged file can make an unpickler raise nearly anything, and none of it tells the user what to do
    except Exception as error:
        raise UsageError(_unreadable(file)) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and _is_plain(v) for k, v in state.items()):
        raise UsageError(
            f"{file} holds more than a plain state dict: save the model with save_pretrained and use that."
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


def _unreadable(file: Path) -> str:
    with file.open("rb") as opened:
        start = opened.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{file} is a git-lfs pointer, not weights: run `git lfs pull` in {file.parent}."
    if file.suffix != ".safetensors" and zipfile.is_zipfile(file):
        return (
            f"{file} is damaged or holds more than tensors: fetch it again, or use a safetensors version of the model."
        )
    if file.suffix != ".safetensors" and start.startswith(b"\x80"):
        return (
            f"{file} has the format of torch before 1.6, which can run code when it is opened: use a safetensors "
            "version of the model, and ask its publisher for one if there is none."
        )
    return f"{file} is truncated or damaged ({file.stat().st_size:,} bytes): fetch it again and compare its size."
