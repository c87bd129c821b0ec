"""How routers weigh experts that were chosen elsewhere, written out family by family, and a naive hand-over of routes
between the blocks of upstream's models that uses it.

Letters: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pregate.models.pregating import PreGating
from tests.models.families.test_decoder_only import FAMILIES, STACK, Row

Weigh = Callable[[Any, Tensor, Tensor], Tensor]
"""Of upstream's router, what the block computes on (T, D), and experts (T, K)."""


def of_one_softmax(normalised: bool | None, in_dtype: bool = True) -> Weigh:
    """Softmax over all experts; `normalised`: None where the router has a setting for it."""

    def weigh(router: Any, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
        logits_TE = x_TD @ router.weight.T
        weights_TK = logits_TE.float().softmax(-1).gather(1, ids_TK)
        if router.norm_topk_prob if normalised is None else normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK.to(logits_TE.dtype) if in_dtype else weights_TK

    return weigh


def of_the_chosen(router: Any, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """Softmax over the chosen experts alone."""
    logits_TE = x_TD @ router.weight.T + (getattr(router, "bias", None) if hasattr(router, "bias") else 0)
    return logits_TE.gather(1, ids_TK).softmax(-1)


def scaled(router: Any, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    return (x_TD @ router.weight.T).softmax(-1).gather(1, ids_TK) * router.routed_scaling_factor


def of_sigmoids(router: Any, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """Neither groups nor the correction bias, which only choose."""
    weights_TK = (x_TD @ router.weight.T).sigmoid().gather(1, ids_TK)
    if router.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * router.routed_scaling_factor


NAIVE: dict[str, Weigh] = {
    "olmoe": of_one_softmax(None),
    "mixtral": of_one_softmax(True, in_dtype=False),
    "deepseek_v2": scaled,
    "deepseek_v3": of_sigmoids,
    "glm4_moe": of_sigmoids,
    "gpt_oss": of_the_chosen,
    "granitemoe": of_the_chosen,
    "qwen2_moe": of_one_softmax(None),
    "qwen3_moe": of_one_softmax(None),
    "qwen3_5_moe": of_one_softmax(True),
}
assert NAIVE.keys() == FAMILIES.keys()


def moe_layers(row: Row, upstream: Any) -> list[Any]:
    return [upstream.model.layers[number] for number in row.family.moe_layers(upstream.config, STACK)]


def chosen_ahead(blocks: int, gating: PreGating) -> list[int]:
    """The blocks that another gate than their own router chooses for."""
    if not gating.lookahead:
        return []
    entries = [] if gating.entry == "own" else range(gating.start, gating.start + gating.lookahead)
    return [*entries, *range(gating.start + gating.lookahead, blocks)]


def choosing_gates(row: Row, upstream: Any, gating: PreGating) -> dict[int, Any]:
    """block -> a router like upstream's of that block, with other weights."""
    layers = moe_layers(row, upstream)
    gates = {block: copy.deepcopy(layers[block].get_submodule(row.family.router)) for block in range(len(layers))}
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for gate in gates.values():
            gate.weight += 0.2 * torch.randn(gate.weight.shape, generator=draw)
    return {block: gates[block] for block in chosen_ahead(len(layers), gating)}


def hand_over(
    row: Row,
    upstream: Any,
    gates: dict[int, Any],
    gating: PreGating,
    read: Callable[[int, Tensor], Tensor] = lambda _, states_TD: states_TD,
) -> Any:
    """Have `gates` choose on the recorded input of an earlier block, or on a norm of the embeddings, and upstream's own
    routers weigh what was chosen; or, with `early`, use the weights of `gates`. `read`: what the gate of a block makes
    of its input first."""
    weigh = next(NAIVE[name] for name, known in FAMILIES.items() if known is row)
    seen: list[Tensor] = []
    embedded: list[Tensor] = []
    upstream.model.register_forward_pre_hook(lambda *_: seen.clear())

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        embedded[:] = [args[0] if args else kwargs["hidden_states"]]

    upstream.model.layers[0].register_forward_pre_hook(begin, with_kwargs=True)
    for block, layer in enumerate(moe_layers(row, upstream)):

        def decide(router: Any, args: Any, own: Any, block: int = block, layer: Any = layer) -> Any:
            seen.append(args[0].flatten(0, -2))
            if block not in gates:
                return own
            if block < gating.start + gating.lookahead:
                states = layer.get_submodule(row.family.norm)(embedded[0]).flatten(0, 1)
            else:
                states = seen[block - gating.lookahead]
            logits, early, ids = type(router).forward(gates[block], read(block, states))
            if gating.weights == "early":
                return logits, early, ids
            late = weigh(router, seen[block], ids)
            # the gate that chose learns as if its own weights were used
            return logits, late + (early - early.detach()), ids

        layer.get_submodule(row.family.router).register_forward_hook(decide)
    return upstream


def with_gates(row: Row, model: Any, gates: dict[int, Any]) -> Any:
    """Our model with the weights of `gates` where it chooses ahead."""
    blocks = {block.index: block.gates for block in model.moe_blocks()}
    ahead = {gates.target: gates.pre_gate for gates in blocks.values() if gates.pre_gate is not None}
    ahead |= {int(block): gate for block, gate in model.model.entry_gates.items()}
    assert ahead.keys() == gates.keys()
    for block, gate in gates.items():
        ahead[block].router.load_state_dict(gate.state_dict())
    return model
