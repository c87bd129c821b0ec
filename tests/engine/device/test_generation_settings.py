"""Which generation settings the device-driven engine reads, and which it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from pregate.config import UsageError
from pregate.engine.device.generation_settings import Request, read_request
from pregate.engine.device.sampler_state import Sampling, StepKind

START: dict[str, Any] = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def read(defaults: dict[str, Any] | None = None, **options: Any) -> Request:
    return read_request(GenerationConfig(**{**START, **(defaults or {})}), options, vocab_size=100, max_new_tokens=50)


def test_by_default_it_is_greedy_and_as_long_as_there_is_room() -> None:
    assert read() == Request(50, Sampling(eos=[1]), as_dict=False, with_logits=False)


@pytest.mark.parametrize(
    ("options", "length", "least"),
    [
        ({"max_new_tokens": 7}, 7, 0),
        ({"max_length": 7}, 6, 0),
        ({"max_length": 7, "max_new_tokens": 9}, 9, 0),
        ({"min_new_tokens": 4}, 50, 4),
        ({"min_length": 4}, 50, 3),
        ({"min_length": 4, "min_new_tokens": 6}, 50, 6),
        ({"min_length": 0}, 50, 0),
    ],
)
def test_lengths(options: dict[str, Any], length: int, least: int) -> None:
    """`max_length` and `min_length` count the start token, as for Hugging Face."""
    for request in (read(**options), read(options)):
        assert (request.new_tokens, request.sampling.min_new_tokens) == (length, least)


def test_lengths_behind_a_prompt() -> None:
    """They count the prompt, and no start token is asked for."""
    defaults = GenerationConfig(eos_token_id=1, pad_token_id=0, max_length=20, min_length=14)
    request = read_request(defaults, {}, vocab_size=100, max_new_tokens=50, prompt_len=12)
    assert (request.new_tokens, request.sampling.min_new_tokens, request.sampling.start) == (8, 2, 0)
    with pytest.raises(UsageError, match="-2 new tokens are asked for"):
        read_request(defaults, {"max_length": 10}, vocab_size=100, max_new_tokens=50, prompt_len=12)


def test_tokens() -> None:
    assert read(eos_token_id=[3, 4], pad_token_id=5).sampling == Sampling(eos=[3, 4], pad=5)
    assert read(eos_token_id=None).sampling.eos == []
    assert read({"pad_token_id": None}, eos_token_id=[3, 4]).sampling.pad == 3
    assert read(decoder_start_token_id=9).sampling.start == 9


def test_sampling() -> None:
    assert read(do_sample=True, temperature=0.5).sampling == Sampling(sample=True, temperature=0.5, eos=[1])
    assert read(temperature=0.5).sampling.temperature == 1.0, "greedy decoding has no temperature"
    assert read(do_sample=True).sampling.kind == StepKind(sample=True, penalise=False)
    assert read(repetition_penalty=1.2).sampling.kind == StepKind(sample=False, penalise=True)
    assert read(repetition_penalty=1.0).sampling.kind == StepKind()


def test_what_is_asked_goes_before_what_the_checkpoint_says() -> None:
    assert read({"num_beams": 4, "max_length": 20}, num_beams=1).new_tokens == 19
    assert read({"do_sample": True, "top_k": 5}, do_sample=False).sampling.sample is False


def test_neutral_settings_are_no_reason_to_refuse() -> None:
    neutral = {"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "use_cache": True}
    neutral |= {"top_k": None, "top_p": 1.0, "length_penalty": 1.0, "early_stopping": False, "streamer": None}
    neutral |= {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}
    assert read(do_sample=True, **neutral).sampling.sample


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_return_sequences": 3},
        {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 50},
        {"do_sample": True, "top_p": 0.9},
        {"bad_words_ids": [[5]]},
        {"forced_eos_token_id": 1},
        {"forced_eos_token_id": 0},
        {"do_sample": True, "top_p": 0.0},
        {"guidance_scale": 0.0},
        {"suppress_tokens": [3]},
        {"output_scores": True},
        {"output_attentions": True},
        {"streamer": object()},
        {"logits_processor": [print]},
        {"decoder_input_ids": [1]},
        {"guidance_scale": 2.0},
    ],
)
def test_what_would_change_the_result_is_refused(options: dict[str, Any]) -> None:
    *_, (name, _) = options.items()
    with pytest.raises(UsageError, match=f"cannot follow {name}=.*: leave it out, or use engine.drive=host") as refused:
        read(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 51}, "51 new tokens are asked for, but this engine was opened for 1 to 50"),
        ({"max_new_tokens": 0}, "0 new tokens are asked for"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"eos_token_id": 100}, "token 100 is outside the vocabulary of 100"),
        ({"decoder_start_token_id": None}, "no decoder_start_token_id"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(**options)


def test_the_checkpoints_settings_are_not_changed() -> None:
    defaults = GenerationConfig(**START)
    read_request(defaults, {"max_new_tokens": 3, "eos_token_id": 9}, 100, 50)
    assert (defaults.max_new_tokens, defaults.eos_token_id) == (None, 1)
