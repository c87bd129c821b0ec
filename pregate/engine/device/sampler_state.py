"""Which token comes next, decided on the device: greedy or by temperature, with what ends a sequence kept beside it.

Knows tokens and logits; knows nothing about models.

Letters: B batch, T places of a target (the start token and all new ones), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pregate.engine.device.ops.next_tokens import choose_tokens


class StepKind(NamedTuple):
    """What a decoding step has to do for its request; each kind is captured once."""

    sample: bool = False
    penalise: bool = False


@dataclass(frozen=True)
class Sampling:
    """How one request chooses its tokens. `eos` may be empty: then every row takes all its steps."""

    sample: bool = False
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    start: int = 0
    pad: int = 0
    eos: Sequence[int] = ()

    @property
    def kind(self) -> StepKind:
        return StepKind(self.sample, self.repetition_penalty != 1.0)


class Sampler:
    """The tokens of a batch so far, in tensors that stay where they are: `tokens_BT`, `token_B` (the next step's
    input), `position_1` (its place), `live_B` (rows that have not ended), `logits_BV` (float32, of the last step),
    `finite_B` (rows whose logits held no NaN and no infinity in any step that they lived)."""

    def __init__(self, batch: int, length: int, vocab_size: int, device: torch.device) -> None:
        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.tokens_BT = room(batch, length, dtype=torch.int64)
        self.token_B = room(batch, dtype=torch.int64)
        self.position_1 = room(1, dtype=torch.int64)
        self.live_B = room(batch, dtype=torch.bool)
        self.finite_B = room(batch, dtype=torch.bool)
        self.logits_BV = room(batch, vocab_size, dtype=torch.float32)
        self._seen_BV = room(batch, vocab_size, dtype=torch.bool)
        self._eos_V = room(vocab_size, dtype=torch.bool)
        self._pad_1 = room(1, dtype=torch.int64)
        self._min_new_1 = room(1, dtype=torch.int64)
        self._temperature_1 = room(1, dtype=torch.float32)
        self._penalty_1 = room(1, dtype=torch.float32)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())

    def begin(self, sampling: Sampling, rows: int, prompt: tuple[Tensor, Tensor] | None = None) -> None:
        """Start over with `rows` sequences; the rows behind them have ended already. A sequence begins with the start
        token, or goes on behind a row of `prompt`, ids and attention mask (rows, S): then its first token is the last
        of that row, and those before it count as seen, except the padding on the left."""
        self.tokens_BT.fill_(sampling.pad)
        self.tokens_BT[:, 0] = sampling.start
        self.token_B.fill_(sampling.start)
        self.position_1.zero_()
        self.live_B.zero_()
        self.live_B[:rows] = True
        self.finite_B.fill_(True)
        self._seen_BV.zero_()
        self._seen_BV[:, sampling.start] = True
        if prompt is not None:
            ids_BS, mask_BS = prompt
            self.tokens_BT[:rows, 0] = self.token_B[:rows] = ids_BS[:, -1]
            times_BV = torch.zeros_like(self._seen_BV[:rows], dtype=torch.int64)
            times_BV.scatter_add_(1, ids_BS, mask_BS.long().cumsum(1))
            self._seen_BV[:rows] = times_BV > 0
        self._eos_V.zero_()
        for token in sampling.eos:
            self._eos_V[token] = True
        self._pad_1.fill_(sampling.pad)
        self._min_new_1.fill_(sampling.min_new_tokens)
        self._temperature_1.fill_(sampling.temperature)
        self._penalty_1.fill_(sampling.repetition_penalty)

    def choose(self, logits_BV: Tensor, kind: StepKind) -> None:
        """Append one token to every row that lives, padding to the others, and move on to the next place."""
        choose_tokens(
            *(logits_BV, self.logits_BV, self._seen_BV, self._eos_V, self.tokens_BT, self.token_B, self.live_B),
            *(self.finite_B, self.position_1, self._min_new_1, self._pad_1, self._penalty_1, self._temperature_1),
            kind.penalise,
            kind.sample,
        )
