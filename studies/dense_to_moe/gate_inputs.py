"""What a gate that sits one block ahead would win from more inputs, before anybody builds one.

    python -m studies.dense_to_moe.gate_inputs OUT [--tokens 6144]

Reads OUT/checkpoint and OUT/text of `studies.dense_to_moe`. For every block, ridge regression predicts the router's
logits of the next block from what the gate reads (the states that enter the block) and from other things beside it.
Prints the share of the next block's choices that each prediction finds, on tokens that were not fitted on. The
attention of the next block and the experts' output come too late for a gate: the latter is a bound.

Letters: N tokens, D model width, E experts, K experts per token, F features.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from pregate.measure.table_format import Table, text
from studies.dense_to_moe.healing_text import packed_rows, read_texts
from studies.dense_to_moe.moe import open_moe

STATES = "states"
INPUTS = {
    "the states alone": (STATES,),
    "and the block's own routes": (STATES, "routes"),
    "and the routes of the token before": (STATES, "routes_before"),
    "and the shared expert's output": (STATES, "shared"),
    "and both routes and that output": (STATES, "routes", "routes_before", "shared"),
    "and the whole output of the experts, which comes too late": (STATES, "output"),
}
MOVED = "the next block's router, not fitted"
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Penalties, as shares of the mean square of a feature; the best on the held-out tokens counts, for every input."""
HELD_OUT = 0.2
ROW_TOKENS, ROWS_AT_ONCE = 256, 2


@torch.no_grad()
def features_of(model: Any, rows_BT: Tensor) -> list[dict[str, Tensor]]:
    """For each block what a gate in it could read, (N, F) by name, with its router's `logits` and `weight`."""
    found: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in model.model.layers]
    starts = torch.arange(rows_BT.numel()) % rows_BT.shape[1] == 0

    def note(kept: dict[str, list[Tensor]]) -> Any:
        def hook(block: Any, given: tuple[Tensor], output: Tensor) -> None:
            states_ND = given[0].flatten(0, -2)
            logits_NE, _, ids_NK = block.gate(states_ND)
            shared_ND = block.shared_expert_gate(states_ND).sigmoid() * block.shared_expert(states_ND)
            kept[STATES].append(states_ND)
            kept["logits"].append(logits_NE)
            kept["routes"].append(torch.zeros_like(logits_NE).scatter(1, ids_NK, 1.0))
            kept["shared"].append(shared_ND)
            kept["output"].append(output.flatten(0, -2))

        return hook

    hooks = [layer.mlp.register_forward_hook(note(kept)) for layer, kept in zip(model.model.layers, found, strict=True)]
    try:
        for part_BT in rows_BT.split(ROWS_AT_ONCE):
            model(input_ids=part_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    features = [{name: torch.cat(parts) for name, parts in kept.items()} for kept in found]
    for block, layer in zip(features, model.model.layers, strict=True):
        before_NE = block["routes"].roll(1, 0)
        before_NE[starts] = 0
        block |= {"routes_before": before_NE, "weight": layer.mlp.gate.weight}
    return features


def agreements(here: Mapping[str, Tensor], following: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of the next block's choices that each kind of input finds on held-out tokens."""
    wanted_NE, chosen_NE = following["logits"].double(), following["routes"]
    top_k = int(chosen_NE[0].sum())
    held = int(HELD_OUT * len(wanted_NE))

    def share(logits_NE: Tensor) -> float:
        return chosen_NE[:held].gather(1, logits_NE.topk(top_k, dim=1).indices).mean().item()

    found = {MOVED: share((here[STATES] @ following["weight"].T)[:held])}
    constant_N1 = torch.ones(len(wanted_NE), 1, dtype=torch.float64)
    for name, parts in INPUTS.items():
        features_NF = torch.cat([*(here[part].double() for part in parts), constant_N1], dim=1)
        # else the group of features with the larger numbers would set the penalty of the others
        features_NF = features_NF / features_NF[held:].square().mean(0).sqrt().clamp_min(1e-12)
        fit_NF = features_NF[held:]
        gram_FF, target_FE = fit_NF.T @ fit_NF, fit_NF.T @ wanted_NE[held:]
        scale = gram_FF.diagonal().mean()
        eye_FF = torch.eye(len(gram_FF), dtype=torch.float64)
        shares = []
        for ridge in RIDGES:
            weights_FE = torch.cholesky_solve(target_FE, torch.linalg.cholesky(gram_FF + ridge * scale * eye_FF))
            shares.append(share(features_NF[:held] @ weights_FE))
        found[name] = max(shares)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.dense_to_moe.gate_inputs", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=6144)
    given = parser.parse_args(arguments)
    model = open_moe(given.out / "checkpoint")
    if not hasattr(model.model.layers[0].mlp, "shared_expert"):
        parser.error(f"{given.out} has no shared experts: make a model with --form split and --shared above 0.")
    tokenizer = AutoTokenizer.from_pretrained(given.out / "checkpoint")
    rows_BT = packed_rows(read_texts(given.out / "text", "train"), tokenizer, given.tokens, ROW_TOKENS)
    blocks = features_of(model, rows_BT)
    found = [agreements(here, following) for here, following in pairwise(blocks)]
    lines = [
        {
            "input": name,
            "mean": f"{100 * sum(each[name] for each in found) / len(found):.1f}",
            "least": f"{100 * min(each[name] for each in found):.1f}",
        }
        for name in found[0]
    ]
    columns = {"a gate reads": text("input"), "mean over blocks, %": text("mean"), "least, %": text("least")}
    print(f"Choices of the next block that are found, {rows_BT.numel():,} tokens:\n")
    print(Table.of(columns, lines, left=1).markdown())


if __name__ == "__main__":
    main()
