"""Split a dense model: read what its neurons do on a text, part them, and fit the gates.

Letters: B rows, T tokens, D model width, F neurons, E experts, H neurons of an expert, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pregate.conversion.calibrate.gate_fit import Tokens, fit_gate
from studies.dense_to_moe.clusters import experts_of_neurons, shared_neurons
from studies.dense_to_moe.moe import Form, empty_moe, fill_split

HELD_OUT = 0.2
"""Share of the tokens by which fits of a gate are compared."""
SCALES = tuple(0.02 * 1.25**step for step in range(25))
"""Spreads of a gate's logits that are tried, as standard deviations: 0.02 to 4.2."""
TOLERANCE = 0.02
"""Of the spreads the largest is taken whose error is at most by this share above the least: gates with almost equal
weights would be best at first, but such weights say nothing about routes, neither to losses nor to a calibration."""


@dataclass(frozen=True)
class LayerFit:
    """Of one layer, on tokens that were held out: the share of the best routes that the gate chooses too, and the
    squared error of the layer's output, as a share of the experts' part of it, by the best routes and by the gate."""

    agreement: float
    error_best: float
    error_gate: float


@torch.no_grad()
def states_of(dense: Any, rows_BT: Tensor, rows_at_once: int = 2) -> list[Tensor]:
    """What enters each feed-forward layer, (tokens, D) a layer."""
    found: list[list[Tensor]] = [[] for _ in dense.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0].flatten(0, 1)))
        for layer, kept in zip(dense.model.layers, found, strict=True)
    ]
    try:
        for part_BT in rows_BT.split(rows_at_once):
            dense.model(input_ids=part_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def split(
    dense: Any, rows_BT: Tensor, form: Form, seed: int = 0, told: Callable[[int, LayerFit], None] | None = None
) -> Any:
    """The MoE model of `dense` with parted neurons, in evaluation mode. `told` hears of each layer."""
    model = empty_moe(dense, form)
    for number, states_TD in enumerate(states_of(dense, rows_BT)):
        layer, block = dense.model.layers[number].mlp, model.model.layers[number].mlp
        fitted = split_layer(layer, block, states_TD, form, seed)
        if told:
            told(number, fitted)
    return model


def split_layer(layer: Any, block: Any, states_TD: Tensor, form: Form, seed: int) -> LayerFit:
    """Fill `block` with the neurons of `layer`."""
    down_DF = layer.down_proj.weight
    acts_TF = layer.act_fn(layer.gate_proj(states_TD)) * layer.up_proj(states_TD)
    adds_TF = acts_TF.abs() * down_DF.norm(dim=0)
    F = adds_TF.shape[1]
    shared_S = shared_neurons(adds_TF, form.num_shared(F), form.shared_by)
    routed_R = torch.ones(F, dtype=torch.bool).index_fill(0, shared_S, False).nonzero()[:, 0]
    owner_R = experts_of_neurons(adds_TF[:, routed_R], form.experts, form.top_k, seed)
    experts_EH = torch.stack([routed_R[owner_R == expert] for expert in range(form.experts)])
    outputs_TED = torch.stack([acts_TF[:, own_H] @ down_DF[:, own_H].T for own_H in experts_EH], dim=1)
    gate_ED, fitted = fit(states_TD, outputs_TED, form.top_k)
    fill_split(block, layer, shared_S, experts_EH, gate_ED, form)
    return fitted


def fit(states_TD: Tensor, outputs_TED: Tensor, top_k: int) -> tuple[Tensor, LayerFit]:
    """The gate that chooses the experts with the largest outputs, by ridge regression on their norms, at the spread of
    logits that the layer's output asks for."""
    products_TEE = outputs_TED @ outputs_TED.mT
    norms_TE = products_TEE.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    count = round((1 - HELD_OUT) * len(states_TD))
    fitted, held = slice(None, count), slice(count, None)

    def choose(logits_TE: Tensor) -> Tensor:
        return logits_TE.topk(top_k, dim=-1).indices

    parts = [Tokens(states_TD[rows], norms_TE[rows]) for rows in (fitted, held)]
    start_ED = states_TD.new_zeros(outputs_TED.shape[1:])
    found = fit_gate(start_ED, None, *parts, steps=0, choose=choose)
    logits_TE = states_TD @ found.weight_ED.T
    spread = (logits_TE - logits_TE.mean(-1, keepdim=True)).std().clamp_min(1e-12)
    errors = [missed_share(products_TEE, scale * logits_TE / spread, top_k) for scale in SCALES]
    scale = max(s for s, error in zip(SCALES, errors, strict=True) if error <= (1 + TOLERANCE) * min(errors))
    best = missed_share(products_TEE[held], norms_TE[held], top_k, equal=True)
    gate = missed_share(products_TEE[held], scale * logits_TE[held] / spread, top_k)
    return found.weight_ED * scale / spread, LayerFit(found.ridge, best, gate)


def missed_share(products_TEE: Tensor, logits_TE: Tensor, top_k: int, equal: bool = False) -> float:
    """The squared error of the chosen experts' combined output against the sum of all, as a share of that sum's square.

    products_TEE: the inner products of the outputs of a token's experts. The combine weights add up to K, or are one
    each (`equal`).
    """
    chosen = logits_TE.softmax(-1).topk(top_k, dim=-1)
    weights_TK = torch.ones_like(chosen.values)
    if not equal:
        weights_TK = top_k * chosen.values / chosen.values.sum(-1, keepdim=True)
    missed_TE = 1 - torch.zeros_like(logits_TE).scatter_(1, chosen.indices, weights_TK)
    missed = (missed_TE[:, None] @ products_TEE @ missed_TE[:, :, None]).sum()
    return (missed / products_TEE.sum().clamp_min(1e-30)).item()
