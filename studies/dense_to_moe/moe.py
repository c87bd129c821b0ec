"""The MoE form of a dense model: its settings, and the tensors of a layer whose neurons are parted.

A layer with shared neurons takes the form of Qwen2-MoE, one without that of Mixtral. Both compute attention, norms and
embeddings exactly as Llama does. Knows names, shapes and factors; which neuron goes where is decided in `clusters`.
`upcycle` fills a layer with copies.

Letters: D model width, F neurons of the dense layer, E experts, H neurons of an expert, S shared neurons.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from pregate.config import UsageError
from pregate.system.console import silent_bars

SPLIT, UPCYCLE = "split", "upcycle"
COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_dropout",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Settings that Llama and both MoE forms have, with the same meaning."""
UNIT = 8
"""Experts have multiples of so many neurons: grouped products want rows of 16 bytes, in two-byte numbers too."""
HALF = 2.0
"""A shared expert of Qwen2-MoE has a gate. With weights of zero it gives one half, which twice the down projection
makes up for."""


@dataclass(frozen=True)
class Form:
    """What becomes of each feed-forward layer. split: its neurons are parted, a share of them is shared. upcycle:
    experts are copies of the whole layer, with `noise` times the spread of a matrix added to each copy."""

    kind: str = SPLIT
    experts: int = 8
    top_k: int = 4
    shared: float = 0.0
    shared_by: str = "strength"
    noise: float = 0.02

    def check(self, neurons: int) -> None:
        """Raises `UsageError` for a form that a layer with so many neurons cannot take."""
        if self.experts < 2 or not 1 <= self.top_k <= self.experts:
            raise UsageError(
                f"--experts {self.experts} --top-k {self.top_k} is no MoE layer: set at least 2 experts, and a top-k "
                "from 1 to their number."
            )
        if self.kind == UPCYCLE:
            return
        if not 0 <= self.shared < 1 or self.width(neurons) < 1:
            raise UsageError(
                f"--shared {self.shared:g} leaves too few neurons for {self.experts} experts of {UNIT}: set a lower "
                "share, or fewer experts."
            )

    def width(self, neurons: int) -> int:
        """The neurons of an expert (H)."""
        if self.kind == UPCYCLE:
            return neurons
        return (neurons - round(self.shared * neurons)) // (self.experts * UNIT) * UNIT

    def num_shared(self, neurons: int) -> int:
        """The shared neurons (S): all that are in no expert, so a few more than asked for where the others cannot be
        parted evenly."""
        return 0 if self.kind == UPCYCLE else neurons - self.experts * self.width(neurons)

    @property
    def factor(self) -> float:
        """What down projections of experts are multiplied by: combine weights add up to one, and the parts of a split
        layer are to be added with weights near one each."""
        return float(self.top_k) if self.kind == SPLIT else 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def empty_moe(dense: Any, form: Form) -> Any:
    """An upstream model of the MoE form in evaluation mode: all weights of `dense` but the feed-forward layers'."""
    config, neurons = dense.config, dense.config.intermediate_size
    form.check(neurons)
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    common = {name: getattr(config, name) for name in COMMON} | {"head_dim": head_dim}
    shared, width = form.num_shared(neurons), form.width(neurons)
    if shared:
        model: Any = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **common,
                num_experts=form.experts,
                num_experts_per_tok=form.top_k,
                moe_intermediate_size=width,
                shared_expert_intermediate_size=shared,
                intermediate_size=neurons,
                norm_topk_prob=True,
                qkv_bias=False,
            )
        )
    else:
        model = MixtralForCausalLM(
            MixtralConfig(
                **common,
                num_local_experts=form.experts,
                num_experts_per_tok=form.top_k,
                intermediate_size=width,
                sliding_window=None,
            )
        )
    kept = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    missing, unknown = model.load_state_dict(kept, strict=False)
    assert not unknown and all(".mlp." in name for name in missing), (unknown, missing)
    model.generation_config = dense.generation_config
    return model.eval()


@torch.no_grad()
def fill_split(block: Any, layer: Any, shared_S: Tensor, experts_EH: Tensor, gate_ED: Tensor, form: Form) -> None:
    """Put the neurons of the dense `layer` into the MoE `block`: those of `shared_S`, and the rows of `experts_EH`."""
    gate_FD, up_FD, down_DF = (getattr(layer, f"{name}_proj").weight for name in ("gate", "up", "down"))
    block.gate.weight.copy_(gate_ED)
    for expert, neurons_H in enumerate(experts_EH):
        block.experts.gate_up_proj[expert].copy_(torch.cat([gate_FD[neurons_H], up_FD[neurons_H]]))
        block.experts.down_proj[expert].copy_(form.factor * down_DF[:, neurons_H])
    if len(shared_S):
        block.shared_expert.gate_proj.weight.copy_(gate_FD[shared_S])
        block.shared_expert.up_proj.weight.copy_(up_FD[shared_S])
        block.shared_expert.down_proj.weight.copy_(HALF * down_DF[:, shared_S])
        block.shared_expert_gate.weight.zero_()


def open_moe(directory: Path) -> Any:
    """A checkpoint of a form as an upstream model, whose routers can be exchanged; in float32 and evaluation mode."""
    with silent_bars():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def choose_all(model: Any, form: Form) -> Any:
    """Make an MoE model of `form` compute what the dense one does: every expert is chosen, with equal weights."""
    for layer in model.model.layers:
        block = layer.mlp
        block.gate.top_k = form.experts
        block.gate.weight.zero_()
        if form.kind == SPLIT:
            block.experts.down_proj *= form.experts / form.factor
    model.config.num_experts_per_tok = form.experts
    return model
