"""How attention of a Switch model is computed where its order of operations need not be upstream's."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.switch_transformers.modeling_switch_transformers import eager_attention_forward

from pregate.models.biased_attention import biased_attention

REFERENCE, FAST = "eager", "pregate_biased"


def fast_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Upstream's, but in training on a CPU by `biased_attention`, which has no weights to return."""
    if not module.training or query.device.type != "cpu" or scaling != 1.0 or kwargs.get("output_attentions"):
        return eager_attention_forward(
            module, query, key, value, attention_mask, scaling, dropout, position_bias, **kwargs
        )
    return biased_attention(query, key, value, position_bias, attention_mask, dropout), None


AttentionInterface.register(FAST, fast_attention)
AttentionMaskInterface.register(FAST, eager_mask)
