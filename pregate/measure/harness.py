"""A model of EleutherAI's lm-evaluation-harness: a checkpoint in memory, or served with its experts elsewhere.

Importing this file registers it as `pregate`. The harness's own model for Hugging Face checkpoints keeps the tokens,
the batches by length, the truncation and the windows of long texts. Here is where the model comes from and how it is
called. Needs the package lm_eval; nothing else imports this file than the command `pregate.harness`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import torch
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]

from pregate.config import UsageError
from pregate.config.validators import need
from pregate.engine.engine import OffloadEngine
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
    evaluated, before weights are read.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        engine: str = RESIDENT,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "auto",
        **options: Any,
    ) -> None:
        # the harness adds it for data sets; a checkpoint brings no code here
        options.pop("trust_remote_code", None)
        need(isinstance(pretrained, str), "There is no model: write --model_args pretrained=DIR_OR_ID.")
        need(engine in (RESIDENT, OFFLOADED), f"engine={engine} is not known: write {RESIDENT} or {OFFLOADED}.")
        need(dtype in DTYPES, f"dtype={dtype} is not known: write {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
        self._opening = _options_of_engine(engine, options)
        self.offloading: OffloadEngine | None = None
        """The engine, if the model is served by one."""
        source = open_model(str(pretrained), revision)
        self._source, self._asked_revision, family = source, revision, family_of(source.config)
        need(
            family.objective.continues_prompts,
            f"The harness scores decoder-only models, and {pretrained} is a {family.source_type} model, which reads "
            "its prompt in another stack: evaluate it with python -m pregate.eval.",
        )
        key, where = ("pretrained", pretrained) if tokenizer is None else ("tokenizer", tokenizer)
        add_bos = options.get("add_bos_token")
        begins = {} if add_bos is None else {"add_bos_token": add_bos}
        loaded = pretrained_tokenizer(key, str(where), revision, "tokenizer", **begins)
        check_vocabulary(loaded, str(pretrained), source.config, "tokenizer")
        if _closes_texts(loaded):
            options["add_bos_token"] = _without_special_tokens(loaded, str(where), add_bos)
        named = {} if revision is None else {"revision": revision}
        super().__init__(
            pretrained=str(pretrained), backend="causal", tokenizer=loaded, dtype=dtype, **named, **options
        )

    def _get_config(self, pretrained: str, **_: Any) -> None:
        self._config = family_of(self._source.config).config(self._source.config)

    def _create_model(self, pretrained: str, dtype: Any = "auto", **_: Any) -> None:
        device = compute_device(self._device)
        if self._opening is None:
            model = load_resident(pretrained, self._asked_revision, dtype=dtype).to(device)
            self._model = Served(model, model.__call__, model.generate)
            return
        asked = None if dtype == "auto" else getattr(torch, dtype)
        engine = OffloadEngine.open(self._source, device=device, dtype=asked, **self._opening)
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


def _without_special_tokens(tokenizer: Any, where: str, add_bos: bool | None) -> bool:
    """What `add_bos_token` must be for a tokenizer that closes every text. The harness encodes a prompt by itself to
    see where the answer begins, so that a prompt would end before it and the wrong tokens would be scored. Raises
    `UsageError` if special tokens are asked for."""
    begins = tokenizer.convert_ids_to_tokens(opening_tokens(tokenizer))
    if add_bos:
        raise UsageError(
            f"The tokenizer of {where} puts {tokenizer.eos_token} behind every text, also behind a prompt that goes "
            "on: leave out add_bos_token."
        )
    if add_bos is None:
        before = f" and no {' '.join(begins)} before it" if begins else ""
        say(
            f"The tokenizer of {where} puts {tokenizer.eos_token} behind every text. Prompts go on, so they are "
            f"encoded without it{before}, as with add_bos_token=false."
        )
    return False
