"""Re-attaching gates: a conventional checkpoint in, a pre-gated one out, without training and shard by shard.

Knows how a converted directory is written, whole or not at all, and what it says about its origin. `plan` decides which
tensor goes where, `target` what the model becomes. Every tensor that is not a moved gate keeps its name and its bits.
Knows nothing about tasks, training or engines.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pregate import __version__
from pregate.config import Init, PreGateConfig, Run, UsageError
from pregate.conversion.plan import TensorPlan, plan_shards, plan_tensors
from pregate.conversion.report import ConversionReport
from pregate.conversion.target import Target, target_of
from pregate.engine.storage.pack import refuse_output
from pregate.models.checkpoint import (
    CONFIG,
    TOKENIZER_FILES,
    SourceCheckpoint,
    read_config,
    side_files,
)
from pregate.models.loading import open_model
from pregate.system.durable import clear_abandoned, free_bytes, partial_beside, put
from pregate.system.sizes import human_bytes

MANIFEST = "pregate_manifest.json"
MAX_SHARD_BYTES = 10**9
"""Default size of an output shard; the pages of one shard are what a conversion holds in memory."""
SPECIAL_TOKENS = ("decoder_start_token_id", "pad_token_id")
"""Settings of a config that opening a checkpoint completes."""


@dataclass(frozen=True)
class FittedGates:
    """Gates found otherwise than by copying: output tensors by name, and the account of it for the manifest."""

    tensors: dict[str, Tensor]
    account: dict[str, Any]


GateFitter = Callable[[TensorPlan, Any], FittedGates]
"""Given where tensors move and the config of the pre-gated model; called once nothing else can be refused."""

GateStart = Callable[[Tensor], Tensor]
"""Given the stored tensor of a gate, what the tensor of the gate ahead starts as, in the same shape and dtype."""


def convert(
    source: str,
    output: Path,
    pregate: PreGateConfig,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    fit: GateFitter | None = None,
) -> ConversionReport:
    """Write the pre-gated form of `source` (a directory or hub id) to the new directory `output`.

    `tokenizer` is a directory or hub id whose tokenizer files replace the source's. `seed` matters for
    `init: random` alone, which draws the gates that move: weights normal with the family's standard deviation, biases
    zero. `fit` finds the gates of `init: calibrated`, which asks for it
    (`pregate.conversion.calibrate.flow.calibrate` brings one). Without it, memory stays near `max_shard_bytes`.

    Raises `UsageError`, before anything is written, for an output in use, a source that is no conventional model of a
    known family, damaged or incomplete weights, and a lookahead that a chosen stack has too few MoE blocks for.
    Whatever fails later, an interrupt included, leaves nothing behind.
    """
    began = time.perf_counter()
    output = Path(output).expanduser()
    _refuse_occupied(output)
    target = target_of(source, read_config(source, revision), pregate)
    checkpoint = open_model(source, revision)
    plan = plan_tensors(checkpoint, target.config)
    shards = plan_shards(checkpoint, plan, max_shard_bytes)
    sides = _side_files(source, revision, tokenizer)
    sizes = {file: sum(checkpoint.num_bytes(plan.origins[n]) for n in names) for file, names in shards.items()}
    source_bytes, output_bytes = sum(f.stat().st_size for f in checkpoint.files), sum(sizes.values())
    _refuse_full_disk(output, output_bytes)
    starts, account = _gate_starts(plan, target, seed, fit)
    with _appearing(output) as unfinished, _progress(source_bytes + output_bytes) as advance:
        hashes = {file.name: _sha256(file, advance) for file in checkpoint.files}
        for file, names in shards.items():
            _write_shard(unfinished / file, {name: plan.origins[name] for name in names}, checkpoint, starts)
            advance(sizes[file])
        _write_index(unfinished, shards, output_bytes)
        for file in sides:
            shutil.copyfile(file, unfinished / file.name)
        tokens = {name: checkpoint.config[name] for name in SPECIAL_TOKENS if name in checkpoint.config}
        _write_json(unfinished / CONFIG, target.json | tokens)
        origin = {"source": source, "revision": revision, "source_sha256": hashes}
        _write_json(unfinished / MANIFEST, origin | _provenance(target, seed) | account)
    return ConversionReport(
        output=output,
        gating=target.config.pregating,
        num_blocks=target.num_blocks,
        moves=plan.moves,
        dropped=plan.dropped,
        shards=tuple(shards),
        source_bytes=source_bytes,
        output_bytes=output_bytes,
        has_tokenizer=any(file.name in TOKENIZER_FILES for file in sides),
        seconds=time.perf_counter() - began,
    )


def convert_for(run: Run, source: str, output: Path, fit: GateFitter | None = None) -> ConversionReport:
    """`convert` with the settings of `run`."""
    return convert(
        source,
        output,
        run.pregate,
        revision=run.model.revision,
        tokenizer=run.model.tokenizer,
        seed=run.seed,
        fit=fit,
    )


def _refuse_occupied(output: Path) -> None:
    refuse_output("output", output)
    clear_abandoned(output)
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists already: name a new output directory, or remove it first.")


def _refuse_full_disk(output: Path, needed: int) -> None:
    free = free_bytes(output.parent)
    if needed > free:
        raise UsageError(
            f"The checkpoint needs {human_bytes(needed)} and the disk of {output} has {human_bytes(free)} free: "
            "make room, or choose another disk."
        )


def _side_files(source: str, revision: str | None, tokenizer: str | None) -> list[Path]:
    """The files to copy unchanged: generation config and tokenizer, the latter from `tokenizer` if that is given."""
    own = side_files(source, revision)
    if tokenizer is None:
        return own
    chosen = side_files(tokenizer, names=TOKENIZER_FILES)
    if not chosen:
        raise UsageError(f"{tokenizer} holds no tokenizer: give a directory or hub id with tokenizer.json in it.")
    return [file for file in own if file.name not in TOKENIZER_FILES] + chosen


def _gate_starts(
    plan: TensorPlan, target: Target, seed: int, fit: GateFitter | None
) -> tuple[dict[str, GateStart], dict[str, Any]]:
    """How each output tensor of a gate starts that is no copy, and what the manifest says of it."""
    init = Init(target.config.pregating.init)
    if init is Init.random:
        std = target.family.gate_std(target.config)
        moved = {name: origin for move in plan.moves for name, origin in move.renamed.items()}
        return {name: partial(_drawn, name=origin, std=std, seed=seed) for name, origin in moved.items()}, {}
    if init is not Init.calibrated or not target.config.pregating.lookahead:
        return {}, {}
    if fit is None:
        raise UsageError(
            "Gates are calibrated on examples of a task: run python -m pregate.convert pregate.init=calibrated "
            "task=NAME, or call pregate.conversion.calibrate.flow.calibrate."
        )
    fitted = fit(plan, target.config)
    starts = {name: partial(_as_stored, found) for name, found in fitted.tensors.items()}
    return starts, {"calibration": fitted.account}


def _drawn(like: Tensor, name: str, std: float, seed: int) -> Tensor:
    """A random gate of the shape and dtype of `like`. Depends on `seed` and `name` alone, not on the order of calls."""
    if like.ndim < 2:  # a bias of any kind
        return torch.zeros_like(like)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return (torch.randn(like.shape, generator=generator) * std).to(like.dtype)


def _as_stored(found: Tensor, like: Tensor) -> Tensor:
    assert found.shape == like.shape, (found.shape, like.shape)
    return found.detach().to("cpu", like.dtype).clone()


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A directory to fill beside `output`: it becomes `output` on success and vanishes on any failure."""
    output = output.resolve()
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        with partial_beside(output) as partial:
            yield partial
            put(partial, output)
    except BaseException as error:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise UsageError(f"Writing {output} failed ({error}): check the disk and run the command again.") from error
        raise


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes on a terminal, nothing elsewhere. Yields a function that advances it."""
    bar = Progress("converting", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    bar.disable = not sys.stderr.isatty()
    with bar:
        task = bar.add_task("converting", total=total)
        yield lambda done: bar.advance(task, done)


def _write_shard(
    path: Path, origins: dict[str, str], checkpoint: SourceCheckpoint, starts: Mapping[str, GateStart]
) -> None:
    """A file of the output tensors in `origins`, each from its source tensor."""
    mapped = checkpoint.read(set(origins.values()))
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, origin in origins.items():
        tensor = mapped[origin]
        if name in starts:
            tensor = starts[name](tensor)
        elif tensor.data_ptr() in stored:
            tensor = tensor.clone()  # the safetensors writer refuses tensors that share memory
        stored.add(tensor.data_ptr())
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # the writer's files are private to the user whatever the umask


def _write_index(directory: Path, shards: dict[str, list[str]], num_bytes: int) -> None:
    """Which tensor lies in which file, where there are several."""
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


def _sha256(file: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _provenance(target: Target, seed: int) -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {
        **target.config.pregating.to_dict(),
        "seed": seed,
        "num_moe_blocks": target.num_blocks,
        "versions": {"pregate": __version__}
        | {name: installed(name) for name in ("torch", "transformers", "safetensors")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
