"""A made-up family in one file, registered from outside of the package: a decoder-only model, top-2, SwiGLU experts.

Every second layer holds experts. On disk an expert is three tensors, or all experts of a block are two; in memory they
are two, as upstream has them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe import modeling_olmoe as upstream
from transformers.utils.output_capturing import OutputRecorder

from pregate import register_family
from pregate.models import upstream as ahead
from pregate.models.experts import Factor, project
from pregate.models.family import Count, ExpertSpec, Family, GateNames, TensorSlice
from pregate.models.objectives import Causal
from pregate.models.pregated import PreGatedConfig
from pregate.models.pregating import PreGating

STACK = "decoder"


@strict
class MadeUpConfig(PreGatedConfig, OlmoeConfig):
    model_type = "pregated_made_up"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.settle()


class DenseLayer(upstream.OlmoeDecoderLayer):
    def __init__(self, config: MadeUpConfig, layer: int) -> None:
        super().__init__(config, layer)
        width = config.intermediate_size
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, width, bias=False),
            nn.SiLU(),
            nn.Linear(width, config.hidden_size, bias=False),
        )

    def forward(self, hidden_states: Tensor, *args: Any, routes: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, *args, **kwargs)


class SparseLayer(ahead.PreGatedLayer, upstream.OlmoeDecoderLayer):
    def __init__(self, config: MadeUpConfig, layer: int, sparse: list[int]) -> None:
        super().__init__(config, layer)
        self.take_gates(config, STACK, sparse.index(layer), len(sparse))


class MadeUpPreTrainedModel(ahead.PreGatedPreTrained, upstream.OlmoePreTrainedModel):
    config_class = MadeUpConfig
    _no_split_modules = ["DenseLayer", "SparseLayer"]
    _can_record_outputs = {
        **upstream.OlmoePreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(ahead.TopKGates, index=0),
    }


class MadeUpModel(ahead.PreGatedStack, MadeUpPreTrainedModel, upstream.OlmoeModel):
    stack_name = STACK

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        sparse = FAMILY.moe_layers(config, STACK)
        self.layers = nn.ModuleList(
            SparseLayer(config, layer, sparse) if layer in sparse else DenseLayer(config, layer)
            for layer in range(config.num_hidden_layers)
        )
        entries = config.pregating.embedding_entries(STACK, len(sparse))
        self.entry_gates = ahead.entry_gates(
            config, entries, upstream.OlmoeTopKRouter, lambda: copy.deepcopy(self.norm)
        )
        self.post_init()


class MadeUpForCausalLM(ahead.PreGatedCausalLM, MadeUpPreTrainedModel, upstream.OlmoeForCausalLM):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.model = MadeUpModel(config)
        self.post_init()


class MadeUpFamily(Family):
    source_type, model_type, source_class = "made_up", "pregated_made_up", "MadeUpForCausalLM"
    stacks, objective = (STACK,), Causal(STACK)
    config_class, model_class = MadeUpConfig, MadeUpForCausalLM
    input_tables = ("model.embed_tokens.weight",)

    def moe_layers(self, config: Any, stack: str) -> list[int]:
        return list(range(1, config.num_hidden_layers, 2))

    def experts(self, config: Any) -> ExpertSpec:
        E, F, D = config.num_experts, config.intermediate_size, config.hidden_size

        def fused(stack: str, layer: int, expert: int) -> list[TensorSlice]:
            up, down = (f"model.layers.{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
            return [
                TensorSlice(up, (expert, slice(0, F)), shape=(E, 2 * F, D)),
                TensorSlice(up, (expert, slice(F, None)), shape=(E, 2 * F, D)),
                TensorSlice(down, (expert,), shape=(E, D, F)),
            ]

        def apart(stack: str, layer: int, expert: int) -> list[TensorSlice]:
            names = ("gate_proj", "up_proj", "down_proj")
            return [TensorSlice(f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight") for name in names]

        def apply(matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
            gate_FD, up_FD, down_DF = matrices
            return project(nn.functional.silu(project(hidden_ND, gate_FD)) * project(hidden_ND, up_FD), down_DF)

        return ExpertSpec(
            num_experts=E,
            top_k=config.num_experts_per_tok,
            lookahead=config.pregating.lookahead,
            matrices={"gate": (F, D), "up": (F, D), "down": (D, F)},
            layers={STACK: self.moe_layers(config, STACK)},
            layouts=(fused, apart),
            apply=apply,
            activation="swiglu",
        )

    def gate_names(self, stack: str, layer: int, block: int) -> GateNames:
        own, entry = f"model.layers.{layer}.mlp.gate", f"model.entry_gates.{block}"
        norm = f"model.layers.{layer}.post_attention_layernorm.weight"
        return GateNames(own, f"{own}.pre_gate.router", f"{entry}.router", norm, f"{entry}.norm.weight")

    def gate_std(self, config: Any) -> float:
        return config.initializer_range

    def counts(self, config: Any) -> list[Count]:
        return [Count("num_hidden_layers", "layers", config.num_hidden_layers, re.compile(r"^model\.layers\.(\d+)\."))]


FAMILY = MadeUpFamily()
register_family(FAMILY)
