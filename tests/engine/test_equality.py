"""Every model, policy, cache, tier, slab dtype, batch and budget gives the resident model's tokens and logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from pregate.config import CacheRule, Policy, SlabDtype, Tier
from pregate.engine.engine import OffloadEngine
from pregate.engine.io import threads
from pregate.engine.opening import open_store
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.family import experts_of
from pregate.models.loading import load_resident
from tests.engine.hostile import HostileStore, poison_slots
from tests.engine.serving import Served, as_stored, assert_same, generated, request, saved
from tests.tiny import batch, upstream_model

bounded = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@st.composite
def models(draw: st.DrawFn) -> tuple[tuple[str, Any], ...]:
    """Options of `pregated_model`, hashable."""
    stacks = draw(st.sampled_from([("encoder", "decoder"), ("decoder",)]))
    blocks = {"encoder": draw(st.integers(2, 3)), "decoder": draw(st.integers(2, 4))}
    step = draw(st.sampled_from([1, 2]))
    most_ahead = min(3, *(blocks[stack] - 1 for stack in stacks))
    options = {
        "seed": draw(st.integers(0, 3)),
        "stacks": stacks,
        "lookahead": draw(st.integers(0, most_ahead)),
        "entry": draw(st.sampled_from(["own", "embedding"])),
        "num_experts": draw(st.integers(2, 6)),
        "num_layers": step * blocks["encoder"],
        "num_decoder_layers": step * blocks["decoder"],
        "num_sparse_encoder_layers": blocks["encoder"],
        "num_sparse_decoder_layers": blocks["decoder"],
        "expert_capacity": draw(st.sampled_from([64, 2])),
    }
    return tuple(options.items())


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `OffloadEngine.open`; the budgets as shares of all experts, 0 for a single one."""
    policy = draw(st.sampled_from(list(Policy)))
    shares = st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.just(1.0))
    tier = draw(st.sampled_from([Tier.dram, Tier.disk]))
    return {
        "policy": policy,
        "cache": draw(st.sampled_from(list(CacheRule))),
        "tier": tier,
        "slab_dtype": draw(st.sampled_from([SlabDtype.source, SlabDtype.source, SlabDtype.int8, SlabDtype.fp8])),
        "device_budget": 1.0 if policy is Policy.gpu_only else draw(st.one_of(st.none(), shares)),
        "host_budget": draw(st.one_of(st.none(), shares)),
        "io_threads": draw(st.integers(1, 3)),
    }


def num_bytes(share: float | None, num_experts: int, slab_bytes: int) -> str | None:
    return None if share is None else str(max(1, round(share * num_experts)) * slab_bytes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def logits(forward: Any, seed: int, size: int) -> Tensor:
    """Of a whole target at once: the decoder's blocks see many tokens."""
    with torch.inference_mode():
        return forward(**batch(seed, size=size)).logits


@given(
    model=models(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    engine=engines(),
    size=st.integers(1, 4),
    num_beams=st.integers(1, 2),
    seed=st.integers(0, 2**16),
)
@bounded
def test_every_engine_equals_the_resident_model(
    root: Path,
    model: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
    engine: dict[str, Any],
    size: int,
    num_beams: int,
    seed: int,
) -> None:
    """Behind a store that takes its time, with slots that lose what they held the moment they are given away. On a
    CPU every logit is equal bit for bit: the weights lie at the same alignment on both sides."""
    directory, resident = saved(root, model, dtype)
    family = experts_of(resident.config)
    layout = SlabLayout.of(family, dtype, engine["slab_dtype"])
    expected = as_stored(resident, layout) if layout.is_quantised else resident
    options = request(size, num_beams, seed)
    budgets = {
        name: num_bytes(engine[name], len(family.keys()), layout.slab_bytes)
        for name in ("device_budget", "host_budget")
    }
    store = HostileStore(open_store(directory, tier=engine["tier"], slab_dtype=engine["slab_dtype"]), seed)
    rest = {name: engine[name] for name in ("policy", "cache", "io_threads")}
    with OffloadEngine.open(directory, store=store, **rest, **budgets) as served:
        poison_slots(served)
        wanted = generated(expected.generate, options)
        for _ in range(2):
            assert_same(generated(served.generate, options), wanted)
        one, other = logits(served.forward, seed, size), logits(expected, seed, size)
        assert torch.equal(one, other), f"engine:\n{one}\nresident:\n{other}"
        assert served.counters.bytes_moved == served.counters.misses * served.slab_bytes
        if budgets["device_budget"] is not None:
            assert served.expected_bytes()["slots"] <= int(budgets["device_budget"])
    store.close()


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("tier", [Tier.dram, Tier.disk])
def test_the_engine_equals_the_model_as_transformers_loads_it(served: Served, policy: Policy, tier: Tier) -> None:
    """From the same files; there the weights may lie at other alignments, where sums round differently."""
    expected = load_resident(served.directory)
    with OffloadEngine.open(served.directory, policy=policy, tier=tier) as engine:
        for options in (request(1), request(4, num_beams=3), request(2, sample=True)):
            got = generated(engine.generate, options, seed=1)
            assert_same(got, generated(expected.generate, options, seed=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", [Policy.on_demand, Policy.prefetch_all, Policy.pre_gated])
def test_a_conventional_model_too(tmp_path: Path, policy: Policy) -> None:
    upstream_model(4).save_pretrained(tmp_path)
    expected, options = load_resident(tmp_path), request(3)
    with OffloadEngine.open(tmp_path, policy=policy, device_budget="20%") as engine:
        assert_same(generated(engine.generate, options), generated(expected.generate, options), rtol=1e-4, atol=1e-5)


def test_withheld_data_is_noticed(served: Served) -> None:
    """The poison reaches tokens and logits, so the tests above can fail."""
    options = request(2)
    store = HostileStore(open_store(served.directory), withhold=True)
    with OffloadEngine.open(served.directory, store=store) as engine:
        tokens, logits = generated(engine.generate, options)
    store.close()
    expected = generated(served.model.generate, options)
    assert not torch.equal(tokens, expected[0]), tokens
    assert logits.isnan().all(), logits


@pytest.mark.parametrize("policy", [Policy.on_demand, Policy.prefetch_all, Policy.pre_gated])
def test_computing_before_a_slab_has_arrived_is_noticed(
    served: Served, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mover whose transfers say that they are over when they have just begun gives NaN here."""
    monkeypatch.setattr(threads._JobTransfer, "wait", lambda transfer: None)
    options = request(2)
    store = HostileStore(open_store(served.directory), most_s=0.005)
    with OffloadEngine.open(served.directory, store=store, policy=policy, device_budget="20%") as engine:
        poison_slots(engine)
        _, logits = generated(engine.generate, options)
    store.close()
    assert logits.isnan().any(), logits


@pytest.mark.gpu
@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("tier", [Tier.dram, Tier.disk])
@pytest.mark.parametrize("cache", [CacheRule.none, CacheRule.lru])
@pytest.mark.parametrize("slab_dtype", list(SlabDtype))
@pytest.mark.parametrize("budget", ["one", "40%", None])
def test_on_a_gpu(
    served: Served, policy: Policy, tier: Tier, cache: CacheRule, slab_dtype: SlabDtype, budget: str | None
) -> None:
    layout = SlabLayout.of(experts_of(served.model.config), torch.float32, slab_dtype)
    expected = as_stored(served.model, layout).cuda()
    budget = None if policy is Policy.gpu_only else str(layout.slab_bytes) if budget == "one" else budget
    with OffloadEngine.open(
        served.directory,
        policy=policy,
        tier=tier,
        device="cuda",
        device_budget=budget,
        host_budget="50%" if cache is CacheRule.lru else None,
        cache=cache,
        slab_dtype=slab_dtype,
    ) as engine:
        poison_slots(engine)
        for options in (request(3), request(1), request(2, num_beams=2)):
            options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
            got = generated(engine.generate, options)
            assert_same(got, generated(expected.generate, options), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_behind_a_hostile_store(served: Served) -> None:
    """Slabs pass through page-locked buffers, a few of them for all experts, while the kernels run."""
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in request(3).items()}
    expected = generated(copy.deepcopy(served.model).cuda().generate, options)
    store = HostileStore(open_store(served.directory))
    for budget in ("8192", "30%", "100%"):
        with OffloadEngine.open(
            served.directory, store=store, device="cuda", device_budget=budget, cache=CacheRule.lru, io_threads=3
        ) as engine:
            poison_slots(engine)
            for _ in range(3):
                assert_same(generated(engine.generate, options), expected, rtol=1e-4, atol=1e-5)
    store.close()
