"""The Switch Transformers family: encoder and decoder, top-1 routing with a capacity, experts of two matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import SwitchTransformersConfig

from pregate.config import UsageError
from pregate.models.experts import ExpertSpec
from pregate.models.families.switch_config import (
    OLD_MARKER,
    STACKS,
    PreGatedSwitchTransformersConfig,
    gate_std,
    moe_layers,
)
from pregate.models.families.switch_experts import expert_spec, feed_forward
from pregate.models.families.switch_model import PreGatedSwitchTransformersForConditionalGeneration
from pregate.models.family import Count, Family, GateNames, register_family
from pregate.models.objectives import Seq2Seq
from pregate.models.pregating import PreGating

BRANCH = 0.1
"""Share of upstream's scale for what attention and feed-forward add to the residual stream. With all of it the parts
that every token has in common outgrow the token's own embedding, and deep routers send all tokens to a few experts.
Trained routers, with their balance loss, do not."""


class SwitchFamily(Family):
    source_type = SwitchTransformersConfig.model_type
    source_class = "SwitchTransformersForConditionalGeneration"
    stacks, objective = STACKS, Seq2Seq(*STACKS)
    config_class = PreGatedSwitchTransformersConfig
    model_class = PreGatedSwitchTransformersForConditionalGeneration
    step = "t5"
    depth_settings = (
        *("num_layers", "num_decoder_layers"),
        *("num_sparse_encoder_layers", "num_sparse_decoder_layers"),
    )
    input_tables = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    prefixes = ("model.", "switch_transformers.")
    # written by early T5-style exporters; the architecture has no such parameter and never reads it
    leftovers = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        return moe_layers(config, stack)

    def pregated_json(self, config: Mapping[str, Any], gating: PreGating) -> dict[str, Any]:
        return super().pregated_json({k: v for k, v in config.items() if k != OLD_MARKER}, gating)

    def from_scratch(self, geometry: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        start = geometry.get("pad_token_id", 0)  # as T5 does
        return super().from_scratch({"decoder_start_token_id": start, **geometry}, vocab_size)

    def complete(self, source: str, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
        """With the token that the decoder begins with: the config's, else that of `generation_config.json`, else the
        padding token."""
        parsed = self.config(config)
        pad, start = parsed.pad_token_id, config.get("decoder_start_token_id")
        pad = generation.get("pad_token_id") if pad is None else pad
        start = generation.get("decoder_start_token_id") if start is None else start
        start = pad if start is None else start
        if start is None:
            raise UsageError(
                f"{source} names no decoder_start_token_id and no pad_token_id: add to its config.json the id that its "
                "decoder was trained to begin with."
            )
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < parsed.vocab_size:
            raise UsageError(
                f"{source} names {start!r} as decoder_start_token_id, which is no id of its vocabulary of "
                f"{parsed.vocab_size}: correct it in its config.json or generation_config.json."
            )
        completed = {**config, "decoder_start_token_id": start}
        return completed if parsed.pad_token_id is not None else {**completed, "pad_token_id": pad}

    def experts(self, config: Any) -> ExpertSpec:
        return expert_spec(config)

    def gate_names(self, stack: str, layer: int, block: int) -> GateNames:
        part = feed_forward(stack, layer)
        return GateNames(
            own=f"{part}.mlp.router.classifier",
            ahead=f"{part}.mlp.pre_gate.classifier",
            entry=f"{stack}.entry_gates.{block}.classifier",
            norm=f"{part}.layer_norm.weight",
            entry_norm=f"{stack}.entry_gates.{block}.layer_norm.weight",
        )

    def gate_std(self, config: Any) -> float:
        return gate_std(config)

    def counts(self, config: Any) -> list[Count]:
        sparse = any(moe_layers(config, stack) for stack in STACKS)
        layer = r"\.block\.(\d+)\."
        expert = r"^(?:encoder|decoder)\.block\.\d+\.layer\.\d\.mlp\.experts\.expert_(\d+)\."
        depth, decoder_depth = config.num_layers, config.num_decoder_layers
        return [
            Count("num_layers", "encoder layers", depth, re.compile("^encoder" + layer)),
            Count("num_decoder_layers", "decoder layers", decoder_depth, re.compile("^decoder" + layer)),
            Count("num_experts", "experts a block", config.num_experts if sparse else 0, re.compile(expert)),
        ]

    def random_scale(self, name: str, config: Mapping[str, Any]) -> float | None:
        """As upstream's initialisation, but attention and feed-forward add less to the residual stream."""
        if "layer_norm" in name:
            return None
        if name.startswith("shared.") or "embed_tokens" in name:
            return 1.0
        if ".q." in name:
            return float((config["d_model"] * config["d_kv"]) ** -0.5)
        if ".o." in name:
            return BRANCH * float((config["num_heads"] * config["d_kv"]) ** -0.5)
        if ".wo." in name:
            return BRANCH * float(config["d_ff"] ** -0.5)
        return float(config["d_model"] ** -0.5)


register_family(SwitchFamily())
