"""The most probable expert of each token of a decoding step. A fetch waits for it, so it is one short launch.

Letters: B rows, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pregate.engine.device.ops.language import tl, triton
from pregate.engine.device.ops.numbers import FLOATS, RAW, numbers, rounded, stored
from pregate.engine.device.ops.registry import operation
from pregate.models.routing import route


def _no_choice(logits_B1E: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*logits_B1E.shape[:-1], 1)
    return logits_B1E.new_empty(shape, dtype=torch.int64), logits_B1E.new_empty(shape, dtype=dtype)


@operation(fake=_no_choice)
def first_choice(logits_B1E: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The most probable expert of each token and its probability in `dtype`: (expert_ids_B11, weights_B11). On equal
    probabilities the first expert wins."""
    chosen = route(logits_B1E, dtype)
    return chosen.expert_ids_BTK, chosen.weights_BTK


@triton.jit
def first_choice_kernel(
    logits,
    ids,
    weights,
    E: tl.constexpr,
    ROUTED: tl.constexpr,
    KIND: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program a token. ROUTED: the kind of the logits, KIND: of the weights."""
    row = tl.program_id(0)
    expert = tl.arange(0, TILE)
    inside = expert < E
    logit = tl.where(inside, numbers(tl.load(logits + row * E + expert, mask=inside, other=0), ROUTED), -float("inf"))
    share = tl.exp(logit - tl.max(logit, axis=0))
    share = rounded(rounded(share / tl.sum(share, axis=0), ROUTED, NATIVE), KIND, NATIVE)
    best = tl.max(share, axis=0)
    chosen = tl.min(tl.where(inside & (share == best), expert, E - 1), axis=0)
    tl.store(ids + row, chosen.to(tl.int64))
    tl.store(weights + row, stored(best, KIND))


@first_choice.on_cuda
def launch_first_choice(logits_B1E: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    *shape, num_experts = logits_B1E.shape
    routed, kind = FLOATS[logits_B1E.dtype], FLOATS[dtype]
    ids = torch.empty(*shape, 1, dtype=torch.int64, device=logits_B1E.device)
    weights = torch.empty(*shape, 1, dtype=dtype, device=logits_B1E.device)
    first_choice_kernel[(ids.numel(),)](
        logits_B1E.contiguous().view(RAW[routed]),
        ids,
        weights.view(RAW[kind]),
        E=num_experts,
        ROUTED=routed,
        KIND=kind,
        NATIVE=isinstance(first_choice_kernel, triton.JITFunction),
        TILE=max(16, triton.next_power_of_2(num_experts)),
        num_warps=1 if num_experts <= 128 else 4,
    )
    return ids, weights
