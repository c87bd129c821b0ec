"""The next token of every row: a row's logits are read once, by several programs, then one program notes the tokens.

Same order of operations as Hugging Face `generate`: repetition penalty, minimum length, temperature, choice. Knows
logits, tokens and flags of rows. Letters: B rows, T places of a target, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers
from pregate.engine.device.ops.registry import operation

SPLITS = 16
"""Programs that share a row's vocabulary."""
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
"""Of the finite numbers."""


@operation("kept_BV", "seen_BV", "tokens_BT", "token_B", "live_B", "finite_B", "position_1")
def choose_tokens(
    logits_BV: Tensor,
    kept_BV: Tensor,
    seen_BV: Tensor,
    eos_V: Tensor,
    tokens_BT: Tensor,
    token_B: Tensor,
    live_B: Tensor,
    finite_B: Tensor,
    position_1: Tensor,
    min_new_1: Tensor,
    pad_1: Tensor,
    penalty_1: Tensor,
    temperature_1: Tensor,
    penalise: bool,
    sample: bool,
) -> None:
    """Append one token to every row that lives and padding to the others, and move on to the next place.

    `kept_BV` (float32) gets the logits. Flags are bool: `seen_BV` tokens of the row so far, `eos_V` tokens that end
    a row, `live_B` rows that have not ended, `finite_B` rows whose logits were finite while they lived. `tokens_BT`,
    `token_B`: all tokens and the last. `position_1`: the place of the last. `penalise`, `sample`: whether there is a
    repetition penalty, and whether the token is drawn, by the temperature, or is the likeliest.
    """
    kept_BV.copy_(logits_BV)
    scores_BV = kept_BV
    finite_B &= scores_BV.isfinite().all(-1) | ~live_B
    if penalise:
        penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty_1, scores_BV / penalty_1)
        scores_BV = torch.where(seen_BV, penalised_BV, scores_BV)
    scores_BV = scores_BV.masked_fill(eos_V & (position_1 < min_new_1), -torch.inf)
    if sample:
        # the largest of p/Exp(1) is a draw from p, without a search in cumulated probabilities
        shares_BV = torch.softmax(scores_BV / temperature_1, dim=-1)
        scores_BV = shares_BV / torch.empty_like(shares_BV).exponential_()
    chosen_B = torch.where(live_B, scores_BV.argmax(-1), pad_1)
    position_1 += 1
    tokens_BT.index_copy_(1, position_1, chosen_B[:, None])
    token_B.copy_(chosen_B)
    live_B &= ~eos_V.index_select(0, chosen_B)
    if penalise:
        seen_BV.scatter_(1, chosen_B[:, None], True)


@triton.jit
def best_kernel(
    logits,
    kept_BV,
    seen_BV,
    eos_V,
    position_1,
    min_new_1,
    penalty_1,
    best_BP,
    token_BP,
    broken_BP,
    V: tl.constexpr,
    PENALISES: tl.constexpr,
    KIND: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The best of TILE tokens of a row, and whether a logit of theirs is NaN or infinite, for each of SPLITS programs.
    Flags are bytes."""
    part, row = tl.program_id(0), tl.program_id(1)
    token = part * TILE + tl.arange(0, TILE)
    inside = token < V
    score = numbers(tl.load(logits + row * V + token, mask=inside, other=0), KIND)
    tl.store(kept_BV + row * V + token, score, mask=inside)
    # a comparison with NaN is false
    is_finite = tl.abs(score) <= LARGEST
    tl.store(broken_BP + row * SPLITS + part, tl.max((inside & (is_finite == 0)).to(tl.int32), axis=0))
    if PENALISES:
        penalty = tl.load(penalty_1)
        is_seen = tl.load(seen_BV + row * V + token, mask=inside, other=0) != 0
        score = tl.where(is_seen, tl.where(score < 0, score * penalty, score / penalty), score)
    is_early = tl.load(position_1) < tl.load(min_new_1)
    ends = tl.load(eos_V + token, mask=inside, other=0) != 0
    score = tl.where(inside & ((ends & is_early) == 0), score, -float("inf"))
    best = tl.max(score, axis=0)
    tl.store(best_BP + row * SPLITS + part, best)
    tl.store(token_BP + row * SPLITS + part, tl.min(tl.where(score == best, token, V), axis=0))


@triton.jit
def choose_kernel(
    best_BP,
    token_BP,
    broken_BP,
    seen_BV,
    eos_V,
    tokens_BT,
    token_B,
    live_B,
    finite_B,
    position_1,
    pad_1,
    num_rows: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    PENALISES: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for all rows; ROWS is the power of two at or above `num_rows`."""
    row = tl.arange(0, ROWS)
    inside = row < num_rows
    place = row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    best = tl.load(best_BP + place, mask=inside[:, None], other=0)
    token = tl.load(token_BP + place, mask=inside[:, None], other=0)
    chosen = tl.min(tl.where(best == tl.max(best, axis=1)[:, None], token, V), axis=1)
    # where no number was larger than another, as in a row of NaN
    chosen = tl.where(chosen < V, chosen, 0).to(tl.int64)
    is_live = tl.load(live_B + row, mask=inside, other=0) != 0
    is_broken = tl.max(tl.load(broken_BP + place, mask=inside[:, None], other=0), axis=1) != 0
    was_finite = tl.load(finite_B + row, mask=inside, other=0) != 0
    tl.store(finite_B + row, (was_finite & ((is_broken & is_live) == 0)).to(tl.uint8), mask=inside)
    chosen = tl.where(is_live, chosen, tl.load(pad_1))
    position = tl.load(position_1)
    tl.debug_barrier()
    tl.store(position_1, position + 1)
    tl.store(tokens_BT + row * T + position + 1, chosen, mask=inside)
    tl.store(token_B + row, chosen, mask=inside)
    has_ended = tl.load(eos_V + chosen, mask=inside, other=0) != 0
    tl.store(live_B + row, (is_live & (has_ended == 0)).to(tl.uint8), mask=inside)
    if PENALISES:
        tl.store(seen_BV + row * V + chosen, tl.full((ROWS,), 1, tl.uint8), mask=inside)


@choose_tokens.on_cuda
def launch_choose_tokens(
    logits_BV: Tensor,
    kept_BV: Tensor,
    seen_BV: Tensor,
    eos_V: Tensor,
    tokens_BT: Tensor,
    token_B: Tensor,
    live_B: Tensor,
    finite_B: Tensor,
    position_1: Tensor,
    min_new_1: Tensor,
    pad_1: Tensor,
    penalty_1: Tensor,
    temperature_1: Tensor,
    penalise: bool,
    sample: bool,
) -> None:
    if sample:
        choose_tokens.reference(
            *(logits_BV, kept_BV, seen_BV, eos_V, tokens_BT, token_B, live_B, finite_B, position_1),
            *(min_new_1, pad_1, penalty_1, temperature_1, penalise, sample),
        )
        return
    seen_BV, eos_V, live_B, finite_B = (flag.view(torch.uint8) for flag in (seen_BV, eos_V, live_B, finite_B))
    (rows, vocabulary), kind = logits_BV.shape, FLOATS[logits_BV.dtype]
    best_BP = torch.empty(rows, SPLITS, dtype=torch.float32, device=logits_BV.device)
    token_BP, broken_BP = (torch.empty(rows, SPLITS, dtype=torch.int32, device=logits_BV.device) for _ in range(2))
    best_kernel[(SPLITS, rows)](
        logits_BV.contiguous().view(RAW[kind]),
        kept_BV,
        seen_BV,
        eos_V,
        position_1,
        min_new_1,
        penalty_1,
        best_BP,
        token_BP,
        broken_BP,
        V=vocabulary,
        PENALISES=penalise,
        KIND=kind,
        SPLITS=SPLITS,
        TILE=triton.next_power_of_2(triton.cdiv(vocabulary, SPLITS)),
        num_warps=8,
    )
    choose_kernel[(1,)](
        best_BP,
        token_BP,
        broken_BP,
        seen_BV,
        eos_V,
        tokens_BT,
        token_B,
        live_B,
        finite_B,
        position_1,
        pad_1,
        num_rows=rows,
        V=vocabulary,
        T=tokens_BT.shape[1],
        PENALISES=penalise,
        SPLITS=SPLITS,
        ROWS=triton.next_power_of_2(rows),
        num_warps=1,
    )
