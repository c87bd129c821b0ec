"""Pre-gating around the top-k MoE blocks that transformers' decoder-only models share.

In transformers 5 a block's router maps hidden states to (logits, weights, ids), and its experts take (hidden, ids,
weights). Here `TopKGates` takes the router's place: it evaluates the gates that sit in the block, by upstream's own
rule, and gives the block the route that was decided for it. Attention, norms, rotary embeddings, experts and shared
experts stay upstream's. A family derives its classes from these and upstream's.

Letters: B batch, T tokens of a sequence, D model width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from pregate.models.family import MoEBlock, family_named
from pregate.models.linear import active_autocast_dtype
from pregate.models.nonlinear import Nonlinear
from pregate.models.pregated_models import Gate, PreGatedModel, ServedModel, experts_elsewhere
from pregate.models.pregating import PreGating
from pregate.models.route_handover import BlockGates, RouteListener, Routes
from pregate.models.router_losses import balance_loss
from pregate.models.routing import Routing
from pregate.models.training_experts import LEARNING
from pregate.models.upstream_routers import check_linear, choices_by, route_with, weights_by
from pregate.models.vocabulary_losses import IGNORED, Lesson, head_losses

STACK = "decoder"
"""The only stack of these models."""


@dataclass
class RoutedOutput(MoeCausalLMOutputWithPast):
    """`expert_ids`: beside the router logits of each MoE block, the experts (B, T, K) that it used. `terms`: with
    `loss_only`, those of `head_losses`."""

    expert_ids: tuple[Tensor, ...] | None = None
    terms: Tensor | None = None


class _LayerCall(NamedTuple):
    """What upstream's code does not hand from a layer to its router: the routes of the call of the stack, and the
    shape (B, T, D) of the states."""

    routes: Routes
    shape: torch.Size


# of the layer that runs in this thread; no state of a module, which another thread may be calling
_layer_call: ContextVar[_LayerCall | None] = ContextVar("layer_call", default=None)


class TopKGate(Gate):
    """A gate of its own, which decides for another block than the one it sits in: upstream's router and its rule.
    `in_float32`: as in `TopKGates`. `norm`: what an entry gate applies to the embeddings."""

    def __init__(self, router: nn.Module, gating: PreGating, in_float32: bool, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.in_float32, self.norm = router, in_float32, norm
        self.nonlinear = Nonlinear.of(gating, router.get_parameter("weight"))
        if self.nonlinear is not None:
            check_linear(router)

    @property
    def linear(self) -> Any:
        return self.router

    def read(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD if self.norm is None else self.norm(hidden_BTD)

    def choices(self, logits_TE: Tensor) -> Tensor:
        with _precision(self.in_float32, logits_TE):
            return choices_by(self.router, type(self.router), logits_TE)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        router = self.router if self.nonlinear is None else partial(route_with, self.router, self.nonlinear)
        read_BTD = self.read(hidden_BTD)
        with _precision(self.in_float32, read_BTD):
            return _routing(router, read_BTD)


class _OwnGate(Gate):
    """The gate that stays where upstream has it. Its parameters are those of the `TopKGates` that it sits in, so that
    they keep upstream's names."""

    def __init__(self, block_gates: TopKGates) -> None:
        super().__init__()
        self.nonlinear = None
        # a tuple, because a module would become a part of its own part
        self._block_gates = (block_gates,)

    @property
    def linear(self) -> Any:
        return self._block_gates[0]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.linear.named_parameters(recurse=False)

    def choices(self, logits_TE: Tensor) -> Tensor:
        with _precision(self.linear.in_float32, logits_TE):
            return choices_by(self.linear, self.linear.router_class, logits_TE)

    def weigh(self, hidden_BTD: Tensor, expert_ids_BTK: Tensor) -> Tensor:
        router = self.linear.for_weighing()
        with _precision(self.linear.in_float32, hidden_BTD):
            weights_TK = weights_by(
                router, self.linear.router_class, hidden_BTD.flatten(0, 1), expert_ids_BTK.flatten(0, 1)
            )
        return weights_TK.view(expert_ids_BTK.shape)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        with _precision(self.linear.in_float32, hidden_BTD):
            return _routing(self.linear.forward_of_router, hidden_BTD)


def _precision(in_float32: bool, states: Tensor) -> AbstractContextManager[Any]:
    """For a router's own arithmetic. Autocast would put the short dtype in the place of the float32 that a rule asks
    for."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if in_float32 and active_autocast_dtype(kind) else nullcontext()


def _routing(router: Callable[[Tensor], Any], hidden_BTD: Tensor) -> Routing:
    B, T, _ = hidden_BTD.shape
    logits, weights, ids = router(hidden_BTD.flatten(0, 1))
    return Routing(ids.view(B, T, -1), weights.view(B, T, -1), logits.view(B, T, -1))


class TopKGates(BlockGates):
    """Mixin of an upstream router class, in whose place the result sits: its parameters keep their names."""

    router_class: ClassVar[type[nn.Module]]
    """The upstream class."""
    in_float32: ClassVar[bool] = False
    """Whether upstream converts states and weight to float32 for its linear map. It does so whatever autocast says."""

    def __init__(self, config: Any, stack: str, index: int, num_blocks: int) -> None:
        placed = config.pregating.gates_at(stack, index, num_blocks)
        super().__init__(stack, index, placed, config)
        # no part of this module, whose parameters it has
        object.__setattr__(self, "router", _OwnGate(self) if placed.own else None)
        if not placed.own:
            self._parameters.update(dict.fromkeys(self._parameters))
            self._buffers.update(dict.fromkeys(self._buffers))
        self.pre_gate = None if placed.target is None else self.ahead(config)
        if placed.weighs:
            self._check_rule()

    @classmethod
    def ahead(cls, config: Any, norm: nn.Module | None = None) -> TopKGate:
        """A gate for another block."""
        return TopKGate(cls.router_class(config), config.pregating, cls.in_float32, norm)

    def _check_rule(self) -> None:
        """Raises `UsageError` for a rule that weighs nothing but its own choice."""
        weight_ED = self.get_parameter("weight").detach()
        ids_1K = torch.zeros(1, 1, dtype=torch.int64, device=weight_ED.device)
        weights_by(self.for_weighing(), self.router_class, torch.zeros_like(weight_ED[:1]), ids_1K)

    def for_weighing(self) -> nn.Module:
        """What has the settings by which upstream's rule weighs experts that were chosen elsewhere: this router itself.
        A family whose rule gives no weight to some of them answers with another."""
        return self

    def forward_of_router(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Upstream's `forward` with the parameters of this module."""
        return self.router_class.forward(self, hidden_ND)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As upstream's router, for all N tokens of the batch one after the other: logits (N, E), combine weights and
        ids (N, K) of the route of this block."""
        call = _layer_call.get()
        assert call is not None, "a block was called outside of its layer"
        routing = self.route(hidden.view(call.shape), call.routes)
        logits, weights, ids = routing.logits_BTE, routing.weights_BTK, routing.expert_ids_BTK
        return logits.flatten(0, 1), weights.flatten(0, 1), ids.flatten(0, 1)


class PreGatedPreTrained(PreGatedModel):
    """Mixin of upstream's class that both the stack and the whole model derive from. layer_class: a `PreGatedLayer`;
    gates_class: what takes the place of a router in it."""

    layer_class: ClassVar[type[Any]]
    gates_class: ClassVar[type[TopKGates]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "layer_class" in cls.__dict__:
            recorded: Any = getattr(super(cls, cls), "_can_record_outputs", None) or {}
            cls._no_split_modules = [cls.layer_class.__name__]
            cls._can_record_outputs = {**recorded, "router_logits": OutputRecorder(cls.gates_class, index=0)}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """What upstream's class says. Upstream searches the file that a class is in, and keeps the answer in the class.
        For `cls` the answer would be no, or yes after upstream's class was asked."""
        models = (base for base in cls.__mro__ if issubclass(base, PreTrainedModel))
        return next(base for base in models if not issubclass(base, PreGatedModel))._can_set_experts_implementation()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # a block without a gate of its own has no weights there
        if not (isinstance(module, TopKGates) and module.router is None):
            super()._init_weights(module)  # type: ignore[misc]


class PreGatedLayer:
    """Mixin of an upstream decoder layer, whose feed-forward part `mlp` is an MoE block or dense."""

    mlp: Any

    @property
    def block_gates(self) -> TopKGates | None:
        """The gates of the MoE block; None in a dense layer."""
        return next((part for part in self.mlp.children() if isinstance(part, TopKGates)), None)

    def take_gates(self, gates: TopKGates) -> None:
        """Put `gates` in the place of the block's router."""
        parts = self.mlp.named_children()
        router = next(name for name, part in parts if isinstance(part, gates.router_class))
        setattr(self.mlp, router, gates)
        if experts_elsewhere():
            self.mlp.experts = nn.Module()
        self.mlp.holds_experts = True

    def forward(self, hidden_states: Tensor, *args: Any, routes: Routes, **kwargs: Any) -> Any:
        """As upstream's; `routes`: of this call of the stack."""
        before = _layer_call.set(_LayerCall(routes, hidden_states.shape))
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            _layer_call.reset(before)


class PreGatedStack:
    """Mixin of an upstream decoder-only model with `embed_tokens`, `layers` and `norm`."""

    config: Any
    layer_class: ClassVar[type[Any]]
    gates_class: ClassVar[type[TopKGates]]
    embed_tokens: Any
    layers: Any
    norm: Any
    post_init: Callable[[], None]
    entry_gates: nn.ModuleDict
    embedding_multiplier: float = 1.0
    """What upstream multiplies the embeddings by before the first layer."""
    listener: RouteListener | None = None

    def __init__(self, config: Any) -> None:
        """Layers of `layer_class` in place of upstream's, those with experts with gates, and the entry gates, each
        behind a norm of its own."""
        super().__init__(config)  # type: ignore[call-arg]
        moe_layers = family_named(config.model_type).moe_layers(config, STACK)
        self.layers = nn.ModuleList(self.layer_class(config, number) for number in range(len(self.layers)))
        for index, number in enumerate(moe_layers):
            self.layers[number].take_gates(self.gates_class(config, STACK, index, len(moe_layers)))
        entries = config.pregating.embedding_entries(STACK, len(moe_layers))
        self.entry_gates = nn.ModuleDict(
            {str(block): self.gates_class.ahead(config, copy.deepcopy(self.norm)) for block in entries}
        )
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream's, with routes of its own for each call."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        routes = Routes(STACK, self.listener)
        for block, gate in self.entry_gates.items():
            routes.commit(int(block), gate(inputs_embeds * self.embedding_multiplier))
        outputs = super().forward(inputs_embeds=inputs_embeds, routes=routes, **kwargs)  # type: ignore[misc]
        expert_ids = routes.end()
        if not isinstance(outputs, tuple):
            outputs.expert_ids = expert_ids
        return outputs


class PreGatedCausalLM(ServedModel):
    """Mixin of an upstream decoder-only model with `model` (of `stack_class`, a `PreGatedStack`) and `lm_head`."""

    stack_class: ClassVar[type[Any]]
    model: Any
    lm_head: Any
    config: Any
    logits_scaling: float = 1.0
    """What the head's output is divided by."""
    post_init: Callable[[], None]
    set_experts_implementation: Callable[[str], None]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.stack_class(config)
        self.post_init()

    def stack_module(self, stack: str) -> Any:
        assert stack == STACK
        return self.model

    def stack_layers(self, stack: str) -> nn.ModuleList:
        return self.stack_module(stack).layers

    def moe_blocks(self) -> Iterator[MoEBlock]:
        for number, layer in enumerate(self.model.layers):
            if gates := layer.block_gates:
                yield MoEBlock(STACK, gates.index, number, module=layer.mlp, gates=gates, layer_module=layer)

    def gates(self, stack: str | None = None) -> Iterator[Gate]:
        assert stack in (None, STACK)
        for block in self.moe_blocks():
            yield from (gate for gate in (block.gates.router, block.gates.pre_gate) if gate is not None)
        yield from self.model.entry_gates.values()

    def set_expert_path(self, path: str) -> None:
        """`reference`: one expert after the other. `grouped`: grouped products, equal within rounding; without
        gradients they are upstream's."""
        self.set_experts_implementation("eager" if path == "reference" else LEARNING)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        loss_only: bool = False,
        lesson: Lesson | None = None,
        logits_at: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> RoutedOutput:
        """As upstream's, except that the router loss is per block and never counts padding.

        With `labels` (B, T; those of the inputs; -100 is ignored) the loss is the mean cross-entropy over target
        tokens, and with `output_router_logits` also the weighted balance loss, averaged over blocks. With `loss_only`
        there are no logits, and the loss is the cross-entropy alone, summed over target tokens, and with a `lesson` the
        weighted divergence from a teacher too. `logits_at` (B, T), a mask, asks for the logits of those N positions
        alone, (N, V) in row-major order.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        # upstream's `generate` makes position ids only for a signature that names them
        kwargs |= {"position_ids": position_ids, "output_router_logits": output_router_logits}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states_BTD = outputs.last_hidden_state
        routed = self._by_block(outputs.router_logits, states_BTD.shape) if output_router_logits else None
        logits = loss = balance = terms = None
        if loss_only:
            assert labels is not None, "a loss needs labels"
            states_ND = states_BTD[:, :-1].flatten(0, 1) / self.logits_scaling
            loss, terms = head_losses(self.lm_head, states_ND, labels[:, 1:].flatten(), lesson)
        elif logits_at is not None:
            logits = self._logits(states_BTD[logits_at])
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(states_BTD[:, kept])
        if labels is not None and logits is not None:
            shifted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = nn.functional.cross_entropy(*shifted, ignore_index=IGNORED)
            if routed:
                pairs = zip(routed, outputs.expert_ids, strict=True)
                scores = family_named(self.config.model_type).scores
                blocks = [balance_loss(block, attention_mask, ids, scores) for block, ids in pairs]
                balance = torch.stack(blocks).mean()
                loss = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * balance
        return RoutedOutput(
            loss=loss,
            aux_loss=balance,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=routed,  # type: ignore[arg-type]
            expert_ids=outputs.expert_ids if routed else None,
            terms=terms,
        )

    def _logits(self, states: Tensor) -> Tensor:
        logits = self.lm_head(states)
        # a division by one would hold all logits twice
        return logits if self.logits_scaling == 1.0 else logits / self.logits_scaling

    @staticmethod
    def _by_block(logits: tuple[Tensor, ...], shape: torch.Size) -> tuple[Tensor, ...]:
        return tuple(block.view(*shape[:-1], -1) for block in logits)
