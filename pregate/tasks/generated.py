"""A small reading-comprehension set in SQuAD's columns that is generated, and the tokenizer that fits it.

Knows `random` and the phrases of `generated_facts.toml`; knows nothing about models or training. A context holds a few
facts of different kinds about one invented subject, in random order and with random values. The question asks for a
kind of fact, so the answer has to be found in the context: a guess is right about once in fifty times.
Validation uses subjects and people that never occur in training.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pregate.config import GeneratedConfig, UsageError

HELD_OUT = 0.1
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PROMPT = "question: context:"
SPACE = "▁"
FACTS = tomllib.loads(Path(__file__).with_name("generated_facts.toml").read_text(encoding="utf-8"))
SUBJECT_WORDS, SUBJECT_NOUNS = (FACTS["subject"][part].split() for part in ("first", "second"))


@dataclass(frozen=True)
class Kind:
    """One kind of fact: its statements, its questions, and the values that it can take."""

    name: str
    statements: list[str]
    questions: list[str]
    words: str = ""
    first: str = ""
    second: str = ""
    held_out: bool = False

    @property
    def values(self) -> list[str]:
        return self.words.split() or [f"{a} {b}" for a in self.first.split() for b in self.second.split()]


KINDS = [Kind(**kind) for kind in FACTS["kind"]]


def check_generated(config: GeneratedConfig) -> None:
    """Refuse sizes that cannot be generated. Raises `UsageError`."""
    if not 1 <= config.facts <= len(KINDS):
        raise UsageError(
            f"task.generated.facts={config.facts} must lie between 1 and {len(KINDS)}, the number of kinds of fact."
        )
    for key in ("train", "validation"):
        if getattr(config, key) < 1:
            raise UsageError(f"task.generated.{key}={getattr(config, key)} must be at least 1.")
    least = len(_pieces()[0])
    if config.vocab_size < least:
        raise UsageError(
            f"task.generated.vocab_size={config.vocab_size} must be at least {least}, its special tokens and letters."
        )


def generate(config: GeneratedConfig, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `split`: id, title, context, question, answers {text, answer_start}.

    The same configuration gives the same rows on every machine, and fewer rows are a prefix of more.
    Raises `UsageError` for a split other than train and validation.
    """
    sizes = {"train": config.train, "validation": config.validation}
    if split not in sizes:
        raise UsageError(f"The generated set has no split {split!r}: choose train or validation.")
    return _rows(config, split, sizes[split])


def _rows(config: GeneratedConfig, split: str, count: int) -> Iterator[dict[str, Any]]:
    names = _side([f"{word} {noun}" for word in SUBJECT_WORDS for noun in SUBJECT_NOUNS], config.seed, split)
    values = {kind.name: _side(kind.values, config.seed, split) if kind.held_out else kind.values for kind in KINDS}
    rng = random.Random(f"{config.seed} {split}")
    for number in range(count):
        name = rng.choice(names)
        kinds = rng.sample(KINDS, config.facts)
        facts = [(kind, rng.choice(values[kind.name])) for kind in kinds]
        asked = rng.randrange(config.facts)
        context, starts = _passage(name, facts, rng)
        kind, answer = facts[asked]
        yield {
            "id": f"generated-{split}-{number}",
            "title": name,
            "context": context,
            "question": rng.choice(kind.questions).format(it=name),
            "answers": {"text": [answer], "answer_start": [starts[asked]]},
        }


def _side(values: list[str], seed: int, split: str) -> list[str]:
    """The values of `split`: a seeded tenth belongs to validation, the rest to training."""
    shuffled = sorted(values)
    random.Random(f"{seed} held out").shuffle(shuffled)
    cut = max(1, round(HELD_OUT * len(shuffled)))
    return shuffled[:cut] if split == "validation" else shuffled[cut:]


def _passage(name: str, facts: list[tuple[Kind, str]], rng: random.Random) -> tuple[str, list[int]]:
    """One sentence a fact, the first with the subject's name, and where each value starts."""
    context, starts = "", []
    for position, (kind, value) in enumerate(facts):
        before, after = rng.choice(kind.statements).format(it="It" if position else name, x="\0").split("\0")
        context += (" " if position else "") + before
        starts.append(len(context))
        context += value + after
    return context, starts


def generated_tokenizer(config: GeneratedConfig) -> Any:
    """A tokenizer for the generated set: whole words first, single characters for everything else.

    A `PreTrainedTokenizerFast` with a unigram model of at most `vocab_size` pieces: `<pad>` 0, `</s>` 1, `<unk>` 2, the
    characters, then as many words as fit, in the order of the phrases. It closes every text with `</s>`, and does not
    depend on the seed.
    """
    check_generated(config)
    basic, words = _pieces()
    specials = (PAD, END, UNKNOWN)
    # Equal costs make the path with the fewest pieces the best one; characters cost more than any word.
    pieces = [(piece, 0.0 if piece in specials else -10.0) for piece in basic]
    pieces += [(word, -1.0) for word in words[: config.vocab_size - len(basic)]]
    model = Tokenizer(models.Unigram(pieces, unk_id=basic.index(UNKNOWN), byte_fallback=False))
    model.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")])
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    model.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    model.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, basic.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )


def _pieces() -> tuple[list[str], list[str]]:
    """(special tokens and characters, whole words) of every text that can be generated, each once, in order."""
    texts = [PROMPT]
    for kind in KINDS:
        texts += [phrase.format(it="It", x=" ") for phrase in kind.statements + kind.questions]
    texts += [*SUBJECT_WORDS, *SUBJECT_NOUNS]
    for kind in KINDS:
        texts += kind.values
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text))
    marks = dict.fromkeys(mark for text in texts for mark in re.findall(r"[^\w\s]", text))
    letters = [chr(code) for first, last in ("az", "AZ", "09") for code in range(ord(first), ord(last) + 1)]
    characters = dict.fromkeys([SPACE, *marks, ",", "'", "-", *letters])
    return [PAD, END, UNKNOWN, *characters], [SPACE + word for word in words if len(word) > 1] + [f"{SPACE}a"]
