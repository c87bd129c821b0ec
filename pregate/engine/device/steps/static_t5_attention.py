"""Attention of one decoding step over caches of fixed size, written and masked by a position that is a tensor.

Same arithmetic as the family's own attention. Knows weights and caches of one layer; knows nothing about stacks or
experts.

Letters: B batch, S source places, T target places, D model width, H heads, C width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pregate.engine.device.ops.attention import cross_attention, self_attention


def join_projections(attention: Any) -> Tensor:
    """The query, key and value weights (3*H*C, D) of an attention module as one matrix, to be multiplied at once.

    The module's own weights become parts of it, so that nothing is in memory twice.
    """
    projections = (attention.q, attention.k, attention.v)
    joined = torch.cat([projection.weight.detach() for projection in projections])
    for projection, part in zip(projections, joined.chunk(3), strict=True):
        projection.weight = nn.Parameter(part, requires_grad=False)
    return joined


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

    def begin(self) -> None:
        """Start a request. A hidden place must be finite: its share is 0, and 0 times NaN is NaN."""
        self.cache_2BHTC.zero_()

    def __call__(self, normed_B1D: Tensor, position_1: Tensor, bias_1H1T: Tensor) -> Tensor:
        """`position_1`: the place of this token. `bias_1H1T` must hide the places behind it."""
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
        """Keys and values of the encoder's last states, which may be fewer rows and places than there is room for. The
        rest is 0: a place that the mask hides must be finite."""
        rows, places = states_BSD.shape[:2]
        self.cache_2BHSC.zero_()
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
        """Fill the table again, in its place, for weights that have changed."""
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
