"""What families of decoder-only models have in common: names of parts, settings and tensors, as upstream gives them.

Knows names and numbers; their models are in `decoder_only`.

Letters: D model width, F expert hidden width, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pregate.models import gated_experts
from pregate.models.decoder_only import STACK
from pregate.models.experts import ExpertSpec
from pregate.models.family import Count, Family, GateNames
from pregate.models.objectives import Causal

BRANCH = 0.1
"""Share of the usual scale for random weights that write to the residual stream: with all of it the parts that every
token has in common outgrow the token's own embedding, and deep routers send all tokens to a few experts."""


class DecoderOnlyFamily(Family):
    """What families of such models have in common: the names that upstream gives to their parts."""

    stacks, objective = (STACK,), Causal(STACK)
    input_tables = ("model.embed_tokens.weight",)
    router: ClassVar[str] = "mlp.gate"
    """Where the router is in a layer."""
    experts_module: ClassVar[str] = "mlp.experts"
    """Where the experts are in a layer."""
    norm: ClassVar[str] = "post_attention_layernorm"
    """The norm before an MoE block."""
    width_setting: ClassVar[str] = "intermediate_size"
    """The setting that gives the hidden width of an expert."""
    expert_names: ClassVar[tuple[str, ...]] = gated_experts.MATRICES
    """The matrices of an expert in checkpoints that hold a tensor for each."""

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        """Every layer."""
        return list(range(config.num_hidden_layers))

    def experts(self, config: Any) -> ExpertSpec:
        E, D = getattr(config, self.experts_setting), config.hidden_size
        F, prefix = getattr(config, self.width_setting), "model.layers.{layer}." + self.experts_module
        return ExpertSpec(
            num_experts=E,
            top_k=config.num_experts_per_tok,
            lookahead=config.pregating.lookahead,
            matrices=gated_experts.shapes(D, F),
            layers={STACK: self.moe_layers(config, STACK)},
            layouts=(gated_experts.fused(prefix, E, D, F), gated_experts.apart(prefix, self.expert_names)),
            apply=gated_experts.gated_unit(config.hidden_act),
            activation=f"gated_{config.hidden_act}",
            joined=gated_experts.JOINED,
        )

    def gate_names(self, stack: str, layer: int, block: int) -> GateNames:
        within, entry = f"model.layers.{layer}", f"model.entry_gates.{block}"
        own = f"{within}.{self.router}"
        return GateNames(
            own, f"{own}.pre_gate.router", f"{entry}.router", f"{within}.{self.norm}.weight", f"{entry}.norm.weight"
        )

    def gate_std(self, config: Any) -> float:
        return config.initializer_range

    def counts(self, config: Any) -> list[Count]:
        return [Count("num_hidden_layers", "layers", config.num_hidden_layers, re.compile(r"^model\.layers\.(\d+)\."))]

    def extras(self, config: Any) -> list[str]:
        """The modules that predict tokens further ahead ("multi-token prediction"), and the rotary frequencies that old
        versions of transformers stored, which follow from the config."""
        return [r"^(model\.)?mtp\.", r"\.rotary_emb\.inv_freq$"]

    def random_scale(self, name: str, config: Mapping[str, Any]) -> float | None:
        """So that every part keeps unit variance, but attention and feed-forward add less to the residual stream."""
        part = name.removesuffix(".weight").rpartition(".")[2]
        if "norm" in part:
            return None
        if part == "embed_tokens":
            return 1.0
        D, heads = config["hidden_size"], config["num_attention_heads"]
        if part == "o_proj":
            return BRANCH * float((heads * (config.get("head_dim") or D // heads)) ** -0.5)
        if part == "down_proj":
            return BRANCH * float(config[self.hidden_width_setting(name)] ** -0.5)
        return float(D**-0.5)

    def hidden_width_setting(self, name: str) -> str:
        """The setting that gives the hidden width of the feed-forward part that the tensor `name` belongs to."""
        return self.width_setting if f".{self.experts_module}." in name else "intermediate_size"

    def smaller(self, config: Mapping[str, Any], depth: float, num_experts: int) -> dict[str, Any]:
        # upstream knows some settings by two names, and a file may have either
        names = next((pair for pair in self.config_class.attribute_map.items() if self.experts_setting in pair), ())
        fewer = super().smaller({k: v for k, v in config.items() if k not in names}, depth, num_experts)
        if fewer.get("layer_types"):
            fewer["layer_types"] = fewer["layer_types"][: fewer["num_hidden_layers"]]
        return {**fewer, "num_experts_per_tok": min(fewer["num_experts_per_tok"], num_experts)}


def sparse_layers(config: Any) -> list[int]:
    """The layers with experts of a model whose config counts from one to the next, and lists those that are dense."""
    if not config.num_experts:
        return []
    numbers = range(config.decoder_sparse_step - 1, config.num_hidden_layers, config.decoder_sparse_step)
    return [number for number in numbers if number not in (config.mlp_only_layers or ())]
