"""Attention of one decoding step: one query a row and head, over a cache of fixed size.

Scores are not scaled, and a bias is added to them; what must not be seen has the most negative number there. A program
of the kernel serves one head of one row: it walks over the cache in tiles, keeping the largest score, the sum of shares
and the weighted values so far, so that scores are never written to memory. Knows nothing about projections or layers.

Letters: B batch, S source places, T target places, H heads, C width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers, rounded, stored
from pregate.engine.device.ops.registry import operation

TILE = 128
"""Places looked at together."""
NUM_WARPS = 8


def _no_result(queries: Tensor, cache_2BHTC: Tensor, *_: Tensor) -> Tensor:
    batch, heads, width = cache_2BHTC.shape[1], cache_2BHTC.shape[2], cache_2BHTC.shape[4]
    return queries.new_empty(batch, 1, heads * width)


@operation("cache_2BHTC", fake=_no_result)
def self_attention(qkv_B13HC: Tensor, cache_2BHTC: Tensor, position_1: Tensor, bias_1H1T: Tensor) -> Tensor:
    """Put this token's key and value into the cache at `position_1`, then attend to every place that the bias does not
    hide; those behind the position must be hidden. qkv_B13HC: query, key and value, contiguous. Returns (B, 1, H*C)."""
    qkv_3BH1C = qkv_B13HC.permute(2, 0, 3, 1, 4)
    cache_2BHTC.index_copy_(3, position_1, qkv_3BH1C[1:])
    return _attend(qkv_3BH1C[0], cache_2BHTC[0], cache_2BHTC[1], bias_1H1T)


@operation(fake=_no_result)
def cross_attention(query_B1HC: Tensor, cache_2BHSC: Tensor, mask_B11S: Tensor) -> Tensor:
    """Attend to every source place that the mask does not hide: (B, 1, H*C)."""
    return _attend(query_B1HC.transpose(1, 2), cache_2BHSC[0], cache_2BHSC[1], mask_B11S)


def _attend(query_BH1C: Tensor, keys_BHTC: Tensor, values_BHTC: Tensor, bias: Tensor) -> Tensor:
    """What one query a row sees: (B, 1, H*C). `bias` (broadcast to B, H, 1, T) is added to the scores."""
    scores_BH1T = torch.matmul(query_BH1C, keys_BHTC.transpose(2, 3)) + bias
    seen_BH1C = torch.matmul(torch.softmax(scores_BH1T, dim=-1), values_BHTC)
    return seen_BH1C.transpose(1, 2).reshape(query_BH1C.shape[0], 1, -1)


@triton.jit
def attention_kernel(
    queries,
    cache,
    bias,
    position_1,
    outputs,
    query_stride,
    bias_row_stride,
    bias_head_stride,
    cache_half,
    H: tl.constexpr,
    C: tl.constexpr,
    LENGTH: tl.constexpr,
    GROWS: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """outputs (B, H*C). `cache`: keys (B, H, LENGTH, C), and `cache_half` numbers behind them the values.

    GROWS: `queries` holds query, key and value of this token (B, 3, H, C); the latter two are put into the cache at the
    position, and nothing behind it is looked at. Else `queries` is (B, H, C), and all LENGTH places are.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, TILE_C)
    inside = channel < C
    mine = queries + row * query_stride + head * C + channel
    query = numbers(tl.load(mine, mask=inside, other=0), KIND)
    keys = cache + (row * H + head).to(tl.int64) * LENGTH * C
    values = keys + cache_half
    length = LENGTH
    if GROWS:
        position = tl.load(position_1)
        length = (position + 1).to(tl.int32)
        new_key = tl.load(mine + H * C, mask=inside, other=0)
        new_value = tl.load(mine + 2 * H * C, mask=inside, other=0)
        tl.store(keys + position * C + channel, new_key, mask=inside)
        tl.store(values + position * C + channel, new_value, mask=inside)
        new_key, new_value = numbers(new_key, KIND), numbers(new_value, KIND)
    # the lowest float32, not -inf: all scores of a tile may be -inf, where it is hidden in float16
    most = tl.full((), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((), tl.float32)
    seen = tl.zeros((TILE_C,), tl.float32)
    for first in range(0, length, TILE):
        place = first + tl.arange(0, TILE)
        known = place < length
        both = known[:, None] & inside[None, :]
        offset = place[:, None] * C + channel[None, :]
        key = numbers(tl.load(keys + offset, mask=both, other=0), KIND)
        value = numbers(tl.load(values + offset, mask=both, other=0), KIND)
        if GROWS:  # what was stored just now may not be there to be loaded yet
            is_new = (place == position)[:, None]
            key = tl.where(is_new, new_key[None, :], key)
            value = tl.where(is_new, new_value[None, :], value)
        score = rounded(tl.sum(key * query[None, :], axis=1), KIND, NATIVE)
        added = tl.load(bias + row * bias_row_stride + head * bias_head_stride + place, mask=known, other=0)
        score = rounded(score + numbers(added, KIND), KIND, NATIVE)
        score = tl.where(known, score, -float("inf"))
        highest = tl.maximum(most, tl.max(score, axis=0))
        share = tl.exp(score - highest)
        fading = tl.exp(most - highest)
        total = total * fading + tl.sum(share, axis=0)
        seen = seen * fading + tl.sum(share[:, None] * value, axis=0)
        most = highest
    result = rounded(seen / total, KIND, NATIVE)
    tl.store(outputs + row * H * C + head * C + channel, stored(result, KIND), mask=inside)


@self_attention.on_cuda
def launch_self_attention(qkv_B13HC: Tensor, cache_2BHTC: Tensor, position_1: Tensor, bias_1H1T: Tensor) -> Tensor:
    return _launch(qkv_B13HC, cache_2BHTC, bias_1H1T, position_1)


@cross_attention.on_cuda
def launch_cross_attention(query_B1HC: Tensor, cache_2BHSC: Tensor, mask_B11S: Tensor) -> Tensor:
    return _launch(query_B1HC, cache_2BHSC, mask_B11S, None)


def _launch(queries: Tensor, cache_2BHTC: Tensor, bias_BHXT: Tensor, position_1: Tensor | None) -> Tensor:
    _, batch, heads, length, width = cache_2BHTC.shape
    kind = FLOATS[cache_2BHTC.dtype]
    raw = RAW[kind]
    assert queries.is_contiguous() and cache_2BHTC.is_contiguous() and bias_BHXT.stride(-1) == 1
    outputs = torch.empty(batch, 1, heads * width, dtype=queries.dtype, device=queries.device)
    row_stride, head_stride = (0 if bias_BHXT.shape[d] == 1 else bias_BHXT.stride(d) for d in (0, 1))
    attention_kernel[(heads, batch)](
        queries.view(raw),
        cache_2BHTC.view(raw),
        bias_BHXT.view(raw),
        queries if position_1 is None else position_1,
        outputs.view(raw),
        queries.numel() // batch,
        row_stride,
        head_stride,
        cache_2BHTC.stride(0),
        H=heads,
        C=width,
        LENGTH=length,
        GROWS=position_1 is not None,
        KIND=kind,
        NATIVE=isinstance(attention_kernel, triton.JITFunction),
        TILE=min(TILE, max(16, triton.next_power_of_2(length))),
        TILE_C=max(16, triton.next_power_of_2(width)),
        num_warps=NUM_WARPS,
    )
    return outputs
