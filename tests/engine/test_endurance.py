"""A thousand generations in a row leave threads, open files and memory where they were."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch

from pregate.config import CacheRule, Policy, Tier
from pregate.engine.engine import OffloadEngine
from tests.engine.serving import needs_io_uring
from tests.tiny import batch, pregated_model

GROWTH_BYTES = 4 << 20
"""Far less than a leak of one slab or of a step's activations in each of eight hundred generations would take."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("host_budget", ["30%", pytest.param(None, marks=needs_io_uring)])
def test_a_thousand_generations_leave_everything_where_it_was(tmp_path: Path, host_budget: str | None) -> None:
    """With a host budget threads read, without one the kernel does."""
    small = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    model = pregated_model(3, lookahead=1, **small)
    model.save_pretrained(tmp_path)
    inputs = {name: value for name, value in batch(0, size=1).items() if name != "labels"}
    options = {**inputs, "max_new_tokens": 2, "eos_token_id": None, "do_sample": False, "repetition_penalty": 1e6}
    expected = model.generate(**options)
    process = psutil.Process()
    with OffloadEngine.open(
        tmp_path,
        policy=Policy.pre_gated,
        tier=Tier.disk,
        device_budget="30%",
        host_budget=host_budget,
        cache=CacheRule.lru,
        io_threads=3,
    ) as engine:
        for number in range(1, 1001):
            tokens = engine.generate(**options)
            assert torch.equal(tokens, expected), f"generation {number}: {tokens} instead of {expected}"
            if number == 200:
                gc.collect()
                before = process.num_threads(), process.num_fds()
                memory = process.memory_info().rss
        gc.collect()
        assert (process.num_threads(), process.num_fds()) == before
        grown = process.memory_info().rss - memory
        assert engine.counters.misses > 800, "nothing moved"
        assert grown < GROWTH_BYTES, f"{grown} bytes more after 1,000 generations than after 200"
