"""A conversation: a text that grows turn by turn, and the KV cache of what the model has read of it.

Knows tokens and caches; knows nothing about experts.

Letters: B rows, S tokens of a turn, N new tokens, T tokens of the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pregate.config import UsageError
from pregate.engine.generation_options import asked_for
from pregate.models.objectives import until_end


class Conversation:
    """Made by `OffloadEngine.conversation`. `tokens` and `mask` (B, T): all that was said so far by both sides, and
    where it is no padding; None before the first turn.

    Rows of different lengths have padding between turns. Full attention passes over it. A sliding window counts it, and
    a recurrent state carries it on, so a model with such layers gets all padding moved to the left, and reads the text
    again."""

    def __init__(self, model: Any, generate: Callable[..., Any]) -> None:
        """`generate`: of the engine that serves `model`."""
        self.tokens: Tensor | None = None
        self.mask: Tensor | None = None
        self._model, self._generate = model, generate
        self._cache: DynamicCache | None = None

    def reply(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Append `input_ids` (B, S) to the text and go on from there: the new tokens (B, N). The model reads only what
        it has not read in an earlier turn, unless padding was moved.

        `attention_mask` (B, S): 0 for padding, which is on the left. `options`: of `generate`. A row that ends early is
        padded, and its padding is not part of the text. After an error or an interrupt the text is what it was before
        the call, and the next turn reads all of it again. Raises `UsageError` for another number of rows than in the
        turns before, and for options that do not give one text a row.
        """
        self._check(input_ids, options)
        turn_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        tokens_BT, mask_BT = _behind(self.tokens, input_ids), _behind(self.mask, turn_BS)
        # forgotten until this turn has ended well: what was read of it is not known otherwise
        cache, self._cache = self._cache or self._empty_cache(), None
        if any(type(layer) is not DynamicLayer for layer in cache.layers) and (mask_BT.diff() < 0).any():
            order_BT = mask_BT.argsort(stable=True)
            tokens_BT, mask_BT = tokens_BT.gather(1, order_BT), mask_BT.gather(1, order_BT)
            cache = self._empty_cache()
        result = self._generate(input_ids=tokens_BT, attention_mask=mask_BT, past_key_values=cache, **options)
        whole_BT: Tensor = getattr(result, "sequences", result)
        new_BN = whole_BT[:, tokens_BT.shape[1] :]
        said_BN = until_end(new_BN, asked_for("eos_token_id", options, self._model)).long()
        self.tokens, self.mask, self._cache = whole_BT, torch.cat([mask_BT, said_BN], 1), cache
        return new_BN

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def _check(self, input_ids: Tensor, options: dict[str, Any]) -> None:
        if self.tokens is not None and len(self.tokens) != len(input_ids):
            raise UsageError(
                f"This conversation has {len(self.tokens)} rows, not {len(input_ids)}: give a turn for each of them, "
                "or begin another conversation."
            )
        for name in ("num_beams", "num_return_sequences"):
            if (asked_for(name, options, self._model) or 1) > 1:
                raise UsageError(f"A conversation goes on from one text a row: leave {name} at 1.")
        for name in ("stop_strings", "stopping_criteria"):
            if len(input_ids) > 1 and asked_for(name, options, self._model):
                raise UsageError(f"Where {name} ends a row among several is not known: have a conversation for each.")


def _behind(before: Tensor | None, turn_BS: Tensor) -> Tensor:
    return turn_BS if before is None else torch.cat([before, turn_BS], 1)
