"""What an engine counts, traces, accepts and refuses. That it computes what the model computes: test_equality."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import CacheRule, Drive, Policy, SlabDtype, Tier, UsageError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.engine.trace import Trace
from pregate.models.loading import load_resident
from tests.engine.serving import OFFLOADED, SLAB, Served, assert_same, generated, lasting, request
from tests.tiny import batch, pregated_model

DECODER_STEPS, BLOCKS = 5, 3


def test_counters_are_of_what_moved(served: Served) -> None:
    """One token a step: a block needs one expert, and prefetch_all moves five for it."""
    moved = {}
    for policy in Policy:
        with OffloadEngine.open(served.directory, policy=policy, tier=Tier.disk) as engine:
            generated(engine.generate, request(1, new_tokens=DECODER_STEPS))
            counters = engine.counters
            assert counters.bytes_moved == counters.bytes_read == counters.misses * SLAB
            assert counters.evictions == counters.host_hits == 0
            moved[policy] = counters.misses
    assert moved[Policy.gpu_only] == 0
    decoder = DECODER_STEPS * BLOCKS
    assert decoder + BLOCKS <= moved[Policy.on_demand] <= decoder + BLOCKS * 5
    assert moved[Policy.pre_gated] == moved[Policy.on_demand]
    assert moved[Policy.prefetch_all] == 5 * (decoder + BLOCKS)


@pytest.mark.parametrize("policy", OFFLOADED)
def test_a_cache_of_everything_moves_each_expert_once(served: Served, policy: Policy) -> None:
    with OffloadEngine.open(served.directory, policy=policy, device_budget="100%", cache=CacheRule.lru) as engine:
        generated(engine.generate, request(2))
        first = engine.counters.to_dict()
        assert 0 < first["misses"] <= 30
        generated(engine.generate, request(2))
        second = engine.counters.to_dict()
        assert second["misses"] == first["misses"]
        assert second["evictions"] == 0
        assert second["hits"] > first["hits"] > 0
        engine.reset_counters()
        assert set(engine.counters.to_dict().values()) == {0}


def test_a_host_budget_saves_reads_of_the_disk(served: Served) -> None:
    """Room for all experts: from the second request on nothing is read, and just as much moves."""
    options = request(2)
    with OffloadEngine.open(served.directory, tier=Tier.disk, host_budget="100%") as engine:
        generated(engine.generate, options)
        read = engine.counters.bytes_read
        assert engine.counters.bytes_moved == read + engine.counters.host_hits * SLAB
        engine.reset_counters()
        generated(engine.generate, options)
        assert engine.counters.bytes_read == 0
        assert engine.counters.bytes_moved == engine.counters.host_hits * SLAB > 0
        assert engine.expected_bytes()["staging"] == 30 * SLAB


def test_a_host_budget_means_nothing_where_the_experts_are_in_host_memory(served: Served) -> None:
    with OffloadEngine.open(served.directory, tier=Tier.dram, host_budget="100%") as engine:
        generated(engine.generate, request(1))
        assert engine.expected_bytes()["staging"] == engine.counters.host_hits == 0


def test_expected_bytes_follow_from_the_geometry(served: Served) -> None:
    """The model's own count of parameters, less the experts."""
    experts = {id(p) for block in served.model.moe_blocks() for p in block.module.experts.parameters()}
    rest = {id(p): p.nbytes for p in served.model.parameters() if id(p) not in experts}
    with OffloadEngine.open(served.directory, device_budget="40%") as engine:
        assert engine.expected_bytes() == {
            "non_expert": sum(rest.values()),
            "slots": 12 * SLAB,
            "scratch": 0,
            "staging": 0,
        }
    with OffloadEngine.open(served.directory, device_budget="40%", slab_dtype=SlabDtype.int8) as engine:
        assert engine.expected_bytes()["slots"] == 12 * SLAB // 2
        assert engine.expected_bytes()["scratch"] == 2 * 20 * 28 * 4


@pytest.mark.parametrize(("policy", "fetched_in"), [(Policy.pre_gated, 1), (Policy.on_demand, 2)])
def test_pre_gating_moves_slabs_while_the_block_before_computes(
    served: Served, policy: Policy, fetched_in: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the trace; an expert computes until every fetch that was begun beside it is over."""

    def slow(matrices: Any, hidden_ND: Tensor) -> Tensor:
        for transfer in list(engine.host.scheduler._transfers.values()):
            transfer.wait()
        return served.model.get_parameter("lm_head.weight").new_zeros(hidden_ND.shape)

    with OffloadEngine.open(served.directory, policy=policy, tier=Tier.dram) as engine:
        for block in engine.model.moe_blocks():
            monkeypatch.setattr(block.module.experts, "_family", replace(engine.family, apply=slow))
        engine.trace.start()
        generated(engine.generate, request(1))
        spans = engine.trace.stop()
    layers = [s for s in spans if s.lane == "layer" and s.name == f"decoder block {fetched_in}"]
    fetches = [s for s in spans if s.lane == "transfer" and s.name.startswith("decoder block 2")]
    assert len(layers) == len(fetches) == DECODER_STEPS
    for layer, fetch in zip(layers, fetches, strict=True):
        assert layer.start_ms < fetch.start_ms < layer.end_ms, f"{fetch} is not in {layer}"


def test_mixed_precision_weights_are_served_in_the_configs_dtype(tmp_path: Path) -> None:
    """As the resident model opens them: experts stored in bf16 under a float32 config compute in float32."""
    model = pregated_model(5, 1)
    for block in model.moe_blocks():
        block.module.experts.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    expected = generated(load_resident(tmp_path).generate, request(2))
    with OffloadEngine.open(tmp_path) as engine:
        assert engine.model.dtype is torch.float32
        assert_same(generated(engine.generate, request(2)), expected, rtol=1e-4, atol=1e-5)


def test_settings_may_be_given_by_name(served: Served) -> None:
    expected = generated(served.model.generate, request(1))
    names = {"policy": "prefetch_all", "tier": "dram", "cache": "lfu", "slab_dtype": "source", "device": "cpu"}
    with OffloadEngine.open(str(served.directory), **names) as engine:  # type: ignore[arg-type]
        assert_same(generated(engine.generate, request(1)), expected)
        host: Any = engine.host
        assert engine.policy is Policy.prefetch_all and host.scheduler._table._rule is CacheRule.lfu
        assert host.mover._store.in_host_memory and engine.counters.bytes_moved > 0


def test_an_engine_computes_in_another_dtype_than_its_experts_have(tmp_path: Path) -> None:
    pregated_model(3).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = load_resident(tmp_path, dtype=torch.float32).eval()
    assert expected.dtype is torch.float32
    with OffloadEngine.open(tmp_path, tier=Tier.dram, device_budget="40%", dtype=torch.float32) as engine:
        with torch.inference_mode():
            got, wanted = (forward(**batch(3)).logits for forward in (engine.forward, expected))
        assert engine.counters.bytes_moved > 0 and engine.host.matrices[0][0].dtype is torch.bfloat16
    assert got.dtype is torch.float32 and torch.equal(got, wanted) and wanted.isfinite().all()
    with pytest.raises(UsageError, match="use drive=host"):
        OffloadEngine.open(tmp_path, drive="device", dtype=torch.float32)


@pytest.mark.parametrize("drive", ["device", Drive.device])
def test_one_opening_serves_either_drive(served: Served, drive: Drive) -> None:
    expected = generated(served.model.generate, request(2))
    names = {"policy": "pre_gated", "cache": "lru", "tier": "dram", "device_budget": "50%"}
    with OffloadEngine.open(served.directory, drive=drive, batch=2, max_new_tokens=5, **names) as engine:
        assert isinstance(engine, DeviceEngine)
        assert_same(generated(engine.generate, request(2)), expected, rtol=1e-4, atol=1e-5)
        assert engine.counters.bytes_moved > 0
    with OffloadEngine.open(served.directory, drive="host") as engine:
        assert isinstance(engine, OffloadEngine)
    with pytest.raises(ValueError, match="nobody"):
        OffloadEngine.open(served.directory, drive="nobody")


def test_opened_under_inference_mode_it_serves_as_well(served: Served) -> None:
    expected = generated(served.model.generate, request(1))
    for slab_dtype in (SlabDtype.source, SlabDtype.int8):
        with torch.inference_mode():
            engine = OffloadEngine.open(served.directory, slab_dtype=slab_dtype, host_budget="10%")
        tokens, logits = generated(engine.generate, request(1))
        if slab_dtype is SlabDtype.source:
            assert_same((tokens, logits), expected)
        assert logits.isfinite().all()
        assert engine.forward(**batch(3)).logits.isfinite().all()
        assert not any(tensor.is_inference() for tensor in lasting(engine))
        engine.close()


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'t5' model"):
        OffloadEngine.open(tmp_path)


def test_weights_of_another_shape_than_the_config_are_refused(tmp_path: Path) -> None:
    pregated_model(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_heads": 4}))
    with pytest.raises(UsageError, match=r"holds .*\.weight of shape \(.*\), not \(.*\): use the complete weights"):
        OffloadEngine.open(tmp_path)


def test_a_disabled_trace_records_nothing() -> None:
    trace = Trace(torch.device("cpu"))
    with trace.span("compute", "x"):
        pass
    trace.start()
    with trace.span("compute", "y"):
        pass
    assert [span.name for span in trace.stop()] == ["y"]
