"""Re-attaching gates: a conventional checkpoint in, a pre-gated one out, without training and shard by shard.

Knows how a converted directory is written, whole or not at all. `tensor_plan` decides which tensor goes where,
`pregated_config` what the model becomes, `gate_starts` what moved gates hold, `manifest` what the directory says about
its origin. Every other tensor keeps its name and its bits. Knows nothing about tasks, training or engines.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import DownloadColumn
from safetensors import SafetensorError

from pregate import __version__
from pregate.config import PreGateConfig, Run, UsageError
from pregate.conversion.disk_space import refuse_full_disk, refuse_occupied
from pregate.conversion.gate_starts import GateFitter, gate_starts
from pregate.conversion.manifest import MANIFEST, provenance
from pregate.conversion.pregated_config import target_of
from pregate.conversion.report import ConversionReport
from pregate.conversion.shards import MAX_SHARD_BYTES, Shards, write_shards
from pregate.conversion.tensor_plan import plan_tensors
from pregate.engine.storage.origin import Unchanged
from pregate.models.checkpoint import CONFIG, read_config
from pregate.models.loading import open_model
from pregate.models.side_files import TOKENIZER_FILES, side_files, tokenizer_is_code
from pregate.system.console import progress
from pregate.system.durable import put
from pregate.system.unfinished import Unfinished, unfinished_beside

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
    `init: random`, which draws the gates that move (weights normal with the family's standard deviation, biases zero),
    and for `gate: mlp`, which draws the first layer of each gate's network; the second is zero. `fit` finds the gates
    of `init: calibrated`, which asks for it (`pregate.conversion.calibrate.flow.calibrate` brings one). Without it,
    memory holds the largest tensor, or tensors of 64 MB.

    Raises `UsageError`, before anything is written, for an output in use, a source that is no conventional model of a
    known family, damaged or incomplete weights, and a lookahead that a chosen stack has too few MoE blocks for.
    Whatever fails later, an interrupt included, leaves nothing behind but whole files, with which the same call goes on
    as long as the source is what it was.
    """
    began = time.perf_counter()
    output = Path(output).expanduser()
    refuse_occupied(output)
    target = target_of(source, read_config(source, revision), pregate)
    checkpoint = open_model(source, revision)
    plan = plan_tensors(checkpoint, target.config, seed)
    files = Shards.of(checkpoint, plan, max_shard_bytes)
    sides, is_code = _side_files(source, revision, tokenizer)
    source_bytes, output_bytes = sum(f.stat().st_size for f in checkpoint.files), sum(files.sizes.values())
    refuse_full_disk(output, files.sizes.values())
    with Unchanged(checkpoint):  # fitting takes long, and gates belong to the weights that they were fitted on
        starts, account = gate_starts(plan, target, seed, fit)
    files = replace(files, starts=starts)
    made_from = files.made_from() | {"config": target.json, "pregate": __version__}
    made_from |= {"seed": seed} if plan.made else {}
    bar = "converting", source_bytes + output_bytes, DownloadColumn()
    with _appearing(output, made_from) as unfinished, progress(*bar) as advance:
        with Unchanged(checkpoint) as signs:
            hashes = write_shards(files, unfinished, advance)
        for file in sides:
            shutil.copyfile(file, unfinished.folder / file.name)
        tokens = {name: checkpoint.config[name] for name in SPECIAL_TOKENS if name in checkpoint.config}
        _write_json(unfinished.folder / CONFIG, target.json | tokens)
        origin: dict[str, Any] = {"source": source, "revision": revision, "source_sha256": hashes}
        # after a write that was just now, another one may leave the same signs: content decides then
        origin["source_identity"] = signs.identity if signs.settled else None
        _write_json(unfinished.folder / MANIFEST, origin | provenance(target, seed) | account)
    return ConversionReport(
        output=output,
        gating=target.config.pregating,
        num_blocks=target.num_blocks,
        moves=plan.moves,
        made=plan.made,
        dropped=plan.dropped,
        shards=tuple(files.origins),
        source_bytes=source_bytes,
        output_bytes=output_bytes,
        has_tokenizer=any(file.name in TOKENIZER_FILES for file in sides),
        tokenizer_is_code=is_code,
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


def _side_files(source: str, revision: str | None, tokenizer: str | None) -> tuple[list[Path], bool]:
    """The files to copy unchanged: generation config and tokenizer, the latter from `tokenizer` if that is given. And
    whether the source's tokenizer is left out because it is code."""
    own = side_files(source, revision)
    others = [file for file in own if file.name not in TOKENIZER_FILES]
    if tokenizer is None:
        # files that cannot be opened would stand in the way of another tokenizer that a command names
        return (others, True) if tokenizer_is_code(own) else (own, False)
    chosen = side_files(tokenizer, names=TOKENIZER_FILES)
    if not chosen or tokenizer_is_code(chosen):
        what = "holds a tokenizer that is code" if chosen else "holds no tokenizer"
        raise UsageError(f"{tokenizer} {what}: give a directory or hub id with tokenizer.json in it.")
    return others + chosen, False


@contextmanager
def _appearing(output: Path, made_from: dict[str, Any]) -> Iterator[Unfinished]:
    """A directory to fill beside `output`, which it becomes on success. On a failure it stays if a file of it is
    finished, and else it vanishes."""
    output = output.resolve()
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        with unfinished_beside(output, made_from) as unfinished:
            try:
                yield unfinished
                put(unfinished.folder, output)
            except BaseException as error:
                # the weights are not what they were, or another process was faster
                if isinstance(error, UsageError) or (output.is_dir() and any(output.iterdir())):
                    unfinished.forget()
                raise
    except BaseException as error:
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise UsageError(f"Writing {output} failed ({error}): check the disk and run the command again.") from error
        raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
