"""The router of a Switch model: logits with noise in training, the best expert, and a capacity.

Letters: B batch, T tokens of a sequence, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.switch_transformers import modeling_switch_transformers as upstream

from pregate.models.families.switch_config import PreGatedSwitchTransformersConfig
from pregate.models.linear import linear_in
from pregate.models.nonlinear import Nonlinear
from pregate.models.pregated_models import Gate
from pregate.models.routing import DROPPED, Routing, first_choice, jitter, route, weights_of


def apply_capacity(expert_ids_BTK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Mark with `DROPPED` every choice beyond the first `capacity` that a sequence makes of one expert.

    Capacity counts per sequence and in token order, as Switch does.
    """
    B, T, K = expert_ids_BTK.shape
    if capacity >= T * K:
        return expert_ids_BTK
    ids = expert_ids_BTK.reshape(B, T * K)
    position = torch.nn.functional.one_hot(ids, num_experts).cumsum(dim=1).gather(2, ids[..., None])[..., 0]
    return ids.masked_fill(position > capacity, DROPPED).view(B, T, K)


class SwitchGate(Gate):
    """One router: the linear map from hidden states to expert logits, with the family's top-1 and capacity rule.

    `in_place`: jitter the states themselves, as upstream does. Experts then read the jittered states too where these
    are in the router's dtype; lookahead 0 keeps that, because it promises to be the source model. `ahead`: it decides
    for another block, or on other states than its block's.
    """

    def __init__(self, config: PreGatedSwitchTransformersConfig, in_place: bool = False, ahead: bool = False) -> None:
        super().__init__()
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        self.nonlinear = Nonlinear.of(config.pregating, self.classifier.weight) if ahead else None
        self.capacity = config.expert_capacity
        self.noise = float(config.router_jitter_noise)
        self.dtype = getattr(torch, config.router_dtype)
        self.in_place = in_place

    @property
    def linear(self) -> nn.Module:
        return self.classifier

    def perturb(self, hidden_BTD: Tensor) -> Tensor:
        """In training, the jittered input; in evaluation the input itself. In the router's dtype."""
        hidden_BTD = hidden_BTD.to(self.dtype)
        if not self.training or self.noise <= 0:
            return hidden_BTD
        return jitter(hidden_BTD, self.noise, self.in_place)

    def decide(self, seen_BTD: Tensor, dtype: torch.dtype) -> Routing:
        """Route by hidden states that `perturb` has seen; combine weights come out in `dtype`."""
        return self.choose(self.score(seen_BTD), dtype)

    # an engine may put faster forms of these two in their place

    def score(self, seen_BTD: Tensor) -> Tensor:
        """The logits (B, T, E), in the router's dtype."""
        return self.with_nonlinear(linear_in(self.classifier, seen_BTD, self.dtype), seen_BTD)

    def with_nonlinear(self, logits_BTE: Tensor, seen_BTD: Tensor) -> Tensor:
        """The logits, given those of the linear map."""
        return logits_BTE if self.nonlinear is None else logits_BTE + self.nonlinear(seen_BTD.to(self.dtype))

    def choose(self, logits_BTE: Tensor, dtype: torch.dtype) -> Routing:
        """The family's rule."""
        routing = route(logits_BTE, dtype)
        ids_BTK = apply_capacity(routing.expert_ids_BTK, logits_BTE.shape[-1], self.capacity)
        return routing._replace(expert_ids_BTK=ids_BTK)

    def choices(self, logits_TE: Tensor) -> Tensor:
        return first_choice(logits_TE)

    def weigh(self, hidden_BTD: Tensor, expert_ids_BTK: Tensor) -> Tensor:
        return weights_of(self.score(self.perturb(hidden_BTD)), expert_ids_BTK, hidden_BTD.dtype)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        return self.decide(self.perturb(hidden_BTD), hidden_BTD.dtype)


class EmbeddingGate(SwitchGate):
    """An entry gate that reads the stack's input embeddings, normalised like the input of its own block."""

    def __init__(self, config: PreGatedSwitchTransformersConfig) -> None:
        super().__init__(config, ahead=True)
        self.layer_norm = upstream.SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def read(self, hidden_BTD: Tensor) -> Tensor:
        return self.layer_norm(hidden_BTD)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        return super().forward(self.read(hidden_BTD))
