"""Rotary attention with grouped key-value heads, of one decoding step: one query a row and head, over a cache of fixed
size.

Turns query and key by the position, puts key and value into the cache, and attends to the places that the row may see.
A program of the first kernel serves all heads of one group over one part of the places, so that each key is read once;
a program of the second joins the parts of one head. Knows nothing about projections, norms or layers.

Letters: B batch, T places of the cache, H query heads, G groups (key-value heads), C width of a head, R half of the
width that is turned, P parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers, operand, rounded, stored
from pregate.engine.device.ops.registry import operation

TILE = 32
"""Places looked at together, few enough for two programs a multiprocessor."""
MOST_PARTS = 16
"""Programs that share a row's places, each of some hundreds."""
NUM_WARPS = 4
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""Not -inf: a part may see no place at all."""


def _no_result(query_B1Q: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(query_B1Q)


@operation("cache_2BGTC", fake=_no_result)
def rotary_attention(
    query_B1Q: Tensor,
    key_B1N: Tensor,
    value_B1N: Tensor,
    cos_BR: Tensor,
    sin_BR: Tensor,
    cache_2BGTC: Tensor,
    place_1: Tensor,
    seen_BT: Tensor,
    scale: float,
    window: int,
    sinks_H: Tensor | None,
) -> Tensor:
    """What the queries see: (B, 1, H*C).

    query_B1Q (B, 1, H*C), key_B1N and value_B1N (B, 1, G*C): before they are turned by `cos_BR` and `sin_BR`; only the
    first 2R channels of a head are, each with the one R behind it. place_1: where this token's key and value go.
    seen_BT: bool, the places that a row may look at; of those the ones up to `place_1` count, and with a `window` above
    0 only so many. scale: what scores are multiplied with. sinks_H: scores of places without a value. Scores and their
    softmax are float32.
    """
    _, batch, groups, places, width = cache_2BGTC.shape
    query_BHC = turned(query_B1Q.view(batch, -1, width), cos_BR, sin_BR)
    key_BGC = turned(key_B1N.view(batch, groups, width), cos_BR, sin_BR)
    cache_2BGTC.index_copy_(3, place_1, torch.stack([key_BGC, value_B1N.view_as(key_BGC)])[:, :, :, None])
    at_T = torch.arange(places, device=place_1.device)
    seen_BT = seen_BT & (at_T <= place_1)
    if window:
        seen_BT = seen_BT & (at_T > place_1 - window)
    keys_BGTC, values_BGTC = cache_2BGTC.float()
    # a place that is hidden may hold anything, and 0 times NaN is NaN
    values_BGTC = values_BGTC.masked_fill(~seen_BT[:, None, :, None], 0)
    query_BGMC = query_BHC.view(batch, groups, -1, width).float()
    scores_BGMT = torch.matmul(query_BGMC, keys_BGTC.transpose(2, 3)) * scale
    scores_BGMT = scores_BGMT.masked_fill(~seen_BT[:, None, None], -torch.inf)
    if sinks_H is not None:
        sinks_BGM1 = sinks_H.float().view(1, groups, -1, 1).expand(batch, -1, -1, -1)
        scores_BGMT = torch.cat([scores_BGMT, sinks_BGM1], dim=-1)
    shares_BGMT = torch.softmax(scores_BGMT, dim=-1)[..., :places]
    return torch.matmul(shares_BGMT, values_BGTC).to(query_B1Q.dtype).view(batch, 1, -1)


def turned(states_BHC: Tensor, cos_BR: Tensor, sin_BR: Tensor) -> Tensor:
    """Each of the first R channels of a head turned together with the one R behind it."""
    half = cos_BR.shape[-1]
    one, other, rest = states_BHC.split([half, half, states_BHC.shape[-1] - 2 * half], dim=-1)
    cos_B1R, sin_B1R = cos_BR[:, None], sin_BR[:, None]
    return torch.cat([one * cos_B1R - other * sin_B1R, other * cos_B1R + one * sin_B1R, rest], dim=-1)


@triton.jit
def turned_heads(heads, channel, inside, cos, sin, R: tl.constexpr, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """`turned` of the numbers at `heads + channel`, those `inside`. `cos`, `sin`: of the row."""
    own = numbers(tl.load(heads + channel, mask=inside, other=0), KIND)
    is_turned = channel < 2 * R
    partner = tl.where(channel < R, channel + R, channel - R)
    other = numbers(tl.load(heads + partner, mask=inside & is_turned, other=0), KIND)
    cosine = numbers(tl.load(cos + channel % R, mask=is_turned, other=0), KIND)
    sine = numbers(tl.load(sin + channel % R, mask=is_turned, other=0), KIND)
    across = rounded(tl.where(channel < R, -other, other) * sine, KIND, NATIVE)
    return tl.where(is_turned, rounded(rounded(own * cosine, KIND, NATIVE) + across, KIND, NATIVE), own)


@triton.jit
def attend_kernel(
    queries,
    new_keys,
    new_values,
    cos,
    sin,
    cache,
    place_1,
    seen_BT,
    sums_BHPC,
    stats_BHP2,
    scale,
    cache_half,
    H: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    LENGTH: tl.constexpr,
    WINDOW: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_C: tl.constexpr,
    HEADS: tl.constexpr,
):
    """`cache`: keys (B, G, LENGTH, C), and `cache_half` numbers behind them the values. Flags are bytes. Of each head
    and part: the weighted values, and the largest score with the sum of shares. HEADS: a power of two of at least 16,
    as many as the tensor cores take, not less than the heads of a group."""
    group, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel, member = tl.arange(0, TILE_C), tl.arange(0, HEADS)
    inside, is_head = channel < C, member < H // G
    head = group * (H // G) + member
    row_cos, row_sin = cos + row * R, sin + row * R
    mine = is_head[:, None] & inside[None, :]
    query = turned_heads(
        queries + (row * H + head[:, None]) * C, channel[None, :], mine, row_cos, row_sin, R, KIND, NATIVE
    )
    query = operand(query, KIND, NATIVE)
    own = (row * G + group) * C
    new_key = turned_heads(new_keys + own, channel, inside, row_cos, row_sin, R, KIND, NATIVE)
    raw_value = tl.load(new_values + own + channel, mask=inside, other=0)
    new_value = numbers(raw_value, KIND)

    place = tl.load(place_1).to(tl.int32)
    keys = cache + (row * G + group).to(tl.int64) * LENGTH * C
    values = keys + cache_half
    if part == 0:
        tl.store(keys + place * C + channel, stored(new_key, KIND), mask=inside)
        tl.store(values + place * C + channel, raw_value, mask=inside)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(place + 1 - WINDOW, 0) // TILE * TILE
    share_of_tiles = tl.cdiv(tl.cdiv(place + 1 - begin, TILE), PARTS)
    begin += part * share_of_tiles * TILE
    end = tl.minimum(begin + share_of_tiles * TILE, place + 1)

    most = tl.full((HEADS,), LOWEST, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, TILE_C), tl.float32)
    for first in range(begin, end, TILE):
        at = first + tl.arange(0, TILE)
        seen = (at < end) & (tl.load(seen_BT + row * LENGTH + at, mask=at < end, other=0) != 0)
        if WINDOW > 0:
            seen = seen & (at > place - WINDOW)
        both = seen[:, None] & inside[None, :]
        offset = at[:, None] * C + channel[None, :]
        key = numbers(tl.load(keys + offset, mask=both, other=0), KIND)
        value = numbers(tl.load(values + offset, mask=both, other=0), KIND)
        # what was stored just now may not be there to be loaded yet
        is_new = (at == place)[:, None]
        key = operand(tl.where(is_new, new_key[None, :], key), KIND, NATIVE)
        value = operand(tl.where(is_new, new_value[None, :], value), KIND, NATIVE)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, -float("inf"))
        highest = tl.maximum(most, tl.max(score, axis=1))
        share = tl.exp(score - highest[:, None])
        fading = tl.exp(most - highest)
        total = total * fading + tl.sum(share, axis=1)
        sums = sums * fading[:, None] + tl.dot(operand(share, KIND, NATIVE), value, input_precision="ieee")
        most = highest
    slot = (row * H + head) * PARTS + part
    tl.store(sums_BHPC + slot[:, None] * C + channel[None, :], sums, mask=mine)
    tl.store(stats_BHP2 + slot * 2, most, mask=is_head)
    tl.store(stats_BHP2 + slot * 2 + 1, total, mask=is_head)


@triton.jit
def join_kernel(
    sums_BHPC,
    stats_BHP2,
    sinks,
    outputs,
    H: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    SINKS: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """outputs (B, H*C): a program a head and row. `sinks` is read if SINKS."""
    head, row = tl.program_id(0), tl.program_id(1)
    channel, part = tl.arange(0, TILE_C), tl.arange(0, PARTS)
    slot = (row * H + head) * PARTS + part
    most, total = tl.load(stats_BHP2 + slot * 2), tl.load(stats_BHP2 + slot * 2 + 1)
    highest = tl.max(most, axis=0)
    if SINKS:
        sink = numbers(tl.load(sinks + head), KIND)
        highest = tl.maximum(highest, sink)
    fading = tl.exp(most - highest)
    all_shares = tl.sum(total * fading, axis=0)
    if SINKS:
        all_shares += tl.exp(sink - highest)
    inside = channel < C
    sums = tl.load(sums_BHPC + slot[:, None] * C + channel[None, :], mask=inside[None, :], other=0)
    result = rounded(tl.sum(sums * fading[:, None], axis=0) / all_shares, KIND, NATIVE)
    tl.store(outputs + (row * H + head) * C + channel, stored(result, KIND), mask=inside)


@rotary_attention.on_cuda
def launch_rotary_attention(
    query_B1Q: Tensor,
    key_B1N: Tensor,
    value_B1N: Tensor,
    cos_BR: Tensor,
    sin_BR: Tensor,
    cache_2BGTC: Tensor,
    place_1: Tensor,
    seen_BT: Tensor,
    scale: float,
    window: int,
    sinks_H: Tensor | None,
) -> Tensor:
    _, batch, groups, _, width = cache_2BGTC.shape
    heads = query_B1Q.shape[-1] // width
    constants = attention_constants(cache_2BGTC, heads, cos_BR.shape[-1], window)
    parts, kind = constants["PARTS"], constants["KIND"]
    raw = RAW[kind]
    assert cache_2BGTC.is_contiguous() and seen_BT.is_contiguous()
    sums_BHPC = torch.empty(batch, heads, parts, width, dtype=torch.float32, device=query_B1Q.device)
    stats_BHP2 = torch.empty(batch, heads, parts, 2, dtype=torch.float32, device=query_B1Q.device)
    outputs = torch.empty(query_B1Q.shape, dtype=query_B1Q.dtype, device=query_B1Q.device)
    attend_kernel[(groups, batch, parts)](
        *(part.contiguous().view(raw) for part in (query_B1Q, key_B1N, value_B1N, cos_BR, sin_BR)),
        cache_2BGTC.view(raw),
        place_1,
        seen_BT.view(torch.uint8),
        sums_BHPC,
        stats_BHP2,
        scale,
        cache_2BGTC.stride(0),
        **constants,
        num_warps=NUM_WARPS,
    )
    join_kernel[(heads, batch)](
        sums_BHPC,
        stats_BHP2,
        (query_B1Q if sinks_H is None else sinks_H.contiguous()).view(raw),
        outputs.view(raw),
        SINKS=sinks_H is not None,
        **{name: constants[name] for name in ("H", "C", "PARTS", "KIND", "NATIVE", "TILE_C")},
        num_warps=NUM_WARPS,
    )
    return outputs


def attention_constants(cache_2BGTC: Tensor, heads: int, half: int, window: int) -> dict[str, Any]:
    """What `attend_kernel` is compiled for, by the names of its arguments."""
    _, _, groups, length, width = cache_2BGTC.shape
    return {
        "H": heads,
        "G": groups,
        "C": width,
        "R": half,
        "LENGTH": length,
        "WINDOW": window,
        "PARTS": min(MOST_PARTS, triton.next_power_of_2(triton.cdiv(length, 8 * TILE))),
        "KIND": FLOATS[cache_2BGTC.dtype],
        "NATIVE": isinstance(attend_kernel, triton.JITFunction),
        "TILE": min(TILE, max(16, triton.next_power_of_2(length))),
        "TILE_C": max(16, triton.next_power_of_2(width)),
        "HEADS": max(16, triton.next_power_of_2(heads // groups)),
    }
