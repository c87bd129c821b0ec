"""Which token comes next, decided on the device: greedy or by temperature, with what ends a sequence kept beside it.

Same order of operations as Hugging Face `generate`: repetition penalty, minimum length, temperature, choice. Knows
tokens and logits; knows nothing about models.

Letters: B batch, T places of a target (the start token and all new ones), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


class TokenChooser:
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

    def begin(self, sampling: Sampling, rows: int) -> None:
        """Start over with `rows` sequences; the rows behind them have ended already."""
        self.tokens_BT.fill_(sampling.pad)
        self.tokens_BT[:, 0] = sampling.start
        self.token_B.fill_(sampling.start)
        self.position_1.zero_()
        self.live_B.zero_()
        self.live_B[:rows] = True
        self.finite_B.fill_(True)
        self._seen_BV.zero_()
        self._seen_BV[:, sampling.start] = True
        self._eos_V.zero_()
        for token in sampling.eos:
            self._eos_V[token] = True
        self._pad_1.fill_(sampling.pad)
        self._min_new_1.fill_(sampling.min_new_tokens)
        self._temperature_1.fill_(sampling.temperature)
        self._penalty_1.fill_(sampling.repetition_penalty)

    def choose(self, logits_BV: Tensor, kind: StepKind) -> None:
        """Append one token to every row that lives, padding to the others, and move on to the next place."""
        if logits_BV.device.type == "cuda" and not kind.sample:
            self.choose_greedily(logits_BV, kind)
        else:
            self.choose_twin(logits_BV, kind)

    def choose_greedily(self, logits_BV: Tensor, kind: StepKind) -> None:
        """`choose` without a draw, by a kernel."""
        from pregate.engine.device.ops.kernels_sampling import launch_choose

        flags = (self._seen_BV, self._eos_V, self.live_B, self.finite_B)
        seen_BV, eos_V, live_B, finite_B = (flag.view(torch.uint8) for flag in flags)
        settings = (self._min_new_1, self._pad_1, self._penalty_1)
        launch_choose(
            *(logits_BV, self.logits_BV, seen_BV, eos_V, self.tokens_BT, self.token_B, live_B, finite_B),
            self.position_1,
            *settings,
            penalises=kind.penalise,
        )

    def choose_twin(self, logits_BV: Tensor, kind: StepKind) -> None:
        """`choose` in plain torch."""
        self.logits_BV.copy_(logits_BV)
        scores_BV = self.logits_BV
        self.finite_B &= scores_BV.isfinite().all(-1) | ~self.live_B
        if kind.penalise:
            penalised_BV = torch.where(scores_BV < 0, scores_BV * self._penalty_1, scores_BV / self._penalty_1)
            scores_BV = torch.where(self._seen_BV, penalised_BV, scores_BV)
        scores_BV = scores_BV.masked_fill(self._eos_V & (self.position_1 < self._min_new_1), -torch.inf)
        if kind.sample:
            # the largest of p/Exp(1) is a draw from p, without a search in cumulated probabilities
            shares_BV = torch.softmax(scores_BV / self._temperature_1, dim=-1)
            scores_BV = shares_BV / torch.empty_like(shares_BV).exponential_()
        chosen_B = torch.where(self.live_B, scores_BV.argmax(-1), self._pad_1)
        self.position_1 += 1
        self.tokens_BT.index_copy_(1, self.position_1, chosen_B[:, None])
        self.token_B.copy_(chosen_B)
        self.live_B &= ~self._eos_V.index_select(0, chosen_B)
        if kind.penalise:
            self._seen_BV.scatter_(1, chosen_B[:, None], True)
