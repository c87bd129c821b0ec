"""The one way from a directory or hub id to a Switch model: every command opens, checks and loads through here.

Names, shapes and dtypes of all tensors are checked from the headers, before any work; what opens is complete and has
the model's own names. Knows what other tools put before names, how embedding tables are shared, and where the special
tokens stand. Knows nothing about tasks, training or engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pregate.config import UsageError
from pregate.models.checkpoint import (
    SourceCheckpoint,
    TensorInfo,
    open_checkpoint,
    read_config,
    read_generation_settings,
)
from pregate.models.families.switch import LEFTOVERS, PreGatedSwitchTransformersForConditionalGeneration
from pregate.models.families.switch_layers import (
    PreGatedSwitchTransformersConfig,
    switch_expert_family,
    without_experts,
)
from pregate.models.pregating import STACKS
from pregate.system.console import first_of, say, silent_bars

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LM_HEAD = "lm_head.weight"
TABLES = (*EMBEDDINGS, LM_HEAD)
PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "model.", "switch_transformers.")
"""What wrappers put before every name: DistributedDataParallel, torch.compile, FSDP, training frameworks, upstream."""
INSIDE = re.compile(r"(?<=\.)(_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)")
"""What they put into names where layers are wrapped one by one; the last is activation checkpointing."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLETE = "use the complete weights of the model that its config.json describes"
ONE_MODEL = "use the config.json and the weights of one and the same model"


def open_model(source: str, revision: str | None = None) -> SourceCheckpoint:
    """Open a pre-gated or conventional Switch directory or hub id and check all of it; no weights are read, but for
    comparing embedding tables.

    What comes back holds exactly the tensors of the model, under its own names, and a config with the token that the
    decoder begins with. Raises `UsageError` for any other model, and for tensors that are missing, unknown, or of
    another shape or kind than the config says.
    """
    config, generation = read_config(source, revision), read_generation_settings(source, revision)
    config = _with_tokens(source, config, generation)
    return checked(replace(open_checkpoint(source, revision), config=config, generation=generation))


def checked(checkpoint: SourceCheckpoint) -> SourceCheckpoint:
    """`checkpoint` under the names of the model that its config describes. Raises `UsageError` as `open_model` does."""
    config = PreGatedSwitchTransformersConfig.of_checkpoint(checkpoint.config)
    found = _stripped(checkpoint)
    _refuse_other_counts(checkpoint, found, config)
    try:
        wanted = parameter_shapes(config)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"The config.json of {checkpoint.directory} describes no model that can be built: {reason}."
        ) from error
    _refuse(checkpoint, "lacks", [name for name in wanted if name not in found and name not in TABLES])
    _refuse(checkpoint, "holds unknown tensors, namely", sorted(set(found) - set(wanted) - LEFTOVERS))
    for name in sorted(set(found) - LEFTOVERS):
        shape, dtype = found[name].shape, found[name].dtype
        if shape != wanted[name]:
            raise UsageError(f"{checkpoint.directory} holds {name} of shape {shape}, not {wanted[name]}: {COMPLETE}.")
        if dtype not in FLOATS:
            raise UsageError(
                f"{checkpoint.directory} holds {name} in {str(dtype).removeprefix('torch.')}, as quantised models do: "
                "use the weights in float32, bfloat16 or float16."
            )
    tables = _tables(replace(checkpoint, tensors=found), bool(config.tie_word_embeddings))
    # in the order of the files, whose first tensor says the dtype where config.json does not
    tensors = {name: info for name, info in found.items() if (name in wanted and name not in TABLES) or name in tables}
    tensors |= tables
    used = {(info.file, info.key) for info in tensors.values()}
    ignored = sorted(info.key or name for name, info in found.items() if (info.file, info.key) not in used)
    return replace(checkpoint, tensors=tensors, ignored=tuple(ignored) or checkpoint.ignored)


def load_resident(
    directory: str | Path, revision: str | None = None, **options: Any
) -> PreGatedSwitchTransformersForConditionalGeneration:
    """The whole model in memory, from a pre-gated or a conventional Switch directory or hub id, in evaluation mode.

    `options` go to `from_pretrained` (dtype, device_map, …). Raises `UsageError` as `open_model` does.
    """
    source = open_model(str(directory), revision)
    config = PreGatedSwitchTransformersConfig.of_checkpoint(source.config)
    with silent_bars():
        model = PreGatedSwitchTransformersForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=source.read(source.names()), **options
        )
    if "generation_config" not in options:
        model.generation_config = generation_config(source)
    return model.eval()


def parameter_shapes(config: PreGatedSwitchTransformersConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model that `config` describes, in its order; nothing is allocated."""
    family = switch_expert_family(config)
    # the modules of thousands of experts take seconds to make
    with without_experts(), torch.device("meta"):
        model = PreGatedSwitchTransformersForConditionalGeneration(config)
    experts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key in family.keys():  # noqa: SIM118 - not a mapping
        for name, shape in zip(family.tensor_names(key), family.matrices.values(), strict=True):
            experts.setdefault(name.partition(".mlp.")[0], {})[name] = shape
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        shapes |= experts.pop(name.removesuffix(".layer_norm.weight"), {})  # behind it in a layer stands its norm
        shapes[name] = tuple(tensor.shape)
    assert not experts, list(experts)
    return shapes


# --- names ----------------------------------------------------------------------------------------------------------


def _stripped(checkpoint: SourceCheckpoint) -> dict[str, TensorInfo]:
    """The tensors by their names without what wrappers put before them, in the order of the files."""
    found: dict[str, TensorInfo] = {}
    removed: dict[str, set[str]] = {"before": set(), "inside": set()}
    for stored, info in checkpoint.tensors.items():
        whole = _without_prefixes(stored)
        name = INSIDE.sub("", whole)
        if name in found:
            raise UsageError(
                f"{checkpoint.directory} holds both {found[name].key or name} and {stored}, which name the same "
                "tensor: keep the one of the trained model."
            )
        found[name] = replace(info, key=info.key or stored)
        removed["before"] |= {stored.removesuffix(whole)} - {""}
        removed["inside"] |= set(INSIDE.findall(whole))
    for where, parts in removed.items():
        if parts:
            _say_once(
                f"{checkpoint.directory} has {first_of(sorted(parts), 3)} {where} the names of tensors, as wrapped "
                "models have: it is left out."
            )
    return found


def _without_prefixes(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


@lru_cache
def _say_once(sentence: str) -> None:
    """One command opens a checkpoint several times; what is odd about it is told once."""
    say(sentence)


def _refuse(checkpoint: SourceCheckpoint, what: str, names: list[str]) -> None:
    if names:
        raise UsageError(f"{checkpoint.directory} {what} {first_of(names, 3)}: {COMPLETE}.")


def _refuse_other_counts(
    checkpoint: SourceCheckpoint, names: Iterable[str], config: PreGatedSwitchTransformersConfig
) -> None:
    """Experts and layers are counted ahead of their names: one number says more than a thousand missing tensors."""
    names = list(names)
    numbers: dict[str, set[str]] = {stack: set() for stack in STACKS} | {"expert": set()}
    for name in names:
        if found := re.match(r"(encoder|decoder)\.block\.(\d+)\.", name):
            numbers[found[1]].add(found[2])
        if found := re.search(r"\.mlp\.experts\.expert_(\d+)\.", name):
            numbers["expert"].add(found[1])
    if names and not (numbers["encoder"] or numbers["decoder"]):
        raise UsageError(
            f"{checkpoint.directory} holds no layer that is named as in a Switch model, but {first_of(names, 3)}: save "
            "the model itself, without what wraps it."
        )
    sparse = any(config.moe_layers(stack) for stack in STACKS)
    for setting, what, said, held in (
        ("num_layers", "encoder layers", config.num_layers, len(numbers["encoder"])),
        ("num_decoder_layers", "decoder layers", config.num_decoder_layers, len(numbers["decoder"])),
        ("num_experts", "experts a block", config.num_experts if sparse else 0, len(numbers["expert"])),
    ):
        if said != held:
            raise UsageError(
                f"The config.json of {checkpoint.directory} says {setting}={said} but its weights hold {held} {what}: "
                f"{ONE_MODEL}."
            )


# --- embedding tables -----------------------------------------------------------------------------------------------


def _tables(checkpoint: SourceCheckpoint, tied: bool) -> dict[str, TensorInfo]:
    """The embedding tables of the model, each with the stored tensor that fills it.

    A tied model has one, and another only where its bits differ, which is how upstream reads such a file. An untied
    model has four of their own, but older exports share one between the first three, so a missing one is filled from
    those that are there, where these do not differ.
    """
    stored = checkpoint.tensors
    found = [name for name in (TABLES if tied else EMBEDDINGS) if name in stored]
    _refuse(checkpoint, "lacks", [] if found else [EMBEDDINGS[0]])
    first, *others = found
    if tied:
        own = [name for name in others if not checkpoint.same_bits(first, name)]
        return {EMBEDDINGS[0]: stored[first]} | {name: stored[name] for name in own}
    _refuse(checkpoint, "lacks", [] if LM_HEAD in stored else [LM_HEAD])
    missing = [name for name in EMBEDDINGS if name not in stored]
    if missing:
        if not all(checkpoint.same_bits(first, name) for name in others):
            raise UsageError(
                f"{checkpoint.directory} lacks {first_of(missing)}, and {first_of(found, 3)} differ, so that none of "
                f"them can fill it: {COMPLETE}."
            )
        _say_once(
            f"{checkpoint.directory} lacks {first_of(missing, 2)}: filled from {first}, as older exports mean it."
        )
    return {name: stored.get(name, stored[first]) for name in EMBEDDINGS} | {LM_HEAD: stored[LM_HEAD]}


# --- special tokens -------------------------------------------------------------------------------------------------


def _with_tokens(source: str, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    """`config` with the token that the decoder begins with: its own, else that of `generation_config.json`, else the
    padding token. Raises `UsageError` where there is none."""
    parsed = PreGatedSwitchTransformersConfig.of_checkpoint(config)
    pad, start = parsed.pad_token_id, config.get("decoder_start_token_id")
    pad = generation.get("pad_token_id") if pad is None else pad
    start = generation.get("decoder_start_token_id") if start is None else start
    start = pad if start is None else start
    if start is None:
        raise UsageError(
            f"{source} names no decoder_start_token_id and no pad_token_id: add to its config.json the id that its "
            "decoder was trained to begin with."
        )
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < parsed.vocab_size:
        raise UsageError(
            f"{source} names {start!r} as decoder_start_token_id, which is no id of its vocabulary of "
            f"{parsed.vocab_size}: correct it in its config.json or generation_config.json."
        )
    completed = {**config, "decoder_start_token_id": start}
    return completed if parsed.pad_token_id is not None else {**completed, "pad_token_id": pad}


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
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"The generation settings of {checkpoint.directory} cannot be used: {reason}.") from error
    # as from_pretrained does: what was published, such as a temperature without do_sample, may be saved as it was
    found._original_object_hash = hash(found)
    return found
