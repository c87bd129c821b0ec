"""A tiny dense model with data, and the MoE model that the command makes of it."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from studies.dense_to_moe.__main__ import main
from studies.dense_to_moe.dense import END_OF_TEXT
from tests.studies.dense_to_moe.llama import llama
from tests.tasks.test_chat import CHATML, chat_tokenizer

SMALL = ["--experts", "4", "--top-k", "2", "--shared", "0.25", "--tasks", "sst2", "--row-tokens", "32"]
FEW = ["--fit-tokens", "256", "--measure-tokens", "64", "train.eval_examples=2"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer, and data."""
    root = tmp_path_factory.mktemp("inputs")
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_TEXT]})
    llama(len(tokenizer)).save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    for name in ("corpus", "sst2"):
        (root / name).mkdir()
    for split, count in (("train", 60), ("validation", 20)):
        texts = [f"Ada wrote book {i} in the year {1800 + i}. Who wrote it? Ada wrote it." for i in range(count)]
        pandas.DataFrame({"text": texts}).to_parquet(root / "corpus" / f"{split}.parquet")
        rows = [{"idx": i, "sentence": f"a short book {i}", "label": i % 2} for i in range(count)]
        pandas.DataFrame(rows).to_parquet(root / "sst2" / f"{split}.parquet")
    return root


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    return [str(out), "--dense", str(inputs / "dense"), "--data", str(inputs), *SMALL, *FEW, *more]


@pytest.fixture(scope="session")
def made(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "moe"
    main(command(inputs, out, "--steps", "6", "train.learning_rate=1e-2", "train.warmup_steps=0"))
    return out
