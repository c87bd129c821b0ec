"""Beside a pre-gated model `AutoTokenizer` gives the tokenizer that it gives beside the conventional one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from pregate.models.family import Family, family_named, register_family
from pregate.models.pregating import PreGating
from tests.models.families.test_decoder_only import FAMILIES, Row, every_family

TEXTS = ("a\n\n1. b", "हिन्दी में 12", " hi")
CORPUS = ["a list\n\n1. a\n\n2. b\n\n3. c", "हिन्दी हिन्दी में में", " hi hi hit", "hi  hi"] * 4


def trained(build: Callable[[Tokenizer], None]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    build(tokenizer)
    options = {"special_tokens": ["<|endoftext|>", "<unk>", "<s>", "</s>"], "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **options))
    return tokenizer


def pieces() -> Tokenizer:
    """As Switch has it, whose class cannot be made of other files."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return tokenizer


def granite(tokenizer: Tokenizer) -> None:
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()


def qwen3_5(tokenizer: Tokenizer) -> None:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), bytes_alone]
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()


def mixtral(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


KINDS = {"granitemoe": granite, "qwen3_5_moe": qwen3_5, "mixtral": mixtral}
NAMED = {"granitemoe": "GPT2Tokenizer", "qwen3_5_moe": "Qwen2Tokenizer", "mixtral": "LlamaTokenizer"}
"""The class that published files of these models name, which is not the one that they are read with."""


def published(directory: Path, tokenizer: Tokenizer, named: str | None, config: dict[str, Any]) -> Any:
    """What `AutoTokenizer` makes of the files beside `config`."""
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    named_class = {} if named is None else {"tokenizer_class": named}
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **named_class}))
    (directory / "config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(directory)


def ids(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def assert_the_sources(family: Family, tokenizer: Tokenizer, named: str, directory: Path) -> None:
    """Whether the files name a class or none."""
    config = {"model_type": family.source_type, "architectures": [family.source_class]}
    for name in (named, None):
        beside_source = published(directory / f"{name}", tokenizer, name, config)
        ahead = family.pregated_json(config, PreGating(1))
        beside_ours = published(directory / f"{name}-pregated", tokenizer, name, ahead)
        assert type(beside_ours) is type(beside_source), (type(beside_ours), type(beside_source))
        assert ids(beside_ours) == ids(beside_source) and all(ids(beside_ours))


@every_family
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_tokenizer_of_the_source(row: Row, kind: str, tmp_path: Path) -> None:
    assert_the_sources(row.family, trained(KINDS[kind]), NAMED[kind], tmp_path)


def test_it_is_that_of_switch(tmp_path: Path) -> None:
    assert_the_sources(family_named("switch_transformers"), pieces(), "T5Tokenizer", tmp_path)


@pytest.mark.parametrize("name", KINDS)
def test_the_class_that_is_named_would_split_texts_differently(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tokenizer = FAMILIES[name].family, trained(KINDS[name])
    config = {"model_type": family.model_type, "architectures": [family.model_class.__name__]}
    right = published(tmp_path / "right", tokenizer, NAMED[name], config)
    assert ids(right) == [tokenizer.encode(text).ids for text in TEXTS]
    monkeypatch.delitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, family.model_type)
    wrong = published(tmp_path / "wrong", tokenizer, NAMED[name], config)
    assert type(wrong).__name__ == NAMED[name] and ids(wrong) != ids(right)


def test_a_transformers_without_these_tables_is_none_the_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in ("TOKENIZER_MAPPING_NAMES", "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS"):
        monkeypatch.delattr(tokenization_auto, table)
    register_family(family_named("mixtral"))
