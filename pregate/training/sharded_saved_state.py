"""The files of a sharded run: a state of which every process writes and reads its own part, and a checkpoint like any.

torch.distributed.checkpoint writes the parts as safetensors files, one a process, with their places in their headers,
so opening a state never runs code from it. A state opens on any number of processes, sharded or not, and so does one
that a run without sharding has saved. Knows nothing about the loop that calls it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.core_model_loading import revert_weight_conversion

from pregate.config import UsageError
from pregate.models.family import experts_of
from pregate.models.loading import in_own_layout, open_model
from pregate.system.console import silent_bars
from pregate.system.process_exit import PeerFailedError
from pregate.system.process_group import join, main_only
from pregate.training.durable_directories import place_to_fill, replaced, write_side_files, write_step
from pregate.training.saved_state import (
    OPTIMIZER_FILE,
    STATE_FILE,
    checksum,
    clear_superseded,
    load_last,
    other_model,
    places_before,
    record_of,
    write_checksums,
    write_record,
)
from pregate.training.sharding import ShardedModel, whole
from pregate.training.state_values import TrainState, load_optimizer_state, optimizer_state, tensors_of

MODEL, OPTIMIZER = "model/", "optimizer/"
"""What stands before the names of tensors in the parts."""
PARTS = "parts"
"""In `STATE_FILE`: how many processes wrote a part. A state that one process wrote whole does not name it."""
FILE_BYTES = 5 * 10**9
"""Weight files of a checkpoint are about this large."""

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TOGETHER = 64
"""So many tensors are read from a checkpoint at a time."""

T = TypeVar("T")


# --- states ---------------------------------------------------------------------------------------------------------


def save_last(
    directory: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    random_states: Sequence[dict[str, Any]],
    keep: int = 2,
) -> None:
    """As `saved_state.save_last`, of a sharded model. Every process calls it, and none gathers anything."""
    tensors, numbers = optimizer_state(optimizer, model)
    # steps are scalars of every parameter, the same in every process
    numbers |= {name: tensors.pop(name).item() for name in list(tensors) if not tensors[name].ndim}
    parts = {MODEL + name: tensor for name, tensor in tensors_of(model)}
    parts |= {OPTIMIZER + name: tensor for name, tensor in tensors.items()}
    earlier = places_before(directory, keep)
    with _replaced_by_all(directory, earlier) as fresh:
        save(parts, storage_writer=HuggingFaceStorageWriter(str(fresh), save_distributed=True))
        own = f"shard-{join().process_index + 1:05}-*"
        sums = dict(of_all(lambda: [(path.name, checksum(path)) for path in fresh.glob(own)]))
        if join().is_main_process:
            write_record(fresh, state, numbers, random_states, **{PARTS: join().num_processes})
            write_checksums(fresh, sums | {STATE_FILE: checksum(fresh / STATE_FILE)})
    if join().is_main_process:
        clear_superseded(directory, earlier)


@contextmanager
def _replaced_by_all(directory: Path, earlier: Sequence[Path]) -> Iterator[Path]:
    """As `replaced`, for a directory in which every process writes files. If one fails, all do, and the first of them
    tells."""
    fresh, main = place_to_fill(directory), join().is_main_process
    held = replaced(directory, earlier)
    main_only(held.__enter__, "making a directory for the state")
    try:
        if not all(of_all(lambda: [fresh.is_dir()])):
            raise UsageError(
                f"{directory.parent} is not the same directory for all processes: choose a run_dir=DIR on a disk that "
                "they share."
            )
        yield fresh
    except BaseException as error:
        cause = _cause(error)
        if main:
            held.__exit__(type(cause), cause, cause.__traceback__)
        elif cause is not error:
            raise PeerFailedError from cause
        raise cause from None
    main_only(lambda: held.__exit__(None, None, None), "putting the state in its place")


def _cause(error: BaseException) -> BaseException:
    """What a process met, where torch.distributed.checkpoint tells of it in all of them."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def of_all(work: Callable[[], list[T]]) -> list[T]:
    """The lists of all processes in one. If one of them fails, the main process raises what the first of those has met,
    and the others raise `PeerFailedError`."""
    failed: list[BaseException] = []
    found: list[T] = []
    try:
        found = work()
    except Exception as error:
        failed = [error]
    everything, failures = gather_object(found), gather_object(failed)
    if failures:
        raise failures[0] if join().is_main_process else PeerFailedError
    return everything


def open_last(
    directory: Path, model: Any, optimizer: torch.optim.Optimizer, sharded: ShardedModel | None
) -> tuple[TrainState, list[dict[str, Any]]] | None:
    """As `load_last`, for states and models that are sharded and those that are not, in any combination."""
    if not directory.exists():
        return None
    record = record_of(directory)
    if PARTS in record:
        _read_parts(directory, model, optimizer, record["optimizer"])
    elif sharded is None:
        return load_last(directory, model, optimizer)
    else:
        fill(model, str(directory))
        _split_optimizer_state(directory, model, optimizer, record["optimizer"])
    return TrainState(**record["state"]), record["random"]


def _read_parts(directory: Path, model: Any, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    reader = HuggingFaceStorageReader(str(directory))
    found = {name: tuple(entry.size) for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    tensors = {MODEL + name: tensor for name, tensor in tensors_of(model)}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != {
        name: shape for name, shape in found.items() if name.startswith(MODEL)
    }:
        raise other_model(directory)
    parameters = dict(model.named_parameters())
    states: dict[str, Tensor] = {}
    for name in (name.removeprefix(OPTIMIZER) for name in found if name.startswith(OPTIMIZER)):
        parameter = parameters[name.rpartition("/")[0]]
        states[name] = torch.zeros_like(parameter.detach())
    # without a process group: each reads for itself, and a failure of one leaves no other waiting
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load({**tensors, **{OPTIMIZER + k: v for k, v in states.items()}}, storage_reader=reader, no_dist=True)
    steps = {name: torch.tensor(value, dtype=torch.float32) for name, value in numbers.items()}
    load_optimizer_state(optimizer, model, {**states, **steps}, {})


def _split_optimizer_state(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]
) -> None:
    parameters, states = dict(model.named_parameters()), {}
    with safe_open(directory / OPTIMIZER_FILE, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118
            tensor, parameter = stored.get_tensor(name), parameters[name.rpartition("/")[0]]
            states[name] = _like(parameter, tensor) if tensor.shape == parameter.shape else tensor
    load_optimizer_state(optimizer, model, states, numbers)


# --- models ---------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Of a checkpoint: a directory or hub id, and its revision there."""

    source: str
    revision: str | None


@torch.no_grad()
def fill(model: Any, source: str, revision: str | None = None) -> None:
    """Give `model` the weights of a checkpoint, of each tensor the part that this process holds.

    `TOGETHER` tensors, or the experts of one block, are in memory at a time. Raises `UsageError` for a checkpoint of
    another model.
    """
    opened = open_model(source, revision)
    names, blocks = in_own_layout(opened, experts_of(model.config))
    targets = dict(tensors_of(model))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for first in range(0, len(names), TOGETHER):
            yield from opened.read(names[first : first + TOGETHER]).items()
        for block in blocks:
            yield from block.items()

    left = set(targets)
    for name, tensor in tensors():
        target = targets.get(name)
        if target is None or target.shape != tensor.shape:
            raise other_model(source)
        target.copy_(_like(target, tensor))
        left.discard(name)
    if left:
        raise other_model(source)


def _like(target: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which every process has, as `target` lies: its part of it on its device."""
    if not isinstance(target, DTensor):
        return tensor.to(target.device, target.dtype)
    tensor = tensor.to(target.device, target.dtype)
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def save_checkpoint(
    directory: Path,
    model: Any,
    layers: Iterable[nn.Module],
    tokenizer: Any,
    carry: Sequence[Path] = (),
    step: int | None = None,
) -> None:
    """As `save_model`, of a sharded model: every process calls it, and the main one gathers and writes layer by layer.

    It holds about `FILE_BYTES` and one layer at a time.
    """
    main = join().is_main_process
    with replaced(directory) if main else nullcontext() as fresh:
        files = None if fresh is None else WeightFiles(fresh)
        if fresh is not None:
            with silent_bars():
                model.save_pretrained(fresh, state_dict={})  # configs, and a file without weights
            write_side_files(fresh, tokenizer, carry)
            write_step(fresh, step)
        for group in _by_layer(model, layers):
            gathered = {}
            for name, tensor in group.items():
                full = whole(tensor)
                if files is not None:
                    gathered[name] = full.cpu()
            if files is not None:
                files.add(revert_weight_conversion(model, gathered))
        if files is not None:
            files.close()
    main_only(lambda: None, "writing the checkpoint")


def _by_layer(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[dict[str, Tensor]]:
    """The tensors of `model`, those of a layer together: upstream may split or join them for its files."""
    left = dict(tensors_of(model))
    of_layer = {id(layer) for layer in layers}
    for name, module in model.named_modules():
        if id(module) in of_layer:
            found = {key: left.pop(key) for key in list(left) if key.startswith(f"{name}.")}
            yield found
    yield left


class WeightFiles:
    """Safetensors files of about `FILE_BYTES` in `directory`, with their index where there are several."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._waiting: dict[str, Tensor] = {}
        self._written: list[list[str]] = []
        self._num_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            # a part of a larger tensor would be written with all of it
            self._waiting[name] = tensor.clone(memory_format=torch.contiguous_format)
            self._num_bytes += tensor.nbytes
            if sum(waiting.nbytes for waiting in self._waiting.values()) >= FILE_BYTES:
                self._write()

    def _write(self) -> None:
        self._written.append(list(self._waiting))
        save_file(self._waiting, self._file(len(self._written), 0), metadata={"format": "pt"})
        self._waiting = {}

    def _file(self, number: int, count: int) -> Path:
        name = f"model-{number:05}-of-{count:05}.safetensors" if count != 1 else WEIGHTS_FILE
        return self.directory / name

    def close(self) -> None:
        """Write what waits, and give the files their names."""
        if self._waiting:
            self._write()
        count = len(self._written)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._written, 1):
            file = self._file(number, count)
            self._file(number, 0).replace(file)
            weight_map |= dict.fromkeys(names, file.name)
        if count > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": weight_map}
            (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2))
            (self.directory / WEIGHTS_FILE).unlink(missing_ok=True)
