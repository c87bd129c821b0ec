"""A model of EleutherAI's lm-evaluation-harness: a checkpoint in memory, or served with its experts elsewhere.

Importing this file registers it as `pregate`. The harness's own model for Hugging Face checkpoints keeps the tokens,
the batches by length, the truncation and the windows of long texts. Here is where the model comes from and how it is
called. Needs the package lm_eval; nothing else imports this file than the command `pregate.harness`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any, Self

import torch
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]

from pregate.config import CacheRule, Policy, SlabDtype, Tier, UsageError
from pregate.config.validators import chosen, need
from pregate.engine.engine import OffloadEngine
from pregate.models.checkpoint import SourceCheckpoint
from pregate.models.family import family_of
from pregate.models.loading import load_resident, open_model
from pregate.system.console import say
from pregate.system.machine import compute_device
from pregate.tasks.tokens import check_vocabulary, opening_tokens, plain_ids, pretrained_tokenizer

HarnessModel: Any = huggingface.HFLM
RESIDENT, OFFLOADED = "resident", "offloaded"
TEXTS = ("policy", "device_budget", "host_budget", "tier", "pack_dir", "cache", "slab_dtype")
NUMBERS = ("io_threads", "prefill_chunk")
OF_ENGINE = (*TEXTS, *NUMBERS, "io_uring")
"""What `OffloadEngine.open` is told, under its names."""
OF_HARNESS = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "device",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
"""What the harness's own model is told, with its meanings. The rest of its arguments say how to load a model."""
OWN = ("pretrained", "revision", "tokenizer", "engine", "dtype")
CHOICES: dict[str, type[StrEnum]] = {"policy": Policy, "tier": Tier, "cache": CacheRule, "slab_dtype": SlabDtype}
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Served:
    """What the harness takes for a model. It is no torch module: the harness would tie the embedding tables of one
    again, also those that are stored with other bits."""

    model: Any
    forward: Callable[..., Any]
    generate: Callable[..., Any]
    num_elsewhere: int = 0
    """Parameters that `model` does not hold: those of offloaded experts."""

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return self.forward(input_ids=input_ids)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def num_parameters(self) -> int:
        return self.model.num_parameters() + self.num_elsewhere

    def to(self, device: torch.device) -> Self:
        """It is there already."""
        return self


@register_model("pregate")
class PregateLM(HarnessModel):
    """A pre-gated or conventional decoder-only checkpoint.

    `pretrained`: a directory or hub id. `engine`: `resident`, all of it in memory, or `offloaded`, through
    `OffloadEngine`, whose options go by their own names. `tokenizer`: by default the checkpoint's. Of the other
    options, `OF_HARNESS` mean what they mean to the harness's `hf` model. Raises `UsageError` for what cannot be
    evaluated, before weights are read: see `checked`.
    """

    def __init__(self, **options: Any) -> None:
        subject = checked(options)
        self._subject = subject
        self.offloading: OffloadEngine | None = None
        """The engine, if the model is served by one."""
        if subject.notice:
            say(subject.notice)
        revision = {} if subject.revision is None else {"revision": subject.revision}
        where, dtype = subject.pretrained, subject.dtype
        super().__init__(where, "causal", tokenizer=subject.tokenizer, dtype=dtype, **revision, **subject.of_harness)

    def _get_config(self, pretrained: str, **_: Any) -> None:
        config = self._subject.source.config
        self._config = family_of(config).config(config)

    def _create_model(self, pretrained: str, dtype: Any = "auto", **_: Any) -> None:
        device = compute_device(self._device)
        subject = self._subject
        if subject.of_engine is None:
            model = load_resident(pretrained, subject.revision, dtype=dtype).to(device)
            self._model = Served(model, model.__call__, model.generate)
            return
        asked = None if dtype == "auto" else getattr(torch, dtype)
        engine = OffloadEngine.open(subject.source, device=device, dtype=asked, **subject.of_engine)
        # the harness drops its models without a word
        weakref.finalize(self, engine.close)
        experts = len(engine.family.keys()) * sum(prod(shape) for shape in engine.family.matrices.values())
        self._model = Served(engine.model, engine.forward, engine.generate, experts)
        self.offloading = engine

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the scores, with what the engine has moved up to now."""
        info = {**super().get_model_info(), "engine": RESIDENT}
        if self.offloading is None:
            return info
        engine = self.offloading
        told = {"policy": str(engine.policy), "num_slots": engine.num_slots, "slab_bytes": engine.slab_bytes}
        return info | {"engine": OFFLOADED, **told, **engine.counters.to_dict()}


@dataclass(frozen=True)
class Subject:
    """What is to be evaluated. `of_engine`: options of `OffloadEngine.open`, None for a resident model. `of_harness`:
    those of the harness's own model. `notice`: what the user is told first."""

    pretrained: str
    revision: str | None
    dtype: str
    source: SourceCheckpoint
    tokenizer: Any
    of_engine: dict[str, Any] | None
    of_harness: dict[str, Any]
    notice: str


def checked(options: Mapping[str, Any]) -> Subject:
    """The options of `PregateLM`, and what follows from the headers of the checkpoint. Raises `UsageError` for an
    option or value that does not exist, and for a checkpoint or tokenizer that cannot be used."""
    rest = dict(options)
    # the harness adds it for data sets; a checkpoint brings no code here
    rest.pop("trust_remote_code", None)
    pretrained, engine, dtype = rest.pop("pretrained", None), rest.pop("engine", RESIDENT), rest.pop("dtype", "auto")
    revision, tokenizer = rest.pop("revision", None), rest.pop("tokenizer", None)
    need(isinstance(pretrained, str), "There is no model: write --model_args pretrained=DIR_OR_ID.")
    need(engine in (RESIDENT, OFFLOADED), f"engine={engine} is not known: write {RESIDENT} or {OFFLOADED}.")
    need(dtype in DTYPES, f"dtype={dtype} is not known: write {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    of_engine = _options_of_engine(engine, rest)
    source = open_model(str(pretrained), revision)
    family = family_of(source.config)
    need(
        family.objective.continues_prompts,
        f"The harness scores decoder-only models, and {pretrained} is a {family.source_type} model, which reads its "
        "prompt in another stack: evaluate it with python -m pregate.eval.",
    )
    key, where = ("pretrained", pretrained) if tokenizer is None else ("tokenizer", tokenizer)
    begins = {name: rest[name] for name in ("add_bos_token",) if rest.get(name) is not None}
    loaded = pretrained_tokenizer(key, str(where), revision, "tokenizer", **begins)
    check_vocabulary(loaded, str(pretrained), source.config, "tokenizer")
    notice = ""
    if _closes_texts(loaded):
        notice = _without_special_tokens(loaded, str(where), rest.get("add_bos_token"))
        rest["add_bos_token"] = False
    return Subject(str(pretrained), revision, dtype, source, loaded, of_engine, rest, notice)


def _options_of_engine(engine: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """Those for `OffloadEngine.open`, taken out of `options`; None for a resident model. Raises `UsageError` for an
    option that does not exist, is not of this engine, or has no value that it can have."""
    known = {*OF_ENGINE, *OF_HARNESS}
    for name in options:
        need(
            name in known,
            f"The harness's pregate model has no option {name}: it has {', '.join((*OWN, *OF_ENGINE))}, and of those "
            f"of its hf model {', '.join(OF_HARNESS)}.",
        )
    given = {name: options.pop(name) for name in OF_ENGINE if name in options}
    if engine == RESIDENT:
        need(
            not given, f"{next(iter(given), None)} is an option of the engine: add engine={OFFLOADED}, or leave it out."
        )
        return None
    # the harness reads `cache=none` as no value, and 25 as a number
    texts = {name: str(value) for name, value in given.items() if name in TEXTS and value is not None}
    if "cache" in given and given["cache"] is None:
        texts["cache"] = "none"
    for name, kind in CHOICES.items():
        if name in texts:
            chosen(name, kind, texts[name])
    for name in NUMBERS:
        value, may_lack = given.get(name), name == "prefill_chunk" or name not in given
        need(
            type(value) is int or (value is None and may_lack),
            f"{name}={value} is not a whole number: write one of at least 1.",
        )
    uring = given.get("io_uring", True)
    need(isinstance(uring, bool), f"io_uring={uring} is not known: write true or false.")
    return given | texts


def _closes_texts(tokenizer: Any) -> bool:
    """Whether it puts a token behind every text, as T5's does."""
    opened = [*opening_tokens(tokenizer), *plain_ids(tokenizer, "a")]
    return len(tokenizer("a")["input_ids"]) > len(opened)


def _without_special_tokens(tokenizer: Any, where: str, add_bos: bool | None) -> str:
    """What to tell about a tokenizer that closes every text. The harness encodes a prompt by itself to see where the
    answer begins, so that a prompt would end before it and the wrong tokens would be scored. Raises `UsageError` if
    special tokens are asked for."""
    begins = tokenizer.convert_ids_to_tokens(opening_tokens(tokenizer))
    if add_bos:
        raise UsageError(
            f"The tokenizer of {where} puts {tokenizer.eos_token} behind every text, also behind a prompt that goes "
            "on: leave out add_bos_token."
        )
    before = f" and no {' '.join(begins)} before it" if begins else ""
    said = (
        f"The tokenizer of {where} puts {tokenizer.eos_token} behind every text. Prompts go on, so they are "
        f"encoded without it{before}, as with add_bos_token=false."
    )
    return said if add_bos is None else ""
