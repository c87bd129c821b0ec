"""The Triton kernel behind `TokenChooser.choose_greedily`: a row's logits are read once, and its next token noted.

Knows logits, tokens and flags of rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pregate.engine.device.kernels_numbers import FLOATS, RAW, numbers

TILE = 4096
NUM_WARPS = 16


@triton.jit
def choose_kernel(
    logits,
    logits_BV,
    seen_BV,
    eos_V,
    tokens_BT,
    token_B,
    live_B,
    position_1,
    min_new_1,
    pad_1,
    penalty_1,
    V: tl.constexpr,
    T: tl.constexpr,
    PENALISES: tl.constexpr,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program a row; `position_1` is left as it is. Flags are bytes."""
    row = tl.program_id(0)
    position = tl.load(position_1)
    is_early = position < tl.load(min_new_1)
    penalty = tl.load(penalty_1)
    best = tl.full((TILE,), -float("inf"), tl.float32)
    best_token = tl.full((TILE,), V, tl.int32)
    for first in range(0, V, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < V
        score = numbers(tl.load(logits + row * V + token, mask=inside, other=0), KIND)
        tl.store(logits_BV + row * V + token, score, mask=inside)
        if PENALISES:
            is_seen = tl.load(seen_BV + row * V + token, mask=inside, other=0) != 0
            score = tl.where(is_seen, tl.where(score < 0, score * penalty, score / penalty), score)
        ends = tl.load(eos_V + token, mask=inside, other=0) != 0
        score = tl.where(inside & ((ends & is_early) == 0), score, -float("inf"))
        is_better = score > best
        best_token = tl.where(is_better, token, best_token)
        best = tl.where(is_better, score, best)
    highest = tl.max(best, axis=0)
    chosen = tl.min(tl.where(best == highest, best_token, V), axis=0)
    # where no number was larger than another, as in a row of NaN
    chosen = tl.where(chosen < V, chosen, 0).to(tl.int64)
    is_live = tl.load(live_B + row) != 0
    chosen = tl.where(is_live, chosen, tl.load(pad_1))
    tl.store(tokens_BT + row * T + position + 1, chosen)
    tl.store(token_B + row, chosen)
    ended = tl.load(eos_V + chosen) != 0
    tl.store(live_B + row, (is_live & (ended == 0)).to(tl.uint8))
    if PENALISES:
        tl.store(seen_BV + row * V + chosen, tl.full((), 1, tl.uint8))


def launch_choose(
    logits_BV: Tensor,
    kept_BV: Tensor,
    seen_BV: Tensor,
    eos_V: Tensor,
    tokens_BT: Tensor,
    token_B: Tensor,
    live_B: Tensor,
    position_1: Tensor,
    min_new_1: Tensor,
    pad_1: Tensor,
    penalty_1: Tensor,
    *,
    penalises: bool,
) -> None:
    """See `TokenChooser.choose_greedily`; flags are uint8 views."""
    (rows, vocabulary), kind = logits_BV.shape, FLOATS[logits_BV.dtype]
    launch: Any = choose_kernel[(rows,)]
    launch(
        logits_BV.contiguous().view(RAW[kind]),
        kept_BV,
        seen_BV,
        eos_V,
        tokens_BT,
        token_B,
        live_B,
        position_1,
        min_new_1,
        pad_1,
        penalty_1,
        V=vocabulary,
        T=tokens_BT.shape[1],
        PENALISES=penalises,
        KIND=kind,
        TILE=min(TILE, triton.next_power_of_2(vocabulary)),
        num_warps=NUM_WARPS,
    )
