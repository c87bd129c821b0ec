"""The engine gives the resident model's tokens: every policy, tier and batch size, against a hostile mover."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import CacheRule, Policy, Tier, UsageError
from pregate.engine.decode import OffloadEngine
from pregate.engine.slabs import aligned_bytes
from pregate.engine.store import DiskStore, DramStore
from pregate.models.adapter import ExpertKey
from pregate.models.switch import load_resident
from tests.tiny import batch, pregated_model, upstream_model

OFFLOADED = [Policy.on_demand, Policy.prefetch_all, Policy.pre_gated]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    for name, options in {
        "one": {"lookahead": 1},
        "two": {"lookahead": 2, "entry": "embedding"},
        "decoder_only_ahead": {"lookahead": 1, "stacks": ("decoder",)},
        "tight_capacity": {"lookahead": 1, "expert_capacity": 2},
    }.items():
        pregated_model(3, **options).save_pretrained(root / name)  # type: ignore[arg-type]
    upstream_model(4).save_pretrained(root / "conventional")
    return {path.name: path for path in root.iterdir()}


def options(size: int, num_beams: int) -> dict[str, Any]:
    inputs = batch(size, size=size)
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "num_beams": num_beams,
        "do_sample": False,
        "max_new_tokens": 6,
        "eos_token_id": None,
    }


def resident(directory: Path, request: dict[str, Any]) -> Tensor:
    return load_resident(directory).generate(**request)


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("tier", [Tier.dram, Tier.disk])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_tokens_equal_the_resident_model(
    checkpoints: dict[str, Path], policy: Policy, tier: Tier, size: int, num_beams: int
) -> None:
    request = options(size, num_beams)
    expected = resident(checkpoints["one"], request)
    with OffloadEngine.open(checkpoints["one"], policy=policy, tier=tier) as engine:
        assert torch.equal(engine.generate(**request), expected)
        assert torch.equal(engine.generate(**request), expected), "a second request differs"


@pytest.mark.parametrize("name", ["two", "decoder_only_ahead", "tight_capacity", "conventional"])
@pytest.mark.parametrize("policy", OFFLOADED)
def test_other_models_too(checkpoints: dict[str, Path], name: str, policy: Policy) -> None:
    request = options(3, 1)
    with OffloadEngine.open(checkpoints[name], policy=policy) as engine:
        assert torch.equal(engine.generate(**request), resident(checkpoints[name], request))


def make_hostile(engine: OffloadEngine, delay: Any) -> None:
    """Fill every slot with NaN before its transfer starts, and let transfers take their time."""
    start, read = engine._mover.start, engine._mover._store.read_into

    def poisoned_start(key: ExpertKey, slot: Tensor) -> Any:
        slot.view(torch.float32).fill_(float("nan"))
        return start(key, slot)

    def slow_read(key: ExpertKey, slab: Tensor) -> None:
        time.sleep(delay())
        half = slab.numel() // 2
        whole = aligned_bytes(slab.numel())
        read(key, whole)
        slab[:half].copy_(whole[:half])
        time.sleep(delay())
        slab[half:].copy_(whole[half:])

    engine._mover.start = poisoned_start  # type: ignore[method-assign]
    engine._mover._store.read_into = slow_read  # type: ignore[method-assign]


@pytest.mark.parametrize("policy", OFFLOADED)
@pytest.mark.parametrize("budget", ["8192", "24576", "30%", None])
@pytest.mark.parametrize("cache", [CacheRule.none, CacheRule.lru])
def test_poisoned_slots_and_a_slow_mover_change_nothing(
    checkpoints: dict[str, Path], policy: Policy, budget: str | None, cache: CacheRule
) -> None:
    """Budgets go down to a single slot: an expert here takes 8,192 bytes."""
    name = "two" if budget == "30%" else "one"
    draw = random.Random(0)
    request = options(2, 2 if cache is CacheRule.lru else 1)
    with OffloadEngine.open(checkpoints[name], policy=policy, device_budget=budget, cache=cache) as engine:
        assert engine.slab_bytes == 8192
        make_hostile(engine, lambda: draw.choice([0.0, 0.0, 0.001, 0.003]))
        assert torch.equal(engine.generate(**request), resident(checkpoints[name], request))


def test_the_poison_would_be_noticed(checkpoints: dict[str, Path]) -> None:
    """The same hostility without the data does change the output, so the test above can fail."""
    request = options(2, 1)
    with OffloadEngine.open(checkpoints["one"]) as engine:
        make_hostile(engine, lambda: 0.0)
        engine._mover._store.read_into = lambda key, slab: None  # type: ignore[method-assign]
        start = engine._mover.start
        engine._mover.start = lambda key, slot: start(key, slot)  # type: ignore[method-assign]
        assert not torch.equal(engine.generate(**request), resident(checkpoints["one"], request))


def test_counters_are_of_what_moved(checkpoints: dict[str, Path]) -> None:
    request = options(1, 1)
    moved = {}
    for policy in Policy:
        with OffloadEngine.open(checkpoints["one"], policy=policy) as engine:
            engine.generate(**request)
            counters = engine.counters
            assert counters.bytes_moved == counters.misses * engine.slab_bytes
            moved[policy] = counters.misses
    assert moved[Policy.gpu_only] == 0
    assert moved[Policy.on_demand] == moved[Policy.pre_gated]
    # encoder once and six decoder steps, each of three blocks with five experts
    assert moved[Policy.prefetch_all] == 7 * 3 * 5


def test_a_cache_of_everything_moves_each_expert_once(checkpoints: dict[str, Path]) -> None:
    request = options(2, 1)
    with OffloadEngine.open(checkpoints["one"], device_budget="100%", cache=CacheRule.lru) as engine:
        engine.generate(**request)
        first = engine.counters.misses
        assert 0 < first <= 30
        engine.generate(**request)
        assert engine.counters.misses == first
        assert engine.counters.hits > 0


def test_pre_gating_moves_slabs_while_earlier_blocks_compute(checkpoints: dict[str, Path]) -> None:
    """In the trace, the fetch for a decoder block begins before the block ahead of it has ended."""
    with OffloadEngine.open(checkpoints["one"], policy=Policy.pre_gated, tier=Tier.dram) as engine:
        engine.trace.start()
        engine.generate(**options(1, 1))
        spans = engine.trace.stop()
    layers = {s.name: s for s in spans if s.lane == "layer"}
    last_layer = layers["decoder block 1"]
    fetches = [s for s in spans if s.lane == "transfer" and s.name.startswith("decoder block 2")]
    assert any(s.start_ms < last_layer.end_ms for s in fetches if s.start_ms > last_layer.start_ms)


@pytest.mark.parametrize("store", [DramStore, DiskStore])
def test_a_failed_read_is_raised_and_the_engine_recovers(checkpoints: dict[str, Path], store: type) -> None:
    request = options(2, 1)
    tier = Tier.disk if store is DiskStore else Tier.dram
    with OffloadEngine.open(checkpoints["one"], tier=tier, cache=CacheRule.lru, device_budget="50%") as engine:
        assert isinstance(engine._mover._store, store)
        read = engine._mover._store.read_into
        calls = iter(range(1000))

        def failing(key: ExpertKey, slab: Tensor) -> None:
            if next(calls) == 9:
                raise OSError("the disk is gone")
            read(key, slab)

        engine._mover._store.read_into = failing  # type: ignore[method-assign]
        with pytest.raises(OSError, match="the disk is gone"):
            engine.generate(**request)
        assert torch.equal(engine.generate(**request), resident(checkpoints["one"], request))


def test_mixed_precision_weights_are_served_in_the_configs_dtype(tmp_path: Path) -> None:
    """As the resident model opens them: experts stored in bf16 under a float32 config compute in float32."""
    model = pregated_model(5, 1)
    for block in model.moe_blocks():
        block.module.experts.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    request = options(2, 1)
    with OffloadEngine.open(tmp_path) as engine:
        assert engine.model.dtype is torch.float32
        assert torch.equal(engine.generate(**request), resident(tmp_path, request))


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'t5' model"):
        OffloadEngine.open(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("tier", [Tier.dram, Tier.disk])
@pytest.mark.parametrize("budget", ["8192", "40%", None])
def test_tokens_equal_the_resident_model_on_a_gpu(
    checkpoints: dict[str, Path], policy: Policy, tier: Tier, budget: str | None
) -> None:
    request = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options(3, 1).items()}
    expected = load_resident(checkpoints["one"]).cuda().generate(**request)
    budget = None if policy is Policy.gpu_only else budget
    with OffloadEngine.open(
        checkpoints["one"], policy=policy, tier=tier, device="cuda", device_budget=budget
    ) as engine:
        for _ in range(2):
            assert torch.equal(engine.generate(**request), expected)
