"""A Switch model token by token and block by block: what its gates choose ahead is handed on by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def naive_gate(stack: Any, name: str, block: int, mlps: list[Any], gating: Any) -> Any:
    ahead = gating.lookahead if name in gating.stacks else 0
    if ahead == 0 or block < gating.start:
        return mlps[block].router
    if block >= gating.start + ahead:
        return mlps[block - ahead].pre_gate
    return stack.entry_gates[str(block)] if gating.entry == "embedding" else mlps[block].router


def naive_probability(gate: Any, seen: Tensor) -> Tensor:
    logits = gate.classifier.weight.float() @ seen.float()
    if gate.nonlinear is not None:
        logits = logits + gate.nonlinear.down @ torch.nn.functional.silu(gate.nonlinear.up @ seen.float())
    return (logits if gate.classifier.bias is None else logits + gate.classifier.bias).softmax(0)


def naive_moe(x_BTD: Tensor, seen_BTD: Tensor, gate: Any, mlp: Any, capacity: int, late: bool) -> Tensor:
    """Token by token: the gate decides on `seen`, the chosen expert computes on `x`, and with `late` the block's own
    router says on `x` what the choice is worth. Then the gate learns as if its own probability were used."""
    rows = []
    for x_TD, seen_TD in zip(x_BTD, seen_BTD, strict=True):
        used = [0] * len(mlp.experts)
        for x, seen in zip(x_TD, seen_TD, strict=True):
            probability = naive_probability(gate, seen)
            expert = int(probability.argmax())
            weight = probability[expert]
            if late:
                weight = naive_probability(mlp.router, x)[expert] + weight - weight.detach()
            used[expert] += 1
            if used[expert] > capacity:
                rows.append(torch.zeros_like(x))
                continue
            module = mlp.experts[f"expert_{expert}"]
            rows.append(weight * (module.wo.weight @ (module.wi.weight @ x).relu()))
    return torch.stack(rows).view(x_BTD.shape)


def naive_stack(
    model: Any, name: str, ids: Tensor, mask: Tensor, memory: Tensor | None = None, memory_mask: Any = None
) -> Tensor:
    stack, gating = getattr(model, name), model.config.pregating
    ahead = gating.lookahead if name in gating.stacks else 0
    most_negative = torch.finfo(torch.float32).min
    embeddings = stack.embed_tokens(ids)
    hidden, bias, cross_bias = embeddings, None, None
    visible = mask[:, None, None, :].bool().expand(-1, 1, ids.shape[1], -1)
    if name == "decoder":
        visible = visible & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    additive = torch.where(visible, 0.0, most_negative)
    sparse = [layer.layer[-1] for layer in stack.block if layer.is_sparse]
    mlps = [ff.mlp for ff in sparse]
    inputs_of_block: list[Tensor] = []
    for layer in stack.block:
        hidden, bias, _ = layer.layer[0](hidden, attention_mask=additive, position_bias=bias)
        if name == "decoder":
            memory_additive = torch.where(memory_mask[:, None, None, :].bool(), 0.0, most_negative)
            hidden, cross_bias, _ = layer.layer[1](
                hidden, key_value_states=memory, attention_mask=memory_additive, position_bias=cross_bias
            )
        feed_forward = layer.layer[-1]
        x = feed_forward.layer_norm(hidden)
        if layer.is_sparse:
            block = mlps.index(feed_forward.mlp)
            inputs_of_block.append(x)
            gate = naive_gate(stack, name, block, mlps, gating)
            if ahead and block >= gating.start + ahead:
                seen = inputs_of_block[block - ahead]
            else:
                seen = gate.layer_norm(embeddings) if hasattr(gate, "layer_norm") else x
            late = gating.weights == "late" and gate is not feed_forward.mlp.router
            hidden = hidden + naive_moe(x, seen, gate, feed_forward.mlp, model.config.expert_capacity, late)
        else:
            hidden = hidden + feed_forward.mlp(x)
    return stack.final_layer_norm(hidden)


def naive_logits(model: Any, input_ids: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
    memory = naive_stack(model, "encoder", input_ids, mask)
    states = naive_stack(model, "decoder", decoder_ids, torch.ones_like(decoder_ids), memory, mask)
    scale = model.config.d_model**-0.5 if model.config.tie_word_embeddings else 1.0
    return model.lm_head(states * scale)
