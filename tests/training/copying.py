"""A toy task for training tests: name the first word of a sentence. No files, no network, milliseconds a step."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pregate.config import Run, TrainConfig
from pregate.models.families.olmoe import FAMILY, PreGatedOlmoeConfig, PreGatedOlmoeForCausalLM
from pregate.models.loading import mark_conventional
from pregate.tasks.base import Example, Scores
from pregate.training.loop import TrainSummary, fine_tune
from pregate.training.session import prepare
from tests.engine.olmoe import olmoe
from tests.tiny import pregated_model

SHALLOW = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
OLMOE = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
WORDS = [f"w{i}" for i in range(60)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; 0 pads, 1 ends a sequence."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def write_olmoe(directory: Path, tokenizer: Any, vocab_size: int, **changes: int) -> None:
    """A conventional checkpoint with its tokenizer."""
    torch.manual_seed(0)
    config = PreGatedOlmoeConfig(**FAMILY.from_scratch({**OLMOE, **changes}, vocab_size), pregate=None)
    PreGatedOlmoeForCausalLM(config).save_pretrained(directory)
    mark_conventional(directory)
    tokenizer.save_pretrained(directory)


class FirstWords:
    """The target is the first one or two words of the source; scored by exact match."""

    name = "first_words"
    primary_metric = "accuracy"
    metric_names = ("accuracy",)

    def __init__(self, scripted: Sequence[float] = ()) -> None:
        self.scripted = list(scripted)

    def examples(self, split: str, limit: int | None = None) -> list[Example]:
        rng = random.Random(split)
        made = []
        for index in range(40 if split == "train" else 7):
            words = [rng.choice(WORDS[:6]) for _ in range(rng.randint(2, 8))]
            target = " ".join(words[: 1 + index % 2])
            made.append(Example(str(index), " ".join(words), target, (target,)))
        return made[:limit]

    def stream(self, split: str, limit: int | None = None) -> list[Example]:
        return self.examples(split, limit)

    def fingerprint(self, split: str) -> str:
        return f"first words of {split}"

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        hits = [100.0 * (p in r) for p, r in zip(predictions, references, strict=True)]
        overall = self.scripted.pop(0) if self.scripted else sum(hits) / len(hits)
        return Scores({"accuracy": overall}, {"accuracy": hits})


class Recorder:
    """A tracker that remembers; `at` maps (metric, step) to its value."""

    def __init__(self, interrupt_at: int | None = None, signal_number: int = signal.SIGINT) -> None:
        self.signal_number = signal_number
        self.at: dict[tuple[str, int], float] = {}
        self.interrupt_at = interrupt_at

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.at.update({(key, step): value for key, value in metrics.items()})
        if step == self.interrupt_at:
            self.interrupt_at = None
            signal.raise_signal(self.signal_number)

    def rewind(self, step: int, *groups: str) -> None:
        """Nothing was written."""

    def sync(self) -> None:
        """Nothing is written."""


def recipe(**changes: Any) -> TrainConfig:
    """Four short steps in two uneven micro batches."""
    defaults: dict[str, Any] = {
        "steps": 4,
        "batch_sequences": 6,
        "micro_batch_tokens": 40,
        "learning_rate": 1e-2,
        "eval_every": 100,
        "eval_examples": 7,
        "save_every": 100,
        "log_every": 1,
    }
    return TrainConfig(**{**defaults, **changes})


def short_run(resume: bool = False, workers: int = 0) -> Run:
    run = Run(resume=resume)
    run.data.num_workers = workers
    run.task.max_source_tokens, run.task.max_target_tokens = 10, 4
    run.eval.batch_size = 3
    return run


def train_tiny(
    out_dir: Path,
    *,
    resume: bool = False,
    workers: int = 0,
    tracker: Recorder | None = None,
    task: FirstWords | None = None,
    carry: Sequence[Path] = (),
    model: Any = None,
    model_changes: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Any, Recorder, TrainSummary]:
    """Train `model`, or a tiny pre-gated one, decoder-only where examples are packed, on the toy task; the model, what
    was logged, and the summary."""
    if model is None:
        model = olmoe() if changes.get("packing") else pregated_model(**{**SHALLOW, **(model_changes or {})})
    tracker = tracker or Recorder()
    session = prepare(
        model,
        word_tokenizer(),
        task or FirstWords(),  # type: ignore[arg-type]
        recipe(**changes),
        run=short_run(resume, workers),
        out_dir=out_dir,
        tracker=tracker,  # type: ignore[arg-type]
        stage="tiny",
        carry=carry,
    )
    return model, tracker, fine_tune(session)
