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
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from pregate.conversion.calibrate.gate_fit import Tokens, fit_gate
from pregate.measure.table_format import Table, text
from pregate.models.routing import logits_agreement
from studies.dense_to_moe.healing_text import packed_rows, read_texts
from studies.dense_to_moe.moe import open_moe
from studies.dense_to_moe.split import HELD_OUT, states_of

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
ROW_TOKENS = 256


@torch.no_grad()
def features_of(model: Any, rows_BT: Tensor) -> list[dict[str, Tensor]]:
    """For each block what a gate in it could read, (N, F) by name, with its router's `logits` and `weight`."""
    starts = torch.arange(rows_BT.numel()) % rows_BT.shape[1] == 0
    features = []
    for layer, states_ND in zip(model.model.layers, states_of(model, rows_BT), strict=True):
        block = layer.mlp
        logits_NE, _, ids_NK = block.gate(states_ND)
        routes_NE = torch.zeros_like(logits_NE).scatter(1, ids_NK, 1.0)
        features.append(
            {
                STATES: states_ND,
                "logits": logits_NE,
                "weight": block.gate.weight,
                "routes": routes_NE,
                "routes_before": routes_NE.roll(1, 0).masked_fill(starts[:, None], 0.0),
                "shared": block.shared_expert_gate(states_ND).sigmoid() * block.shared_expert(states_ND),
                "output": block(states_ND[None])[0],
            }
        )
    return features


def agreements(here: Mapping[str, Tensor], following: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of the next block's choices that each kind of input finds on held-out tokens."""
    wanted_NE, top_k = following["logits"], int(following["routes"][0].sum())
    cut = round((1 - HELD_OUT) * len(wanted_NE))
    fitted, held = slice(None, cut), slice(cut, None)

    def choose(logits_NE: Tensor) -> Tensor:
        return logits_NE.topk(top_k, dim=-1).indices

    moved_NE = here[STATES][held] @ following["weight"].T
    found = {MOVED: logits_agreement(moved_NE, wanted_NE[held], choose)}
    nothing_E = wanted_NE.new_zeros(wanted_NE.shape[1])
    for name, parts in INPUTS.items():
        features_NF = torch.cat([here[part] for part in parts], dim=1)
        # else the features with the larger numbers would set the penalty of the others
        features_NF = features_NF / features_NF[fitted].square().mean(0).sqrt().clamp_min(1e-12)
        tokens = [Tokens(features_NF[rows], wanted_NE[rows]) for rows in (fitted, held)]
        nothing_EF = features_NF.new_zeros(len(nothing_E), features_NF.shape[1])
        found[name] = fit_gate(nothing_EF, nothing_E, *tokens, steps=0, choose=choose).ridge
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
