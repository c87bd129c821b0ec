"""The loss on a text by other routes than the gate's: what the best routes would give, and what a gate costs that sits
one, two or three blocks ahead.

Letters: B rows, T tokens of a row, N tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

BEST, OWN, RANDOM = "best", "own", "random"
BLOCKS_AHEAD = {OWN: 0, "ahead": 1, "ahead_2": 2, "ahead_3": 3}
ROUTES = (BEST, *BLOCKS_AHEAD, RANDOM)


class _Router(nn.Module):
    """In the place of a router. best: the experts with the largest outputs, with equal weights. own: as the router.
    ahead: the router on what enters the block before, ahead_2 and ahead_3 on that of two and three blocks before; where
    there is no such block, as the router. random: any K, equal weights."""

    def __init__(self, router: Any, experts: Any, before: _Router | None, routes: str, seed: int) -> None:
        super().__init__()
        self.router, self.experts, self.routes = router, experts, routes
        self.before = (before,)  # no part of this module
        self.generator = torch.Generator().manual_seed(seed)
        self.read_ND: Tensor | None = None

    def forward(self, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.read_ND = hidden_ND
        if self.routes in BLOCKS_AHEAD:
            decides = self.blocks_before(BLOCKS_AHEAD[self.routes]) or self
            return self.router(decides.read_ND)
        logits_NE, weights_NK, ids_NK = self.router(hidden_ND)
        if self.routes == BEST:
            logits_NE = self._norms(hidden_ND)
        else:
            logits_NE = torch.rand(logits_NE.shape, generator=self.generator)
        top_k = ids_NK.shape[1]
        return logits_NE, torch.full_like(weights_NK, 1 / top_k), logits_NE.topk(top_k, dim=1).indices

    def blocks_before(self, number: int) -> _Router | None:
        found: _Router | None = self
        for _ in range(number):
            found = found and found.before[0]
        return found

    def _norms(self, hidden_ND: Tensor) -> Tensor:
        found = []
        for up, down in zip(self.experts.gate_up_proj, self.experts.down_proj, strict=True):
            gate_NH, up_NH = linear(hidden_ND, up).chunk(2, dim=-1)
            found.append(linear(self.experts.act_fn(gate_NH) * up_NH, down).norm(dim=-1))
        return torch.stack(found, dim=1)


@torch.no_grad()
def loss_of(model: Any, rows_BT: Tensor, routes: str | None = None, rows_at_once: int = 2) -> float:
    """Nats per predicted token of `rows_BT`; an upstream MoE model takes `routes`, a dense one none."""
    blocks = [layer.mlp for layer in model.model.layers]
    routers = [block.gate for block in blocks] if routes else []
    before: _Router | None = None
    try:
        for number, router in enumerate(routers):
            before = _Router(router, blocks[number].experts, before, routes or "", seed=number)
            blocks[number].gate = before
        losses = [
            model(input_ids=part_BT, labels=part_BT, use_cache=False).loss.item() * len(part_BT)
            for part_BT in rows_BT.split(rows_at_once)
        ]
    finally:
        for block, router in zip(blocks, routers, strict=False):
            block.gate = router
    return sum(losses) / len(rows_BT)


def losses_by_routes(model: Any, rows_BT: Tensor) -> dict[str, float]:
    return {routes: loss_of(model, rows_BT, routes) for routes in ROUTES}
