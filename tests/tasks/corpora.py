"""Tiny corpora and a word tokenizer with sentinels, for tests of pre-training."""

from __future__ import annotations

import random
from pathlib import Path

import pandas
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pregate.cli import compose_run
from pregate.tasks.span_corruption import SpanCorruption

WORDS = [f"w{i}" for i in range(40)]
SETTINGS = [
    *("task=span_corruption", "then_eval=false", "task.max_source_tokens=16", "task.max_target_tokens=16"),
    "task.mean_span_tokens=1",
]


def sentinel_tokenizer(sentinels: int = 8) -> PreTrainedTokenizerFast:
    """One id a word; 0 pads, 1 ends, sentinels stand behind the words in falling order as in T5."""
    names = ["<pad>", "</s>", "<unk>", *WORDS, *(f"<extra_id_{i}>" for i in reversed(range(sentinels)))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write_corpus(root: Path, shards: int = 2, documents: int = 30) -> Path:
    """`root`/corpus with `shards` training files and a validation file; sentences that count upwards."""
    rng = random.Random(0)

    def text() -> str:
        start = rng.randrange(40)
        return " ".join(WORDS[(start + i) % 40] for i in range(rng.randint(1, 30)))

    directory = root / "corpus"
    directory.mkdir(parents=True)
    for shard in range(shards):
        name = f"train-{shard:05}-of-{shards:05}.parquet"
        pandas.DataFrame({"source": "made", "text": [text() for _ in range(documents)]}).to_parquet(directory / name)
    texts = [text() for _ in range(documents)]
    pandas.DataFrame({"source": "made", "text": texts}).to_parquet(directory / "validation.parquet")
    return root


def corpus_task(root: Path, *overrides: str) -> SpanCorruption:
    run = compose_run([f"data.root={root}", *SETTINGS, *overrides])
    return SpanCorruption(run)
