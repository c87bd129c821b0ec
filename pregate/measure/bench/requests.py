"""The requests that every server of a benchmark is given, and how many of them are timed.

Every request is a new random prompt, decoded greedily without ever repeating a token: random weights would decode into
a loop, and a repeated prompt would find its experts where it left them; both would flatter a cache. The prompts are the
same for every row, so that all rows decode the same tokens. Knows prompts and clocks; knows nothing about servers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pregate.measure.bench.grid import RowSpec
from pregate.measure.request_timing import Timed
from pregate.measure.servers import Inputs

NEVER_AGAIN = 1e6
"""`repetition_penalty`: a token's own logit is by far its largest in a random model with tied embeddings."""
WARM_UP = 10_000
"""Numbers of warm-up requests, away from those that are measured."""


def greedy(new_tokens: int) -> dict[str, Any]:
    """Options of `generate` for so many new tokens whatever their ends."""
    length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    return {"do_sample": False, "num_beams": 1, "repetition_penalty": NEVER_AGAIN, **length}


@dataclass(frozen=True)
class Requests:
    """Random prompts (batch, prompt_len), numbered; each number is another prompt."""

    batch: int
    prompt_len: int
    vocab_size: int
    seed: int
    device: torch.device

    @classmethod
    def of(cls, spec: RowSpec, vocab_size: int, device: torch.device) -> Requests:
        return cls(spec.batch, spec.prompt_len, vocab_size, spec.seed, device)

    def prompt(self, number: int) -> Inputs:
        draw = torch.Generator().manual_seed(self.seed + number)
        ids = torch.randint(2, self.vocab_size, (self.batch, self.prompt_len), generator=draw).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Effort:
    """How much is measured: repeats after warm-up requests, none begun after `max_seconds`."""

    repeats: int
    warmup: int
    max_seconds: float

    def run(self, serve: Callable[[int], Timed], probe: Callable[[], None] = lambda: None) -> list[Timed]:
        """`probe` is called before each request and after the last."""
        begun, timed = time.perf_counter(), []
        while len(timed) < self.repeats and (not timed or time.perf_counter() - begun < self.max_seconds):
            probe()
            timed.append(serve(len(timed)))
        probe()
        return timed
