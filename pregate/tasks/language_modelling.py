"""Language modelling, the pre-training task of decoder-only models: every token of plain text from those before it.

Several documents stand in one row and do not see each other.

Letters: B rows of a batch, R rows of a block, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pregate.models.packing_and_padding import document_batch
from pregate.tasks.text_stream import TextStream
from pregate.tasks.tokens import opening_tokens


class LanguageModelling(TextStream[np.ndarray]):
    """Rows of `task.max_source_tokens` tokens."""

    @property
    def row_tokens(self) -> int:
        return self.config.max_source_tokens

    def made_of(self, tokens_RL: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        return list(tokens_RL)

    def opening(self, tokenizer: Any) -> list[int]:
        return opening_tokens(tokenizer)

    def collator(self, tokenizer: Any) -> partial[dict[str, torch.Tensor]]:
        return partial(text_batch, end=tokenizer.eos_token_id)


def text_batch(rows: Sequence[np.ndarray], end: int) -> dict[str, torch.Tensor]:
    """See `document_batch`; a document begins behind each end-of-sequence token `end`."""
    tokens_BL = torch.from_numpy(np.stack(rows).astype(np.int64))
    starts_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    starts_BL[:, 1:] = tokens_BL[:, :-1] == end
    return document_batch(tokens_BL, starts_BL)
