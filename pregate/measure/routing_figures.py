"""How two models route the same tokens: agreement, captured mass, load of the experts, and switches between tokens.

Knows tensors of one MoE block at a time and how to gather them through an engine; knows nothing about where results
are written. T counts the real tokens of all sequences, one after the other; E experts, K of them for a
token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.measure.engine_predictions import length_sorted_batches, refuse_not_finite
from pregate.models.family import family_of_model
from pregate.models.routing import slot_agreement
from pregate.tasks.base import Example
from pregate.tasks.tokens import Collator


@dataclass(frozen=True)
class BlockRoutes:
    """One MoE block over all tokens: router probabilities (T, E), the chosen experts of each token (T, K), and the
    number of the sequence that it belongs to (T), never falling."""

    probabilities_TE: Tensor
    choices_TK: Tensor
    sequences_T: Tensor


Routes = Mapping[str, Sequence[BlockRoutes]]
"""By stack, the MoE blocks in order."""


def record_routes(
    engine: OffloadEngine | DeviceEngine,
    examples: Sequence[Example],
    collate: Collator,
    batch_size: int,
    name: str = "the model",
) -> dict[str, list[BlockRoutes]]:
    """The routes of every unpadded token of `examples`, with the targets as the decoder's input. Raises `UsageError` as
    `predict` does for logits of target tokens that are not finite. Logits of other tokens are not computed: each would
    need memory for the whole vocabulary.

    Two models given the same examples and batch size list the same tokens in the same order.
    """
    device, family = engine.model.device, family_of_model(engine.model)
    objective = family.objective
    parts: dict[str, list[list[BlockRoutes]]] = {}
    done = 0
    for batch in length_sorted_batches(examples, batch_size):
        inputs = {name: tensor.to(device) for name, tensor in collate([examples[i] for i in batch]).items()}
        asked = objective.target_rows(engine.model, inputs)
        output = engine.forward(**objective.inputs(inputs), **asked, output_router_logits=True, use_cache=False)
        rows_N = asked["logits_at"].nonzero()[:, 0]
        broken = rows_N[~output.logits.isfinite().all(-1)].unique().tolist()
        refuse_not_finite(broken, [examples[i] for i in batch], name, engine)
        masks, chosen = objective.real_tokens(inputs), objective.expert_ids(output)
        for stack, blocks in objective.router_logits(output).items():
            mask_BT = masks[stack]
            sequences_T = (done + mask_BT.nonzero()[:, 0]).cpu()
            rows = parts.setdefault(stack, [[] for _ in blocks])
            for row, logits_BTE, ids_BTK in zip(rows, blocks, chosen[stack], strict=True):
                logits_TE = logits_BTE[mask_BT].float().cpu()
                row.append(BlockRoutes(family.scores.probabilities(logits_TE), ids_BTK[mask_BT].cpu(), sequences_T))
        done += len(batch)
    return {stack: [_joined(row) for row in rows] for stack, rows in parts.items()}


def _joined(parts: Sequence[BlockRoutes]) -> BlockRoutes:
    return BlockRoutes(
        torch.cat([part.probabilities_TE for part in parts]),
        torch.cat([part.choices_TK for part in parts]),
        torch.cat([part.sequences_T for part in parts]),
    )


def gate_mass(choices_TK: Tensor, reference: BlockRoutes) -> float:
    """Probability that the reference router gives to the experts in `choices_TK`, summed over tokens, relative to what
    it gives to its own choices: 1 where nothing is lost, and more than the agreement where the experts that were taken
    instead are nearly as good to it."""
    given_TE = reference.probabilities_TE
    return (given_TE.gather(1, choices_TK).sum() / given_TE.gather(1, reference.choices_TK).sum()).item()


def load_balance(choices_TK: Tensor, num_experts: int) -> float:
    """Entropy of the experts' shares of the choices over that of equal shares: 1 is even, 0 one expert for all."""
    if num_experts < 2:
        return 1.0
    shares_E = torch.bincount(choices_TK.flatten(), minlength=num_experts).double() / choices_TK.numel()
    return (torch.special.entr(shares_E).sum() / torch.tensor(float(num_experts)).log()).item()


def switch_rate(choices_TK: Tensor, sequences_T: Tensor) -> float | None:
    """Share of the choices of a token that the token before it in its sequence has not made.

    The first token of a sequence has none before it; None where all sequences hold a single token.
    """
    together = sequences_T[1:] == sequences_T[:-1]
    if not together.any():
        return None
    return 1.0 - slot_agreement(choices_TK[1:][together], choices_TK[:-1][together])


def compare_routes(routes: Routes, reference: Routes | None) -> dict[str, Any]:
    """The `routing` section of `eval.json`: for each stack a list with one value a block.

    `load_balance` and `switch_rate` of each model; `agreement` and `gate_mass` only where both have the same blocks.
    """

    def blocks(of: Routes, measure: Callable[[BlockRoutes], float | None]) -> dict[str, list[float | None]]:
        return {stack: [measure(block) for block in found] for stack, found in of.items()}

    def pairs(measure: Callable[[BlockRoutes, BlockRoutes], float], other: Routes) -> dict[str, list[float]]:
        return {
            stack: [measure(one, two) for one, two in zip(found, other[stack], strict=True)]
            for stack, found in routes.items()
        }

    models = {"pre_gated": routes, **({"reference": reference} if reference else {})}
    section: dict[str, Any] = {}
    if reference and {s: len(b) for s, b in routes.items()} == {s: len(b) for s, b in reference.items()}:
        section["agreement"] = pairs(lambda one, two: slot_agreement(one.choices_TK, two.choices_TK), reference)
        if all(
            one.probabilities_TE.shape == two.probabilities_TE.shape
            for stack, found in routes.items()
            for one, two in zip(found, reference[stack], strict=True)
        ):
            section["gate_mass"] = pairs(lambda one, two: gate_mass(one.choices_TK, two), reference)
    section["load_balance"] = {
        name: blocks(model, lambda block: load_balance(block.choices_TK, block.probabilities_TE.shape[1]))
        for name, model in models.items()
    }
    section["switch_rate"] = {
        name: blocks(model, lambda block: switch_rate(block.choices_TK, block.sequences_T))
        for name, model in models.items()
    }
    return section
