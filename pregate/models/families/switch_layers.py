"""The layers of a Switch model whose routes are handed from block to block: gates, experts, blocks.

A route enters a layer as an argument and leaves it as a return value of the forward call, so two models in one
process, re-entrant calls and gradient checkpointing cannot mix routes up. Attention, norms and dense layers are
upstream's. Knows nothing about stacks, generation or where experts are stored.

Letters: B batch, T tokens of a sequence, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import SwitchTransformersConfig
from transformers.activations import ACT2FN
from transformers.models.switch_transformers import modeling_switch_transformers as upstream

from pregate.config import UsageError
from pregate.models.experts import Factor, grouped_experts, project, reference_experts
from pregate.models.linear import linear_in
from pregate.models.pregating import STACKS, ExpertFamily, PreGating, RouteListener
from pregate.models.routing import Routing, jitter, route

_experts_elsewhere: ContextVar[bool] = ContextVar("experts_elsewhere", default=False)
OLD_MARKER = "_pregate_without_experts"
"""What an earlier version put into configs for `without_experts`. A file may still hold it; it means nothing."""


@contextmanager
def without_experts() -> Iterator[None]:
    """Models that are built inside have no experts. Their configs say nothing of it, so no file does either."""
    before = _experts_elsewhere.set(True)
    try:
        yield
    finally:
        _experts_elsewhere.reset(before)


class SavedWhole:
    """A model or stack that is saved as upstream's is, but not without its experts, which the files would lack: both
    ways to save raise `UsageError` then, before they write or ask the hub for anything."""

    modules: Any

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_without_experts()
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_without_experts()
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _refuse_without_experts(self) -> None:
        blocks = (module for module in self.modules() if isinstance(module, PreGatedSparseMLP))
        if any(next(block.experts.parameters(), None) is None for block in blocks):
            raise UsageError(
                "This model cannot be saved, because an engine holds its experts: copy the directory that the engine "
                "was opened with, or load that with load_resident and save what it gives."
            )


def is_sparse_layer(layer: int, sparse_step: int) -> bool:
    """Upstream's rule for which layers hold experts."""
    return sparse_step > 0 and (sparse_step == 1 or layer % sparse_step == 1)


@strict
class PreGatedSwitchTransformersConfig(SwitchTransformersConfig):
    """`SwitchTransformersConfig` and a `pregate` section: lookahead, stacks, entry, init (see `PreGating`)."""

    model_type = "pregated_switch_transformers"
    pregate: dict[str, Any] = field(default_factory=lambda: PreGating().to_dict())

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop(OLD_MARKER, None)
        super().__post_init__(**kwargs)
        self.pregate = self.pregating.to_dict()
        for stack in self.pregating.stacks if self.pregating.lookahead else ():
            num_blocks = len(self.moe_layers(stack))
            if self.pregating.lookahead >= num_blocks:
                raise ValueError(
                    f"lookahead {self.pregating.lookahead} needs more than {self.pregating.lookahead} MoE blocks in "
                    f"the {stack}, which has {num_blocks}: choose a smaller lookahead or other stacks."
                )

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """Upstream's, with the decoder's own depth, so that `generate` sizes its cache for a deeper decoder."""
        config = super().get_text_config(decoder=decoder, encoder=encoder)
        if decoder and config is not self:
            config.num_layers = self.num_decoder_layers or self.num_layers
        return config

    @classmethod
    def of_checkpoint(cls, config: dict[str, Any]) -> PreGatedSwitchTransformersConfig:
        """From the `config.json` of a pre-gated or a conventional Switch checkpoint (which is lookahead 0).

        Raises `UsageError` for the config of any other model and for a damaged one.
        """
        known = (SwitchTransformersConfig.model_type, cls.model_type)
        if config.get("model_type", cls.model_type) not in known:
            raise UsageError(
                f"This is a {config['model_type']!r} model: give a checkpoint of type {' or '.join(known)}."
            )
        settings = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map")}
        if config.get("model_type") == SwitchTransformersConfig.model_type:
            settings["pregate"] = PreGating().to_dict()
        try:
            return cls(**settings)
        except Exception as error:  # strict validation brings exception types of its own
            reason = " ".join(str(error).split()).rstrip(".")
            raise UsageError(f"The config.json describes no model that can be built: {reason}.") from error

    @classmethod
    def describes(cls, config: dict[str, Any]) -> bool:
        """Whether a `config.json` is that of a pre-gated checkpoint, and not of a conventional one."""
        return config.get("model_type", cls.model_type) == cls.model_type

    @property
    def pregating(self) -> PreGating:
        return PreGating.from_dict(self.pregate)

    def moe_layers(self, stack: str) -> list[int]:
        """The layer numbers of the MoE blocks of `stack`, in order."""
        depth = self.num_layers if stack == "encoder" else (self.num_decoder_layers or self.num_layers)
        step = self.encoder_sparse_step if stack == "encoder" else self.decoder_sparse_step
        return [layer for layer in range(depth) if is_sparse_layer(layer, step)]


class SwitchGate(nn.Module):
    """One router: the linear map from hidden states to expert logits, with the family's top-1 and capacity rule.

    `in_place`: jitter the states themselves, as upstream does. Experts then read the jittered states too where these
    are in the router's dtype; lookahead 0 keeps that, because it promises to be the source model.
    """

    def __init__(self, config: SwitchTransformersConfig, in_place: bool = False) -> None:
        super().__init__()
        self.classifier = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        self.capacity = config.expert_capacity
        self.noise = float(config.router_jitter_noise)
        self.dtype = getattr(torch, config.router_dtype)
        self.in_place = in_place

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
        return linear_in(self.classifier, seen_BTD, self.dtype)

    def choose(self, logits_BTE: Tensor, dtype: torch.dtype) -> Routing:
        """The family's rule."""
        return route(logits_BTE, top_k=1, capacity=self.capacity, dtype=dtype)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        return self.decide(self.perturb(hidden_BTD), hidden_BTD.dtype)


class EmbeddingGate(SwitchGate):
    """An entry gate that reads the stack's input embeddings, normalised like the input of its own block."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.layer_norm = upstream.SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        return super().forward(self.layer_norm(hidden_BTD))


class SwitchExperts(nn.ModuleDict):
    """The resident experts of one block. `path` chooses the reference order of operations or the grouped one."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.path = "grouped"
        for expert in range(config.num_experts):
            self[f"expert_{expert}"] = upstream.SwitchTransformersDenseActDense(config)

    def forward(self, hidden_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        run = reference_experts if self.path == "reference" else grouped_experts
        return run(hidden_TD, expert_ids_TK, weights_TK, self.num_experts, lambda e, x: self[f"expert_{e}"](x))


def switch_expert_family(config: PreGatedSwitchTransformersConfig) -> ExpertFamily:
    """Where a Switch checkpoint keeps its experts, and what one expert computes."""
    activation = ACT2FN[config.dense_act_fn]
    feed_forward = {"encoder": 1, "decoder": 2}

    def tensor_name(stack: str, layer: int, expert: int, matrix: str) -> str:
        return f"{stack}.block.{layer}.layer.{feed_forward[stack]}.mlp.experts.expert_{expert}.{matrix}.weight"

    def apply(matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
        wi_FD, wo_DF = matrices
        return project(activation(project(hidden_ND, wi_FD)), wo_DF)

    return ExpertFamily(
        num_experts=config.num_experts,
        top_k=1,
        lookahead=config.pregating.lookahead,
        matrices={"wi": (config.d_ff, config.d_model), "wo": (config.d_model, config.d_ff)},
        layers={stack: config.moe_layers(stack) for stack in STACKS},
        tensor_name=tensor_name,
        apply=apply,
    )


class PreGatedSparseMLP(nn.Module):
    """An MoE block's router side: its entry gate if it has one, the pre-gate of a later block, and the experts."""

    def __init__(self, config: PreGatedSwitchTransformersConfig, stack: str, index: int, num_blocks: int) -> None:
        super().__init__()
        gating = config.pregating
        seats = gating.gates_at(stack, index, num_blocks)
        self.stack, self.index, self.target = stack, index, seats.target
        self.router = SwitchGate(config, in_place=gating.lookahead_of(stack) == 0) if seats.own else None
        self.pre_gate = SwitchGate(config) if seats.target is not None else None
        # an engine that keeps the experts elsewhere asks for none: thousands of modules would be made to be dropped
        self.experts = nn.Module() if _experts_elsewhere.get() else SwitchExperts(config)
        self.listener: RouteListener | None = None

    def forward(self, hidden_BTD: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor, Routing | None]:
        """Apply the experts by `routing`, or by the block's own gate if it is None.

        Returns the output (B, T, D), the logits (B, T, E) behind the route used here, and the route decided for
        block `target` (None if this block holds no pre-gate).
        """
        decided = None
        if self.pre_gate is not None:
            decided = self.pre_gate(hidden_BTD)
        if routing is None:
            assert self.router is not None, "a block without an entry gate was given no route"
            own: Routing = self.router(hidden_BTD)
            routing = own
            self._announce(self.index, routing)
        # behind the block's own route, which is needed first
        if decided is not None:
            self._announce(self.target, decided)
        output_TD = self.experts(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            routing.expert_ids_BTK.flatten(0, 1),
            routing.weights_BTK.flatten(0, 1),
        )
        return output_TD.view(hidden_BTD.shape), routing.logits_BTE, decided

    def _announce(self, block: int | None, routing: Routing) -> None:
        if self.listener is not None and block is not None:
            self.listener(self.stack, block, routing)


class PreGatedLayerFF(nn.Module):
    """Norm, dense or sparse feed-forward, residual; hands routes in and out of a sparse one."""

    def __init__(self, config: PreGatedSwitchTransformersConfig, mlp: nn.Module) -> None:
        super().__init__()
        self.is_sparse = isinstance(mlp, PreGatedSparseMLP)
        self.mlp = mlp
        self.layer_norm = upstream.SwitchTransformersLayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_BTD: Tensor, routing: Routing | None = None) -> tuple[Tensor, Routing | None]:
        normed_BTD = self.layer_norm(hidden_BTD)
        decided = None
        if self.is_sparse:
            output_BTD, _, decided = self.mlp(normed_BTD, routing)
        else:
            output_BTD = self.mlp(normed_BTD)
        return hidden_BTD + self.dropout(output_BTD), decided


def finite(hidden_BTD: Tensor) -> Tensor:
    """Keep fp16 activations finite, as upstream does; other dtypes pass untouched."""
    if hidden_BTD.dtype != torch.float16:
        return hidden_BTD
    most = torch.finfo(torch.float16).max
    bound = torch.where(torch.isinf(hidden_BTD).any(), most - 1000, most)
    return torch.clamp(hidden_BTD, min=-bound, max=bound)


class PreGatedSwitchBlock(upstream.SwitchTransformersBlock):
    """One transformer layer. Takes the route of its own MoE block and returns the route it decided for a later one."""

    def __init__(self, config: PreGatedSwitchTransformersConfig, layer: int, mlp: nn.Module) -> None:
        nn.Module.__init__(self)
        self.is_decoder = config.is_decoder
        self.is_sparse = isinstance(mlp, PreGatedSparseMLP)
        self.layer = nn.ModuleList([upstream.SwitchTransformersLayerSelfAttention(config, layer == 0, layer_idx=layer)])
        if self.is_decoder:
            self.layer.append(upstream.SwitchTransformersLayerCrossAttention(config, layer_idx=layer))
        self.layer.append(PreGatedLayerFF(config, mlp))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        routing: Routing | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Routing | None]:
        hidden_states, self_bias, _ = self.layer[0](
            hidden_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = finite(hidden_states)
        cross_bias = None
        if self.is_decoder and encoder_hidden_states is not None:
            hidden_states, cross_bias, _ = self.layer[1](
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                position_bias=encoder_decoder_position_bias,
                past_key_values=past_key_values,
                **kwargs,
            )
            hidden_states = finite(hidden_states)
        hidden_states, decided = self.layer[-1](hidden_states, routing)
        return finite(hidden_states), self_bias, cross_bias, decided
