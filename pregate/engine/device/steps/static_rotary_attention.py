"""Rotary attention of one decoding step, in the place of a layer's own: over a cache of fixed size, at a position that
is a tensor.

Same arithmetic as upstream's attention modules with `q_proj`, `k_proj`, `v_proj` and `o_proj`. Knows the weights and
the cache of one layer; knows nothing about stacks or experts.

Letters: B batch, T places, D model width, H query heads, G key-value heads, C width of a head, R half of the width that
is turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from pregate.engine.device.ops.rotary_attention import rotary_attention
from pregate.engine.device.steps.static_norm import static_norm


@dataclass(frozen=True)
class Places:
    """Where the rows of a request are, in tensors that stay where they are. place_1: where the step's keys and values
    go. seen_BT: bool, the places that a row may look at once they are written. padding_B: places of a row that hold no
    token, which its positions do not count."""

    place_1: Tensor
    seen_BT: Tensor
    padding_B: Tensor

    @classmethod
    def empty(cls, batch: int, length: int, device: torch.device) -> Places:
        return cls(
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.ones(batch, length, dtype=torch.bool, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return self.place_1.nbytes + self.seen_BT.nbytes + self.padding_B.nbytes

    def begin(self, attention_mask_BS: Tensor) -> None:
        """Behind a prompt, whose rows may be fewer."""
        rows, places = attention_mask_BS.shape
        is_token_BS = attention_mask_BS.bool()
        self.seen_BT.fill_(True)
        # the last place is the step's own: even a row that is not used sees something
        self.seen_BT[:, : places - 1] = False
        self.seen_BT[:rows, :places] = is_token_BS
        self.padding_B.zero_()
        self.padding_B[:rows] = (~is_token_BS).sum(1)


class StaticRotaryAttention:
    """Attention of layer `layer` between its norm and its residual."""

    def __init__(self, attention: Any, config: Any, layer: int, cache_2BGTC: Tensor, places: Places) -> None:
        self._attention, self._cache_2BGTC, self._places = attention, cache_2BGTC, places
        self._query_norm, self._key_norm = (
            _HeadNorm(module, cache_2BGTC.dtype) if (module := getattr(attention, name, None)) is not None else None
            for name in ("q_norm", "k_norm")
        )
        self._clip = getattr(config, "clip_qkv", None)
        self._window = window_of(attention, config, layer)

    def __call__(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        """As upstream's module. position_embeddings: the parts (B, R) of cosine and sine that differ."""
        attention = self._attention
        seen_B1Q = rotary_attention(
            self._made_ready(attention.q_proj(hidden_states), self._query_norm),
            self._made_ready(attention.k_proj(hidden_states), self._key_norm),
            self._made_ready(attention.v_proj(hidden_states), None),
            *position_embeddings,
            *(self._cache_2BGTC, self._places.place_1, self._places.seen_BT),
            *(float(attention.scaling), self._window, getattr(attention, "sinks", None)),
        )
        return attention.o_proj(seen_B1Q), None

    def _made_ready(self, states_B1Q: Tensor, head_norm: _HeadNorm | None) -> Tensor:
        """What the model does to queries, keys and values behind their projections."""
        if head_norm is not None:
            states_B1Q = head_norm(states_B1Q)
        return states_B1Q if self._clip is None else states_B1Q.clamp(-self._clip, self._clip)


class _HeadNorm:
    """A norm over as many channels as it has weights: the whole width, or each head for itself."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._norm, self._width = static_norm(module, dtype), module.weight.numel()

    def __call__(self, states_B1Q: Tensor) -> Tensor:
        return self._norm(states_B1Q.unflatten(-1, (-1, self._width))).flatten(-2)


def window_of(attention: Any, config: Any, layer: int) -> int:
    """How many places a layer sees, its own included; 0 where it sees all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return 0
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    return int(window or 0)


class PromptLayer(DynamicLayer):
    """Upstream's cache of one layer for a prompt that is read at once: what comes in goes into the static cache."""

    def __init__(self, cache_2BGTC: Tensor) -> None:
        super().__init__()
        self._cache_2BGTC = cache_2BGTC

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows, places = key_states.shape[0], key_states.shape[2]
        for cache_BGTC, states_BGTC in zip(self._cache_2BGTC, (key_states, value_states), strict=True):
            cache_BGTC[:rows, :, :places].copy_(states_BGTC)
        return key_states, value_states
