"""Re-attaching gates: a conventional checkpoint in, a pre-gated one out, without training and shard by shard.

Knows how a converted directory is written, whole or not at all, and what it says about its origin. Which tensor
goes where is decided in `conversion_plan.py`. Knows nothing about tasks, training or engines. Every tensor that is
not a moved gate keeps its name and its bits.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pregate import __version__
from pregate.config import Init, PreGateConfig, Run, UsageError
from pregate.conversion.plan import GateMove, TensorPlan, plan_shards, plan_tensors
from pregate.engine.storage.pack import refuse_output
from pregate.models.checkpoint import (
    CONFIG,
    TOKENIZER_FILES,
    SourceCheckpoint,
    read_config,
    side_files,
)
from pregate.models.family import Family, families, family_named
from pregate.models.loading import open_model
from pregate.models.pregating import PreGating
from pregate.system.durable import clear_abandoned, free_bytes, partial_beside, put
from pregate.system.sizes import human_bytes

MANIFEST = "pregate_manifest.json"
MAX_SHARD_BYTES = 10**9
"""Default size of an output shard; the pages of one shard are what a conversion holds in memory."""
SPECIAL_TOKENS = ("decoder_start_token_id", "pad_token_id")
"""Settings of a config that opening a checkpoint completes."""
STARTS = {Init.source: "as copies", Init.random: "at random", Init.calibrated: "as fitted"}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did. `dropped` are source tensors that repeat another or that the architecture never reads."""

    output: Path
    gating: PreGating
    num_blocks: dict[str, int]
    moves: tuple[GateMove, ...]
    dropped: tuple[str, ...]
    shards: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    has_tokenizer: bool
    seconds: float

    def told(self, source: str) -> str:
        """What moved, sizes, time, where, and the next command; one line each."""
        gating = self.gating
        lines = [f"{source} -> {self.output}"]
        for stack, blocks in self.num_blocks.items():
            ahead = gating.lookahead_of(stack)
            moved = sum(move.stack == stack and not move.copied for move in self.moves)
            entries = "read the input embeddings" if gating.entry == "embedding" else "stay where they are"
            what = (
                f"{moved} gates moved {ahead} ahead, {ahead} entry gates {entries}" if ahead else "gates stay in place"
            )
            lines.append(f"  {stack}: {blocks} MoE blocks, {what}")
        if gating.lookahead:
            lines.append("  moved gates start " + STARTS[Init(gating.init)])
        lines.append(
            f"  {human_bytes(self.output_bytes)} in {len(self.shards)} safetensors file(s), "
            f"from {human_bytes(self.source_bytes)}, in {self.seconds:.1f} s"
        )
        if not self.has_tokenizer:
            lines.append("  no tokenizer in the source: add model.tokenizer=DIRECTORY_OR_HUB_ID to include one")
        lines.append(f"next: python -m pregate.eval checkpoint={self.output} reference={source}")
        return "\n".join(lines)


@dataclass(frozen=True)
class FittedGates:
    """Gates found otherwise than by copying: output tensors by name, and the account of it for the manifest."""

    tensors: dict[str, Tensor]
    account: dict[str, Any]


GateFitter = Callable[[TensorPlan, Any], FittedGates]
"""Given where tensors move and the config of the pre-gated model; called once nothing else can be refused."""


@dataclass(frozen=True)
class _Architecture:
    """The `config.json` to write, and the parsed config of the model after."""

    family: Family
    json: dict[str, Any]
    target: Any
    num_blocks: dict[str, int]
    """stack -> how many MoE blocks it has"""


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
    (`pregate.conversion.calibration.calibrate` brings one). Without it, memory stays near `max_shard_bytes`.

    Raises `UsageError`, before anything is written, for an output in use, a source that is no conventional Switch
    model, damaged or incomplete weights, and a lookahead that a chosen stack has too few MoE blocks for. Whatever
    fails later, an interrupt included, leaves nothing behind.
    """
    began = time.perf_counter()
    output = Path(output).expanduser()
    refuse_output("output", output)
    clear_abandoned(output)
    _refuse_occupied(output)
    architecture = _architecture(source, read_config(source, revision), pregate)
    checkpoint = open_model(source, revision)
    plan = plan_tensors(checkpoint, architecture.target)
    shards = plan_shards(checkpoint, plan, max_shard_bytes)
    sides = _side_files(source, revision, tokenizer)
    sizes = {file: sum(checkpoint.num_bytes(plan.origins[n]) for n in names) for file, names in shards.items()}
    source_bytes, output_bytes = sum(f.stat().st_size for f in checkpoint.files), sum(sizes.values())
    _refuse_full_disk(output, output_bytes)
    fitted = FittedGates({}, {})
    if pregate.init is Init.calibrated and pregate.lookahead:
        if fit is None:
            raise UsageError(
                "Gates are calibrated on examples of a task: run python -m pregate.convert pregate.init=calibrated "
                "task=NAME, or call pregate.conversion.calibration.calibrate."
            )
        fitted = fit(plan, architecture.target)

    with _appearing(output) as partial, _progress(source_bytes + output_bytes) as advance:
        hashes = {file.name: _sha256(file, advance) for file in checkpoint.files}
        for file, names in shards.items():
            _write_shard(partial / file, checkpoint, plan, names, architecture.target, seed, fitted.tensors)
            advance(sizes[file])
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": output_bytes}, "weight_map": weight_map}
            _write_json(partial / "model.safetensors.index.json", index)
        for file in sides:
            shutil.copyfile(file, partial / file.name)
        tokens = {name: checkpoint.config[name] for name in SPECIAL_TOKENS if name in checkpoint.config}
        _write_json(partial / CONFIG, architecture.json | tokens)
        origin = {"source": source, "revision": revision, "source_sha256": hashes}
        account = {"calibration": fitted.account} if fitted.account else {}
        _write_json(partial / MANIFEST, origin | _provenance(architecture, seed) | account)
    return ConversionReport(
        output=output,
        gating=architecture.target.pregating,
        num_blocks=architecture.num_blocks,
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


def check_convertible(source: str, config: dict[str, Any], pregate: PreGateConfig) -> None:
    """Raises `UsageError` if a source with that `config.json` cannot be pre-gated so."""
    _architecture(source, config, pregate)


def _architecture(source: str, config: dict[str, Any], pregate: PreGateConfig) -> _Architecture:
    """Parse the source's config and place the gates in it. Raises `UsageError` if it cannot be converted so."""
    family = _family(source, config)
    try:
        conventional = family.config(config)
    except UsageError as error:
        reason = f"{error}"[0].lower() + f"{error}"[1:]
        raise UsageError(f"{source} holds no {family.source_type} model: {reason}") from error
    num_blocks = family.num_blocks(conventional)
    if not any(num_blocks.values()):
        raise UsageError(
            f"{source} is a dense model, none of its layers holds experts: give a Mixture-of-Experts checkpoint."
        )
    gating = PreGating.of_config(pregate).within(num_blocks)
    written = family.pregated_json(config, gating)
    return _Architecture(family, written, family.config(written), num_blocks)


def _family(source: str, config: dict[str, Any]) -> Family:
    """Raises `UsageError` for a model that cannot be converted, or need not be."""
    kind = config.get("model_type")
    known = sorted(family.source_type for family in families())
    give = f"give a checkpoint of type {' or '.join(known)}."
    if kind is None:
        raise UsageError(f"The config.json of {source} names no model_type: {give}")
    for family in families():
        if kind == family.source_type:
            return family
        if kind == family.model_type:
            ahead = family.config(config).pregating.lookahead
            raise UsageError(f"{source} is already pre-gated (lookahead {ahead}): convert the model it was made from.")
    if any("expert" in key for key in config):
        raise UsageError(f"{source} is a {kind} model, which cannot be converted: {give}")
    raise UsageError(f"{source} is a dense {kind} model without experts: {give}")


def _refuse_occupied(output: Path) -> None:
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
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    bar = Progress("converting", BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    bar.disable = not sys.stderr.isatty()
    with bar:
        task = bar.add_task("converting", total=total)
        yield lambda done: bar.advance(task, done)


def _write_shard(
    path: Path,
    checkpoint: SourceCheckpoint,
    plan: TensorPlan,
    names: list[str],
    config: Any,
    seed: int,
    fitted: dict[str, Tensor],
) -> None:
    mapped = checkpoint.read({plan.origins[name] for name in names})
    moved = {name for move in plan.moves for name in move.renamed} if config.pregating.init == Init.random else set()
    std = family_named(config.model_type).gate_std(config)
    tensors: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name in names:
        tensor = mapped[plan.origins[name]]
        if name in fitted:
            assert fitted[name].shape == tensor.shape, (name, fitted[name].shape, tensor.shape)
            tensor = fitted[name].detach().to("cpu", tensor.dtype).clone()
        elif name in moved:
            tensor = _drawn(tensor, plan.origins[name], std, seed)
        elif tensor.data_ptr() in stored:
            tensor = tensor.clone()  # the safetensors writer refuses tensors that share memory
        stored.add(tensor.data_ptr())
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # the writer's files are private to the user whatever the umask


def _drawn(like: Tensor, name: str, std: float, seed: int) -> Tensor:
    """A random gate of the shape and dtype of `like`. Depends on `seed` and `name` alone, not on the order of calls."""
    if like.ndim < 2:  # a bias of any kind
        return torch.zeros_like(like)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return (torch.randn(like.shape, generator=generator) * std).to(like.dtype)


def _sha256(file: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _provenance(architecture: _Architecture, seed: int) -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {
        **architecture.target.pregating.to_dict(),
        "seed": seed,
        "num_moe_blocks": architecture.num_blocks,
        "versions": {"pregate": __version__}
        | {name: installed(name) for name in ("torch", "transformers", "safetensors")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
