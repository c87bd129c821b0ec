"""Which tokenizer a run has, and how examples become batches of token ids.

Knows texts and token ids; knows nothing about where examples come from or what a model does with them.
B batch, S source length, T target length.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pregate.config import Run, UsageError
from pregate.models.objectives import Objective
from pregate.tasks.base import Example
from pregate.tasks.generated import generated_tokenizer

KEPT_TOKENS = 1 << 25
"""Token ids that one `Collator` keeps: 128 MiB of them."""


def load_tokenizer(run: Run) -> Any:
    """The tokenizer of `run`: the one saved in `checkpoint`, else `model.tokenizer`, else the generated set's own, else
    the one of `checkpoint` or `model.source` on the hub.

    Raises `UsageError` where there is no tokenizer, its directory is missing, or it has no padding or end-of-sequence
    token.
    """
    if run.checkpoint is not None and (Path(run.checkpoint).expanduser() / "tokenizer_config.json").is_file():
        return _pretrained_tokenizer("checkpoint", run.checkpoint, None)
    if run.model.tokenizer is None and run.task.generated is not None:
        return generated_tokenizer(run.task.generated)
    if run.model.tokenizer is not None:
        key, where, revision = "model.tokenizer", run.model.tokenizer, None
    elif run.checkpoint is not None:
        key, where, revision = "checkpoint", run.checkpoint, None
    else:
        key, where, revision = "model.source", run.model.source, run.model.revision
    if where is None:
        raise UsageError("There is no tokenizer: set model.tokenizer=DIR_OR_ID, or model.source=DIR_OR_ID.")
    return _pretrained_tokenizer(key, where, revision)


def check_vocabulary(tokenizer: Any, model: str, config: dict[str, Any]) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings. Raises `UsageError`."""
    rows = config.get("vocab_size")
    if rows is not None and len(tokenizer) > rows:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} ids but {model} has {rows} embeddings: set model.tokenizer to the one "
            "that the model was trained with."
        )


def _pretrained_tokenizer(key: str, where: str, revision: str | None) -> Any:
    path = Path(where).expanduser()
    if where.startswith("None/"):
        raise UsageError(f"{key}={where} is built from data.root, which is not set: set data.root=DIR or PREGATE_DATA.")
    # A hub id is "name" or "owner/name"; anything else can only be meant as a directory.
    if not path.is_dir() and (path.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1):
        raise UsageError(f"{key}={where} is not a directory: name a directory with a tokenizer, or a hub id.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.is_dir() else where, revision=revision)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(
            f"{key}={where} gives no tokenizer ({reason}): set model.tokenizer to a directory or hub id that holds one."
        ) from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UsageError(
            f"The tokenizer of {key}={where} lacks a padding or end-of-sequence token: "
            "set model.tokenizer to one with both."
        )
    return tokenizer


class Collator:
    """Turns examples into the tensors of one batch, as the objective lays them out.

    Texts are cut to `max_source_tokens` and `max_target_tokens`, both counted with the end-of-sequence token that
    closes a row, so that a cut text still ends in one. The objective says whether it closes sources. Token ids are
    kept, up to `KEPT_TOKENS` of them, so that a text seen again (the next epoch, the next validation, a label) is not
    tokenized again.
    """

    def __init__(self, tokenizer: Any, max_source_tokens: int, max_target_tokens: int, objective: Objective) -> None:
        self.tokenizer, self.objective = tokenizer, objective
        self.max_source_tokens = max_source_tokens
        self.max_target_tokens = max_target_tokens
        self._kept: dict[tuple[int, bool, str], array[int]] = {}
        self._kept_tokens = 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` padded with -100, all int64, see `Objective.batch`."""
        return self.objective.batch(self._sources(examples), self._targets(examples), self.tokenizer.pad_token_id)

    def rows(self, examples: Sequence[Example]) -> list[tuple[array[int], array[int]]]:
        """Source and target of each example, cut and closed as in a batch."""
        return list(zip(self._sources(examples), self._targets(examples), strict=True))

    def prompts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, S) of the sources alone, int64, for `generate`."""
        return self.objective.prompts(self._sources(examples), self.tokenizer.pad_token_id)

    def source_lengths(self, examples: Sequence[Example]) -> list[int]:
        """How many source tokens each example has, cut and closed as in a batch."""
        return [len(row) for row in self._sources(examples)]

    def _sources(self, examples: Sequence[Example]) -> list[array[int]]:
        texts = [example.source for example in examples]
        return self._token_ids(texts, self.max_source_tokens, self.objective.closes_sources)

    def _targets(self, examples: Sequence[Example]) -> list[array[int]]:
        return self._token_ids([example.target for example in examples], self.max_target_tokens)

    def _token_ids(self, texts: list[str], max_tokens: int, closed: bool = True) -> list[array[int]]:
        rows = {text: self._kept.get((max_tokens, closed, text)) for text in texts}
        new = [text for text, row in rows.items() if row is None]
        for text, row in zip(new, self._tokenize(new, max_tokens, closed), strict=True):
            rows[text] = row
            if self._kept_tokens < KEPT_TOKENS:
                self._kept[max_tokens, closed, text] = row
                self._kept_tokens += len(row)
        return [rows[text] for text in texts]  # type: ignore[misc]

    def _tokenize(self, texts: list[str], max_tokens: int, closed: bool) -> list[array[int]]:
        if not texts:
            return []
        rows = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=True,
            max_length=max_tokens - closed,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        end = self.tokenizer.eos_token_id
        # a row without a token has nothing to predict the first token of the target from
        return [array("i", [*row, end] if closed or not row else row) for row in rows]
