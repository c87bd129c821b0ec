"""What a request may ask of the device-driven engine: Hugging Face generation settings, understood or refused.

A setting that would change the tokens and is not understood is refused, never ignored. Knows settings; knows nothing
about tensors of a model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from pregate.config import UsageError
from pregate.engine.device.sampler_state import Sampling

UNDERSTOOD = {
    "bos_token_id",
    "decoder_start_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "output_logits",
    "pad_token_id",
    "repetition_penalty",
    "return_dict_in_generate",
    "temperature",
}
WITHOUT_EFFECT = {"use_cache", "early_stopping", "length_penalty", "transformers_version", "_from_model_config"}
"""Of these the first is what the engine does anyway, the next two are of beams."""
WHEN_SAMPLING = {"top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
NEUTRAL: dict[str, Sequence[Any]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "top_k": (0,),
    "top_p": (1.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "repetition_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "remove_invalid_values": (False,),
    "output_scores": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
}
"""Values with which a setting changes nothing; None changes nothing anywhere."""


@dataclass(frozen=True)
class Request:
    """How many tokens are asked for, how they are chosen, and what is returned."""

    new_tokens: int
    sampling: Sampling
    as_dict: bool
    with_logits: bool


def read_request(
    defaults: GenerationConfig,
    options: dict[str, Any],
    vocab_size: int,
    max_new_tokens: int,
    prompt_len: int | None = None,
) -> Request:
    """`options` over `defaults`, as Hugging Face `generate` reads them, except that sampling draws from all tokens
    where nothing is said of `top_k` (there: from the 50 likeliest). `prompt_len`: of the prompt that the new tokens
    continue; None where they follow a start token. Raises `UsageError`."""
    config = copy.deepcopy(defaults)
    for name, value in options.items():
        # not `update`, which validates in sentences of its own
        if hasattr(config, name):
            setattr(config, name, value)
        elif value is not None:
            _refuse({name: value})
    sample = bool(config.do_sample)
    for name, value in config.to_dict().items():
        if name in UNDERSTOOD | WITHOUT_EFFECT or value is None or _is_neutral(name, value):
            continue
        if name in WHEN_SAMPLING and not sample:
            continue
        # not `in`: zero equals False, and changes the tokens
        if value is not False and value not in ({}, []):
            _refuse({name: value})
    start = 0 if prompt_len is not None else config.decoder_start_token_id
    if start is None:
        raise UsageError("The model's generation settings name no decoder_start_token_id: give one.")
    eos = [] if config.eos_token_id is None else config.eos_token_id
    eos = [int(token) for token in (eos if isinstance(eos, list | tuple) else [eos])]
    pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
    temperature = 1.0 if config.temperature is None or not sample else float(config.temperature)
    penalty = 1.0 if config.repetition_penalty is None else float(config.repetition_penalty)
    for name, holds, sentence in (
        ("temperature", temperature > 0, "must be above 0; for the likeliest token leave do_sample out"),
        ("repetition_penalty", penalty > 0, "must be above 0"),
    ):
        if not holds:
            raise UsageError(f"{name}={getattr(config, name)} {sentence}.")
    for token in (*eos, pad, start):
        if not 0 <= int(token) < vocab_size:
            raise UsageError(
                f"The token {token} is outside the vocabulary of {vocab_size}: check the generation settings."
            )
    begun = 1 if prompt_len is None else prompt_len
    return Request(
        _length(config, max_new_tokens, begun),
        Sampling(
            sample=sample,
            temperature=temperature,
            repetition_penalty=penalty,
            min_new_tokens=_minimum(config, begun),
            start=int(start),
            pad=int(pad),
            eos=eos,
        ),
        bool(config.return_dict_in_generate),
        bool(config.output_logits),
    )


def _is_neutral(name: str, value: Any) -> bool:
    # settings about the source are named like those about the target, behind the name of a stack
    return value in NEUTRAL.get(name, ()) or value in NEUTRAL.get(name.partition("_")[2], ())


def _refuse(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        raise UsageError(
            f"engine.drive=device decodes greedily or by temperature and cannot follow {name}={value!r}: leave it out, "
            "or use engine.drive=host."
        )


def _length(config: GenerationConfig, most: int, begun: int) -> int:
    asked = config.max_new_tokens
    if asked is None:
        # max_length counts the start token, or the prompt
        asked = most if config.max_length is None else config.max_length - begun
    if not 1 <= asked <= most:
        raise UsageError(
            f"{asked} new tokens are asked for, but this engine was opened for 1 to {most}: open it with "
            "max_new_tokens as large."
        )
    return int(asked)


def _minimum(config: GenerationConfig, begun: int) -> int:
    if config.min_new_tokens is not None:
        return int(config.min_new_tokens)
    return max(0, int(config.min_length or 0) - begun)
