"""What the tests of the device-driven engine share: experts that never move, and the comparison with Hugging Face."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pregate.engine.device.sampler_state import Sampling
from pregate.engine.device.steps.t5 import StaticDecoder


class ResidentExperts:
    """The model's own experts, applied by the committed routes; notes the calls it gets. What it gives for a row that
    has ended is poison: nothing of it may reach another row."""

    def __init__(self, model: Any) -> None:
        self._experts = [b.module.experts for b in model.moe_blocks() if b.stack == "decoder"]
        self.calls: list[tuple[str, int]] = []

    def begin_step(self) -> None:
        self._routes: dict[int, tuple[Tensor, Tensor]] = {}
        self.calls.append(("begin", -1))

    def commit(self, block: int, expert_ids_BTK: Tensor, live_B: Tensor) -> None:
        assert block not in self._routes, f"block {block} was routed twice"
        self._routes[block] = expert_ids_BTK[:, 0], live_B.clone()
        self.calls.append(("commit", block))

    def run(self, block: int, hidden_BD: Tensor, weights_BK: Tensor) -> Tensor:
        ids_BK, live_B = self._routes.pop(block)
        self.calls.append(("run", block))
        out_BD = self._experts[block](hidden_BD, ids_BK, weights_BK)
        return torch.where(live_B[:, None], out_BD, torch.nan)


def decode(
    decoder: StaticDecoder, model: Any, inputs: dict[str, Tensor], sampling: Sampling, steps: int
) -> tuple[Tensor, Tensor]:
    """Tokens (B, steps + 1) and logits (steps, B, V) of a request."""
    rows = inputs["input_ids"].shape[0]
    with torch.inference_mode():
        states = model.encoder(**inputs).last_hidden_state
    decoder.begin(states, inputs["attention_mask"], sampling)
    logits = []
    for _ in range(steps):
        decoder.step(sampling.kind)
        logits.append(decoder.sampler.logits_BV[:rows].clone())
    return decoder.sampler.tokens_BT[:rows, : steps + 1].clone(), torch.stack(logits)


def assert_equal_while_live(
    got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], eos: int | None, atol: float, ties: float = 0.0
) -> int:
    """Equal tokens, and logits within `atol` as long as a row lives. Returns the number of row-steps compared.

    A row may leave the expected tokens only where its two best logits lie within `ties` of each other; what follows
    is another text then, and is not compared.
    """
    tokens, logits = got
    wanted, wanted_logits = expected
    compared = 0
    for row in range(wanted.shape[0]):
        for step in range(wanted_logits.shape[0]):
            one, other = logits[step, row], wanted_logits[step, row]
            difference = float((one - other).abs().max())
            assert difference <= atol, f"row {row} step {step}: logits differ by {difference}:\n{one}\n{other}"
            compared += 1
            mine, theirs = int(tokens[row, step + 1]), int(wanted[row, step + 1])
            if mine != theirs:
                best, second = other.topk(2).values.tolist()
                assert best - second <= ties, f"row {row} step {step}: token {mine} for {theirs}, {best} over {second}"
                break
            if theirs == eos:
                break
    return compared
