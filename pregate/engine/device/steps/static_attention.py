"""Attention of one decoding step over caches of fixed size, written and masked by a position that is a tensor.

Same arithmetic as the family's own attention: scores are not scaled, the position bias is added to them, what must not
be seen gets the most negative number. Knows weights and caches of one layer; knows nothing about stacks or experts.

Letters: B batch, S source places, T target places, D model width, H heads, C width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def attend(query_BH1C: Tensor, keys_BHTC: Tensor, values_BHTC: Tensor, bias: Tensor) -> Tensor:
    """What one query a row sees: (B, 1, H*C). `bias` (broadcast to B, H, 1, T) is added to the scores."""
    scores_BH1T = torch.matmul(query_BH1C, keys_BHTC.transpose(2, 3)) + bias
    seen_BH1C = torch.matmul(torch.softmax(scores_BH1T, dim=-1), values_BHTC)
    return seen_BH1C.transpose(1, 2).reshape(query_BH1C.shape[0], 1, -1)


def join_projections(attention: Any) -> Tensor:
    """The query, key and value weights (3*H*C, D) of an attention module as one matrix, to be multiplied at once.

    The module's own weights become parts of it, so that nothing is in memory twice.
    """
    projections = (attention.q, attention.k, attention.v)
    joined = torch.cat([projection.weight.detach() for projection in projections])
    for projection, part in zip(projections, joined.chunk(3), strict=True):
        projection.weight = nn.Parameter(part, requires_grad=False)
    return joined


def self_attention(qkv_B13HC: Tensor, cache_2BHTC: Tensor, position_1: Tensor, bias_1H1T: Tensor) -> Tensor:
    """Put this token's key and value into the cache at `position_1`, then attend to every place that the bias does not
    hide; those behind the position must be hidden. qkv_B13HC: query, key and value, contiguous. Returns (B, 1, H*C)."""
    if qkv_B13HC.device.type == "cuda":
        from pregate.engine.device.ops.kernels_attention import launch_self_attention

        return launch_self_attention(qkv_B13HC, cache_2BHTC, position_1, bias_1H1T)
    return self_attention_twin(qkv_B13HC, cache_2BHTC, position_1, bias_1H1T)


def self_attention_twin(qkv_B13HC: Tensor, cache_2BHTC: Tensor, position_1: Tensor, bias_1H1T: Tensor) -> Tensor:
    """`self_attention` in plain torch."""
    qkv_3BH1C = qkv_B13HC.permute(2, 0, 3, 1, 4)
    cache_2BHTC.index_copy_(3, position_1, qkv_3BH1C[1:])
    return attend(qkv_3BH1C[0], cache_2BHTC[0], cache_2BHTC[1], bias_1H1T)


def cross_attention(query_B1HC: Tensor, cache_2BHSC: Tensor, mask_B11S: Tensor) -> Tensor:
    """Attend to every source place that the mask does not hide: (B, 1, H*C)."""
    if query_B1HC.device.type == "cuda":
        from pregate.engine.device.ops.kernels_attention import launch_cross_attention

        return launch_cross_attention(query_B1HC, cache_2BHSC, mask_B11S)
    return cross_attention_twin(query_B1HC, cache_2BHSC, mask_B11S)


def cross_attention_twin(query_B1HC: Tensor, cache_2BHSC: Tensor, mask_B11S: Tensor) -> Tensor:
    """`cross_attention` in plain torch."""
    return attend(query_B1HC.transpose(1, 2), cache_2BHSC[0], cache_2BHSC[1], mask_B11S)


class StaticSelfAttention:
    """Self-attention of one decoder layer, between its norm and its residual, with room for `length` tokens."""

    def __init__(self, layer: Any, batch: int, length: int) -> None:
        self._attention = attention = layer.SelfAttention
        self.norm, self._out = layer.layer_norm, attention.o
        self._qkv = join_projections(attention)
        self._shape = (batch, 1, 3, attention.n_heads, attention.key_value_proj_dim)
        shape = (2, batch, attention.n_heads, length, attention.key_value_proj_dim)
        self.cache_2BHTC = torch.zeros(shape, dtype=self._qkv.dtype, device=self._qkv.device)

    def join(self) -> None:
        """Join the projections again if one of them has got another weight."""
        projections = (self._attention.q, self._attention.k, self._attention.v)
        parts = zip(projections, self._qkv.chunk(3), strict=True)
        if any(projection.weight.data_ptr() != part.data_ptr() for projection, part in parts):
            self._qkv = join_projections(self._attention)

    def __call__(self, normed_B1D: Tensor, position_1: Tensor, bias_1H1T: Tensor) -> Tensor:
        """`position_1`: the place of this token. Places behind it hold leftovers, which `bias_1H1T` must hide."""
        qkv_B13HC = nn.functional.linear(normed_B1D, self._qkv).view(self._shape)
        return self._out(self_attention(qkv_B13HC, self.cache_2BHTC, position_1, bias_1H1T))


class StaticCrossAttention:
    """Attention of one decoder layer to the source, between its norm and its residual; keys and values are filled once
    a request."""

    def __init__(self, layer: Any, batch: int, length: int) -> None:
        self._attention = attention = layer.EncDecAttention
        self.norm = layer.layer_norm
        self._heads = (attention.n_heads, attention.key_value_proj_dim)
        weight = attention.q.weight
        shape = (2, batch, attention.n_heads, length, attention.key_value_proj_dim)
        self.cache_2BHSC = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    def fill(self, states_BSD: Tensor) -> None:
        """Keys and values of the encoder's last states, which may be fewer rows and places than there is room for."""
        rows, places = states_BSD.shape[:2]
        for cache_BHSC, projection in zip(self.cache_2BHSC, (self._attention.k, self._attention.v), strict=True):
            projected = projection(states_BSD).view(rows, places, *self._heads).transpose(1, 2)
            cache_BHSC[:rows, :, :places].copy_(projected)

    def __call__(self, normed_B1D: Tensor, mask_B11S: Tensor) -> Tensor:
        query_B1HC = self._attention.q(normed_B1D).view(-1, 1, *self._heads)
        return self._attention.o(cross_attention(query_B1HC, self.cache_2BHSC, mask_B11S))


class PositionBias:
    """The relative-position bias of a causal stack, looked up by a position that is a tensor.

    One table holds the bias of every distance that can occur and, for places not yet written, the most negative
    number; a step reads T neighbours of it.
    """

    def __init__(self, attention: Any, length: int) -> None:
        self._attention, self._length = attention, length
        past_HT = self._past()
        hidden_HT = torch.full_like(past_HT[:, 1:], torch.finfo(past_HT.dtype).min)
        self._table = torch.cat([past_HT, hidden_HT], dim=1)
        self._places_T = torch.arange(length, device=past_HT.device) + (length - 1)

    def _past(self) -> Tensor:
        """The bias (H, T) of distances length-1 … 0."""
        bias_1H1T = self._attention.compute_bias(1, self._length, past_seen_tokens=self._length - 1)
        return bias_1H1T.detach()[0, :, 0]

    def look_up(self) -> None:
        """Fill the table again, in its place, for weights that somebody has changed."""
        self._table[:, : self._length].copy_(self._past())

    def __call__(self, position_1: Tensor) -> Tensor:
        """The bias (1, H, 1, T) of the token at `position_1` towards every place of the cache."""
        return self._table.index_select(1, self._places_T - position_1)[None, :, None]


def source_mask(attention_mask_BS: Tensor, mask_B11S: Tensor) -> None:
    """Write into `mask_B11S` what is added to the scores of source places: 0 where `attention_mask_BS` (rows and places
    may be fewer) is set, else the most negative number."""
    rows, places = attention_mask_BS.shape
    hidden = torch.finfo(mask_B11S.dtype).min
    mask_B11S.fill_(hidden)
    mask_B11S[:rows, 0, 0, :places] = torch.where(attention_mask_BS.bool(), 0.0, hidden).to(mask_B11S.dtype)
