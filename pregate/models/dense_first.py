"""What families have in common whose first layers are dense, and whose checkpoints hold layers that no model reads.

DeepSeek and GLM: routed experts beside shared ones, which stay upstream's, and experts chosen within groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pregate.models.decoder_only import STACK
from pregate.models.decoder_only_family import DecoderOnlyFamily


class DenseFirstFamily(DecoderOnlyFamily):
    """The layers behind the first `first_k_dense_replace` have experts."""

    experts_setting = "n_routed_experts"
    width_setting = "moe_intermediate_size"

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        return list(range(config.first_k_dense_replace, config.num_hidden_layers))

    def extras(self, config: Any) -> list[str]:
        """Also the layers that predict tokens further ahead, which are numbered on from those of the model."""
        first, number = config.num_hidden_layers, getattr(config, "num_nextn_predict_layers", 0)
        return [*super().extras(config), *(rf"^model\.layers\.{layer}\." for layer in range(first, first + number))]

    def smaller(self, config: Mapping[str, Any], depth: float, num_experts: int) -> dict[str, Any]:
        """With all of its dense layers, and one group of experts, which any number of experts makes."""
        whole = self.config(config)
        dense, sparse = whole.first_k_dense_replace, len(self.moe_layers(whole, STACK))
        layers = {"num_hidden_layers": dense + max(1, round(depth * sparse))}
        return {**super().smaller(config, depth, num_experts), **layers, "n_group": 1, "topk_group": 1}


class LatentAttentionFamily(DenseFirstFamily):
    """Multi-head latent attention: keys and values are expanded from a narrow state."""

    def random_scale(self, name: str, config: Mapping[str, Any]) -> float | None:
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part == "o_proj":
            # its input has heads of another width than the setting head_dim, which is that of rotary embeddings
            return super().random_scale(name, {**config, "head_dim": config["v_head_dim"]})
        ranks = {"q_b_proj": "q_lora_rank", "kv_b_proj": "kv_lora_rank"}
        return float(config[ranks[part]] ** -0.5) if part in ranks else super().random_scale(name, config)
