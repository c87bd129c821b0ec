"""The one way from a directory or hub id to a model: every command opens, checks and loads through here.

Names, shapes and dtypes of all tensors are checked from the headers, before any work. What opens is complete and has
the names of its family. Knows how embedding tables are shared. Knows nothing about tasks, training or engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from pregate.config import UsageError
from pregate.models.checkpoint import (
    CONFIG,
    SourceCheckpoint,
    TensorInfo,
    open_checkpoint,
    read_config,
    read_generation_settings,
)
from pregate.models.experts import ExpertKey, ExpertSpec
from pregate.models.family import Family, dtype_name, family_of
from pregate.models.pregated_models import without_experts
from pregate.models.quantised_checkpoints import decoded
from pregate.models.tensor_names import plain_names
from pregate.system.console import first_of, reason_of, say_once, silent_bars
from pregate.system.durable import write_text

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLETE = "use the complete weights of the model that its config.json describes"
ONE_MODEL = "use the config.json and the weights of one and the same model"


def open_model(source: str, revision: str | None = None) -> SourceCheckpoint:
    """Open a pre-gated or conventional directory or hub id and check all of it; no weights are read, but for comparing
    embedding tables.

    What comes back holds exactly the tensors of the model, under its own names, and a complete config. Raises
    `UsageError` for a model of no known family, and for tensors that are missing, unknown, or of another shape or kind
    than the config says.
    """
    config, generation = read_config(source, revision), read_generation_settings(source, revision)
    config = family_of(config).complete(source, config, generation)
    return checked(replace(open_checkpoint(source, revision), config=config, generation=generation))


def checked(checkpoint: SourceCheckpoint) -> SourceCheckpoint:
    """`checkpoint` under the names of the model that its config describes. Raises `UsageError` as `open_model` does."""
    family = family_of(checkpoint.config)
    config = family.config(checkpoint.config)
    checkpoint = _decoded(checkpoint)
    found = plain_names(checkpoint, family)
    extras = {name: found.pop(name) for name in list(found) if family.is_extra(name, config)}
    if extras:
        say_once(
            f"{checkpoint.directory} holds {len(extras)} tensors that this model does not read, namely "
            f"{first_of(list(extras), 1)}: a conversion carries them along."
        )
    _refuse_other_counts(checkpoint, found, family, config)
    try:
        wanted = parameter_shapes(family, config, family.experts(config).as_found_in(found))
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = reason_of(error)
        raise UsageError(
            f"The config.json of {checkpoint.directory} describes no model that can be built: {reason}."
        ) from error
    all_tables = (*family.input_tables, family.output_table)
    _refuse(checkpoint, "lacks", [name for name in wanted if name not in found and name not in all_tables])
    _refuse(checkpoint, "holds unknown tensors, namely", sorted(set(found) - set(wanted) - family.leftovers))
    for name in sorted(set(found) - family.leftovers):
        shape, dtype = found[name].shape, found[name].dtype
        if shape != wanted[name]:
            raise UsageError(f"{checkpoint.directory} holds {name} of shape {shape}, not {wanted[name]}: {COMPLETE}.")
        if dtype not in FLOATS:
            raise UsageError(
                f"{checkpoint.directory} holds {name} in {dtype_name(dtype)}, as quantised models do: "
                "use the weights in float32, bfloat16 or float16."
            )
    tables = _tables(replace(checkpoint, tensors=found), family, bool(config.tie_word_embeddings))
    # in the order of the files, whose first tensor says the dtype where config.json does not
    kept = {name: info for name, info in found.items() if name in wanted}
    tensors = {name: info for name, info in kept.items() if name not in all_tables or name in tables} | tables
    used = {(info.file, info.key) for info in tensors.values()}
    ignored = sorted(info.key or name for name, info in found.items() if (info.file, info.key) not in used)
    extras |= checkpoint.extras
    return replace(checkpoint, tensors=tensors, ignored=tuple(ignored) or checkpoint.ignored, extras=extras)


def _decoded(checkpoint: SourceCheckpoint) -> SourceCheckpoint:
    """See `decoded`. What it does is told once."""
    opened = decoded(checkpoint)
    dtypes = {info.dtype for info in opened.tensors.values() if info.encoding}
    if dtypes and opened is not checkpoint:
        say_once(
            f"{opened.directory} is quantised: its weights are decoded to {dtype_name(*dtypes)} as they are read, and "
            "a checkpoint that is made from it holds them so."
        )
    return opened


def load_resident(directory: str | Path, revision: str | None = None, **options: Any) -> Any:
    """The whole model in memory, from a pre-gated or a conventional directory or hub id, in evaluation mode.

    `options` go to `from_pretrained` (dtype, device_map, …). Raises `UsageError` as `open_model` does.
    """
    source = open_model(str(directory), revision)
    family = family_of(source.config)
    config = family.config(source.config)
    with silent_bars():
        model = family.model_class.from_pretrained(
            None, config=config, state_dict=_state_of(source, family.experts(config)), **options
        )
    if "generation_config" not in options:
        model.generation_config = generation_config(source)
    return model.eval()


def unfilled(directory: str | Path, revision: str | None = None) -> Any:
    """The model of a checkpoint in float32 and in evaluation mode, without its weights. Raises `UsageError` as
    `open_model` does.

    Memory that nobody has written to takes no room. So of a model that is larger than memory a part can be chosen and
    then filled, see `pregate.training.sharded_saved_state.fill`.
    """
    source = open_model(str(directory), revision)
    family = family_of(source.config)
    with no_init_weights():
        model = family.model_class(family.config(source.config))
    # as from_pretrained does: tables of which a checkpoint holds several, with other bits, are not tied
    model.tie_weights(missing_keys=set(model.state_dict()) - set(source.tensors))
    model.generation_config = generation_config(source)
    return model.eval()


def _state_of(source: SourceCheckpoint, own: ExpertSpec) -> dict[str, Tensor]:
    """All tensors of a checked checkpoint, the experts in the model's own layout."""
    names, blocks = in_own_layout(source, own)
    state = source.read(names)
    for held in blocks:
        state |= held
    return state


def in_own_layout(source: SourceCheckpoint, own: ExpertSpec) -> tuple[list[str], Iterator[dict[str, Tensor]]]:
    """What makes all tensors of the model in memory: the names of those that are stored as it has them, and the tensors
    of each block of experts in another layout, made when they are asked for."""
    found = own.as_found_in(source.tensors)
    blocks = [(stack, block) for stack, layers in own.layers.items() for block in range(len(layers))]
    moved = [block for block in blocks if not own.tensors_of(*block).keys() <= source.tensors.keys()]
    elsewhere = {name for block in moved for name in found.tensors_of(*block)}
    names = [name for name in source.names() if name not in elsewhere]
    return names, (_experts_in_own_layout(source, own, found, *block) for block in moved)


def _experts_in_own_layout(
    source: SourceCheckpoint, own: ExpertSpec, found: ExpertSpec, stack: str, block: int
) -> dict[str, Tensor]:
    """The tensors that hold the experts of one block in memory. `own`: the model's experts; `found`: the same as the
    checkpoint holds them."""
    stored, shapes = source.read(found.tensors_of(stack, block)), own.tensors_of(stack, block)
    held: dict[str, Tensor] = {}
    for expert in range(own.num_experts):
        key = ExpertKey(stack, block, expert)
        for target, origin in zip(own.slices(key), found.slices(key), strict=True):
            part = origin.of(stored[origin.tensor])
            if target.tensor not in held:
                held[target.tensor] = torch.empty(shapes[target.tensor], dtype=part.dtype)
            target.of(held[target.tensor]).copy_(part)
    return held


def mark_conventional(directory: Path) -> None:
    """Rewrite the config of a saved lookahead-0 model so that it is an ordinary upstream checkpoint.

    The tensors have upstream's names already. Raises `ValueError` if the model routes ahead.
    """
    path = directory / CONFIG
    config = json.loads(path.read_text())
    write_text(path, json.dumps(family_of(config).conventional_json(config), indent=2) + "\n")


def parameter_shapes(family: Family, config: Any, experts: ExpertSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model that `config` describes, in its order, its experts in the layout of
    `experts`; nothing is allocated."""
    # the modules of thousands of experts take seconds to make
    with without_experts(), torch.device("meta"):
        model = family.model_class(config)
    inserted = {id(block.module.experts): experts.tensors_of(block.stack, block.index) for block in model.moe_blocks()}
    held: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        held.setdefault(name.rpartition(".")[0], {})[name] = tuple(tensor.shape)
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        shapes |= inserted.get(id(module), {}) | held.get(prefix, {})
    return shapes


# --- refusals -------------------------------------------------------------------------------------------------------


def _refuse(checkpoint: SourceCheckpoint, what: str, names: list[str]) -> None:
    if names:
        raise UsageError(f"{checkpoint.directory} {what} {first_of(names, 3)}: {COMPLETE}.")


def _refuse_other_counts(checkpoint: SourceCheckpoint, names: Iterable[str], family: Family, config: Any) -> None:
    """Experts and layers are counted ahead of their names: one number says more than a thousand missing tensors."""
    names, counts = list(names), family.counts(config)
    held = [len({found[1] for name in names if (found := count.pattern.search(name))}) for count in counts]
    if names and counts and not any(held):
        raise UsageError(
            f"{checkpoint.directory} holds no layer that is named as in a {family.source_type} model, but "
            f"{first_of(names, 3)}: save the model itself, without what wraps it."
        )
    for count, number in zip(counts, held, strict=True):
        if count.said != number:
            raise UsageError(
                f"The config.json of {checkpoint.directory} says {count.setting}={count.said} but its weights hold "
                f"{number} {count.what}: {ONE_MODEL}."
            )


# --- embedding tables -----------------------------------------------------------------------------------------------


def _tables(checkpoint: SourceCheckpoint, family: Family, tied: bool) -> dict[str, TensorInfo]:
    """The embedding tables of the model, each with the stored tensor that fills it.

    A tied model has one, and another only where its bits differ, which is how upstream reads such a file. An untied
    model has all of its own, but older exports share one between those of its inputs, so a missing one is filled from
    those that are there, where these do not differ.
    """
    stored, inputs, output = checkpoint.tensors, family.input_tables, family.output_table
    found = [name for name in ((*inputs, output) if tied else inputs) if name in stored]
    _refuse(checkpoint, "lacks", [] if found else [inputs[0]])
    first, *others = found
    if tied:
        own = [name for name in others if not checkpoint.same_bits(first, name)]
        return {inputs[0]: stored[first]} | {name: stored[name] for name in own}
    _refuse(checkpoint, "lacks", [] if output in stored else [output])
    missing = [name for name in inputs if name not in stored]
    if missing:
        if not all(checkpoint.same_bits(first, name) for name in others):
            raise UsageError(
                f"{checkpoint.directory} lacks {first_of(missing)}, and {first_of(found, 3)} differ, so that none of "
                f"them can fill it: {COMPLETE}."
            )
        say_once(f"{checkpoint.directory} lacks {first_of(missing, 2)}: filled from {first}, as older exports mean it.")
    return {name: stored.get(name, stored[first]) for name in inputs} | {output: stored[output]}


def generation_config(checkpoint: SourceCheckpoint) -> GenerationConfig:
    """How the model generates: as its `generation_config.json` says, else as its config does, with the special tokens
    of the config where the file names none. Raises `UsageError` for settings that cannot be."""
    settings = {name: value for name, value in checkpoint.config.items() if value is not None}
    try:
        if checkpoint.generation:
            named = {name: settings.get(name) for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id")}
            own = {name: value for name, value in checkpoint.generation.items() if value is not None}
            found = GenerationConfig.from_dict({**named, **own})
        else:
            found = GenerationConfig.from_dict(settings, _from_model_config=True)
    except Exception as error:  # its validation brings exception types of its own
        reason = reason_of(error)
        raise UsageError(f"The generation settings of {checkpoint.directory} cannot be used: {reason}.") from error
    # as from_pretrained does: what was published, such as a temperature without do_sample, may be saved as it was
    found._original_object_hash = hash(found)
    return found
