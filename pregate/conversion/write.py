"""Re-attaching gates: a conventional checkpoint in, a pre-gated one out, without training and shard by shard.

Knows how a converted directory is written, whole or not at all, and what it says about its origin. `plan` decides which
tensor goes where, `pregated_config` what the model becomes, `gate_starts` what moved gates hold. Every other tensor
keeps its name and its bits. Knows nothing about tasks, training or engines.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.progress import DownloadColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pregate import __version__
from pregate.config import PreGateConfig, Run, UsageError
from pregate.conversion.gate_starts import GateFitter, GateStart, gate_starts
from pregate.conversion.plan import TensorPlan, plan_shards, plan_tensors, spelling
from pregate.conversion.pregated_config import Target, target_of
from pregate.conversion.report import ConversionReport
from pregate.conversion.space import refuse_full_disk, refuse_occupied
from pregate.models.checkpoint import (
    CONFIG,
    TOKENIZER_FILES,
    SourceCheckpoint,
    read_config,
    side_files,
)
from pregate.models.family import family_of
from pregate.models.loading import open_model
from pregate.system.console import progress
from pregate.system.durable import partial_beside, put

MANIFEST = "pregate_manifest.json"
MAX_SHARD_BYTES = 10**9
"""Default size of an output shard; the pages of one shard are what a conversion holds in memory."""
SPECIAL_TOKENS = ("decoder_start_token_id", "pad_token_id")
"""Settings of a config that opening a checkpoint completes."""


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
    refuse_occupied(output)
    target = target_of(source, read_config(source, revision), pregate)
    checkpoint = open_model(source, revision)
    plan, checkpoint = plan_tensors(checkpoint, target.config), checkpoint.with_extras()
    shards = plan_shards(checkpoint, plan, max_shard_bytes)
    sides = _side_files(source, revision, tokenizer)
    source_bytes = sum(file.stat().st_size for file in checkpoint.files)
    output_bytes = sum(checkpoint.num_bytes(origin) for origin in plan.origins.values())
    refuse_full_disk(output, [output_bytes])
    starts, account = gate_starts(plan, target, seed, fit)
    bar = "converting", source_bytes + output_bytes, DownloadColumn()
    with _appearing(output) as unfinished, progress(*bar) as advance:
        hashes = {file.name: _sha256(file, advance) for file in checkpoint.files}
        write_shards(unfinished, checkpoint, plan, starts, max_shard_bytes, advance)
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


def write_shards(
    directory: Path,
    checkpoint: SourceCheckpoint,
    plan: TensorPlan,
    starts: Mapping[str, GateStart],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Weight files of the output tensors of `plan`, and their index if there are several. Each tensor is that of the
    opened `checkpoint`, or what `starts` makes of it. No more than one file of tensors is in memory at a time;
    `advance` is told the size of each."""
    spelt = spelling(checkpoint, family_of(checkpoint.config))
    shards = plan_shards(checkpoint, plan, max_shard_bytes)
    sizes = {file: sum(checkpoint.num_bytes(plan.origins[n]) for n in names) for file, names in shards.items()}
    for file, names in shards.items():
        origins = {name: plan.origins[name] for name in names}
        _write_shard(directory / file, origins, checkpoint, starts, spelt)
        advance(sizes[file])
    _write_index(directory, {file: [*map(spelt, names)] for file, names in shards.items()}, sum(sizes.values()))


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


def _side_files(source: str, revision: str | None, tokenizer: str | None) -> list[Path]:
    """The files to copy unchanged: generation config and tokenizer, the latter from `tokenizer` if that is given."""
    own = side_files(source, revision)
    if tokenizer is None:
        return own
    chosen = side_files(tokenizer, names=TOKENIZER_FILES)
    if not chosen:
        raise UsageError(f"{tokenizer} holds no tokenizer: give a directory or hub id with tokenizer.json in it.")
    return [file for file in own if file.name not in TOKENIZER_FILES] + chosen


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


def _write_shard(
    path: Path,
    origins: dict[str, str],
    checkpoint: SourceCheckpoint,
    starts: Mapping[str, GateStart],
    spelt: Callable[[str], str],
) -> None:
    """A file of the output tensors in `origins`, each from its source tensor and with its name as `spelt`."""
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
        tensors[spelt(name)] = tensor
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
