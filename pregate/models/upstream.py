"""Pre-gating around the top-k MoE blocks that transformers' decoder-only models share.

In transformers 5 a block's router maps hidden states to (logits, weights, ids), and its experts take (hidden, ids,
weights). Here `TopKGates` takes the router's place: it evaluates the gates that sit in the block, by upstream's own
rule, and gives the block the route that was decided for it. Attention, norms, rotary embeddings, experts and shared
experts stay upstream's. A family derives its classes from these and upstream's.

Letters: B batch, T tokens of a sequence, D model width, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from pregate.models.family import MoEBlock
from pregate.models.head import IGNORED, head_cross_entropy
from pregate.models.pregated import Gate, PreGatedModel, ServedModel, experts_elsewhere
from pregate.models.routes import BlockGates, RouteListener, Routes
from pregate.models.routing import Routing, balance_loss


class TopKGate(Gate):
    """A gate of its own: upstream's router and its rule. `norm`: what an entry gate applies to the embeddings."""

    def __init__(self, router: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.norm = router, norm

    @property
    def linear(self) -> Any:
        return self.router

    def read(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD if self.norm is None else self.norm(hidden_BTD)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        return _routing(self.router, self.read(hidden_BTD))


class _OwnGate(Gate):
    """The gate that stays where upstream has it. Its parameters are those of the module that it sits in, so that they
    keep upstream's names."""

    def __init__(self, seat: TopKGates, decide: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._seat, self._decide = (seat,), decide  # a tuple, or the seat would be a part of its own part

    @property
    def linear(self) -> Any:
        return self._seat[0]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self._seat[0].named_parameters(recurse=False)

    def forward(self, hidden_BTD: Tensor) -> Routing:
        return _routing(self._decide, hidden_BTD)


def _routing(router: Callable[[Tensor], Any], hidden_BTD: Tensor) -> Routing:
    B, T, _ = hidden_BTD.shape
    logits, weights, ids = router(hidden_BTD.flatten(0, 1))
    return Routing(ids.view(B, T, -1), weights.view(B, T, -1), logits.view(B, T, -1))


class TopKGates(BlockGates):
    """Takes the place of the router of an upstream block. The layer sets `routes` for the length of its call."""

    routes: Routes | None = None
    shape: torch.Size | None = None

    @classmethod
    def in_place_of(cls, router_class: type[nn.Module]) -> type[TopKGates]:
        """The class that takes the place of routers of `router_class`, whose parameters keep their names."""

        class Gates(cls, router_class):  # type: ignore[misc, valid-type]
            def __init__(self, config: Any, stack: str, index: int, num_blocks: int) -> None:
                here = config.pregating.gates_at(stack, index, num_blocks)
                super().__init__(stack, index, here, config)
                own = _OwnGate(self, lambda hidden_ND: router_class.forward(self, hidden_ND)) if here.own else None
                object.__setattr__(self, "_own", own)
                for name in list(self._parameters) if own is None else ():
                    self.register_parameter(name, None)
                self.pre_gate = TopKGate(router_class(config)) if here.target is not None else None

        return Gates

    @property
    def router(self) -> Gate | None:
        return vars(self)["_own"]

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As upstream's router, for all tokens of the batch one after the other: logits (N, E), combine weights and
        ids (N, K) of the route of this block."""
        assert self.routes is not None and self.shape is not None, "a block was called outside of its layer"
        routing = self.route(hidden_ND.view(self.shape), self.routes)
        logits, weights, ids = routing.logits_BTE, routing.weights_BTK, routing.expert_ids_BTK
        return logits.flatten(0, 1), weights.flatten(0, 1), ids.flatten(0, 1)


class PreGatedPreTrained(PreGatedModel):
    """Mixin of upstream's class that both the stack and the whole model derive from."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # a place without a gate of its own has no weights
        if not (isinstance(module, TopKGates) and module.router is None):
            super()._init_weights(module)  # type: ignore[misc]


class PreGatedLayer:
    """Mixin of an upstream decoder layer with an MoE block at `mlp`, whose router is `mlp.gate`."""

    mlp: Any

    def take_gates(self, config: Any, stack: str, index: int, num_blocks: int) -> None:
        """Put `TopKGates` in the place of the block's router."""
        self.mlp.gate = TopKGates.in_place_of(type(self.mlp.gate))(config, stack, index, num_blocks)  # type: ignore
        if experts_elsewhere():
            self.mlp.experts = nn.Module()
        self.mlp.holds_experts = True

    def forward(self, hidden_states: Tensor, *args: Any, routes: Routes, **kwargs: Any) -> Any:
        """As upstream's; `routes`: of this call of the stack."""
        gates = self.mlp.gate
        before = gates.routes, gates.shape
        gates.routes, gates.shape = routes, hidden_states.shape
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            gates.routes, gates.shape = before


def entry_gates(
    config: Any, blocks: Iterable[int], router_class: type[nn.Module], norm: Callable[[], nn.Module]
) -> nn.ModuleDict:
    """The entry gates of `blocks`, each behind a norm of its own."""
    return nn.ModuleDict({str(block): TopKGate(router_class(config), norm()) for block in blocks})


class PreGatedStack:
    """Mixin of an upstream decoder-only model with `embed_tokens` and `layers`."""

    embed_tokens: Any
    entry_gates: nn.ModuleDict
    stack_name: str
    listener: RouteListener | None = None

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream's, with routes of its own for each call."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        routes = Routes(self.stack_name, self.listener)
        for block, gate in self.entry_gates.items():
            routes.commit(int(block), gate(inputs_embeds))
        outputs = super().forward(inputs_embeds=inputs_embeds, routes=routes, **kwargs)  # type: ignore[misc]
        routes.end()
        return outputs


class PreGatedCausalLM(ServedModel):
    """Mixin of an upstream decoder-only model with `model` (a `PreGatedStack`) and `lm_head`."""

    model: Any
    lm_head: Any
    config: Any

    def stack_module(self, stack: str) -> Any:
        assert stack == self.model.stack_name
        return self.model

    def moe_blocks(self) -> Iterator[MoEBlock]:
        for number, layer in enumerate(self.model.layers):
            if isinstance(layer, PreGatedLayer):
                gates = layer.mlp.gate
                yield MoEBlock(gates.stack, gates.index, number, module=layer.mlp, gates=gates, layer_module=layer)

    def gates(self, stack: str | None = None) -> Iterator[Gate]:
        assert stack in (None, self.model.stack_name)
        for block in self.moe_blocks():
            yield from (gate for gate in (block.gates.router, block.gates.pre_gate) if gate is not None)
        yield from self.model.entry_gates.values()

    def set_expert_path(self, path: str) -> None:
        """`reference`: one expert after the other. `grouped`: upstream's grouped products, equal within rounding."""
        # not by upstream's method, which looks for the experts in the source of the family's own file
        self.config._experts_implementation = "eager" if path == "reference" else "grouped_mm"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = False,
        loss_only: bool = False,
        logits_at: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As upstream's, except that the router loss is per block and never counts padding.

        With `labels` (B, T; those of the inputs; -100 is ignored) the loss is the mean cross-entropy over target
        tokens, and with `output_router_logits` also the weighted balance loss, averaged over blocks. With `loss_only`
        there are no logits, and the loss is the cross-entropy alone, summed over target tokens. `logits_at` (B, T), a
        mask, asks for the logits of those N positions alone, (N, V) in row-major order.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_router_logits=output_router_logits, **kwargs
        )
        states_BTD = outputs.last_hidden_state
        routed = self._by_block(outputs.router_logits, states_BTD.shape) if output_router_logits else None
        logits = loss = balance = None
        if loss_only:
            assert labels is not None, "a loss needs labels"
            loss = head_cross_entropy(self.lm_head, states_BTD[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        elif logits_at is not None:
            logits = self.lm_head(states_BTD[logits_at])
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(states_BTD[:, kept])
        if labels is not None and logits is not None:
            shifted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            loss = nn.functional.cross_entropy(*shifted, ignore_index=IGNORED)
            if routed:
                balance = torch.stack([balance_loss(block, attention_mask) for block in routed]).mean()
                loss = loss + getattr(self.config, "router_aux_loss_coef", 0.0) * balance
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=routed,  # type: ignore[arg-type]
        )

    @staticmethod
    def _by_block(logits: tuple[Tensor, ...], shape: torch.Size) -> tuple[Tensor, ...]:
        return tuple(block.view(*shape[:-1], -1) for block in logits)
