"""A block's experts from slots, several choices a token included, against a naive loop over tokens."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import silu

from pregate.config import CacheRule, Policy, SlabDtype
from pregate.engine.fetch_order import routed_experts
from pregate.engine.fetching import Fetcher
from pregate.engine.io.base import Move
from pregate.engine.io.threads import ThreadMover
from pregate.engine.offloaded_experts import FEW_ROWS, OffloadedExperts, SlotMatrices, run_of
from pregate.engine.scheduler import Scheduler
from pregate.engine.slot_cache import SlotTable
from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.trace import Counters, Trace
from pregate.models.expert_math import Factor, grouped_experts, project
from pregate.models.experts import ExpertKey, ExpertSpec, TensorSlice
from pregate.models.routing import DROPPED, Routing
from tests.engine.hostile import POISON, HostileStore, MemoryStore

D, F = 12, 20
CPU = torch.device("cpu")


def gated(matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
    """A family unlike Switch: three matrices and a gated activation."""
    gate_FD, up_FD, down_DF = matrices
    return project(silu(project(hidden_ND, gate_FD)) * project(hidden_ND, up_FD), down_DF)


def family_of(num_experts: int, top_k: int) -> ExpertSpec:
    return ExpertSpec(
        num_experts=num_experts,
        top_k=top_k,
        lookahead=0,
        matrices={"gate": (F, D), "up": (F, D), "down": (D, F)},
        layers={"decoder": [0]},
        layouts=(lambda _, layer, expert: [TensorSlice(f"{layer}.{expert}.{m}") for m in ("gate", "up", "down")],),
        apply=gated,
        activation="swiglu",
    )


class Bench(NamedTuple):
    """One block and what it is made of; `started` lists the experts whose transfers began, in order."""

    experts: OffloadedExperts
    matrices: dict[int, list[Tensor]]
    scheduler: Scheduler
    mover: ThreadMover
    counters: Counters
    started: list[int]


def make_bench(
    num_experts: int,
    top_k: int,
    num_slots: int,
    cache: CacheRule = CacheRule.none,
    stored: SlabDtype = SlabDtype.source,
    seed: int = 0,
    num_threads: int = 2,
    before_read: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Bench:
    family, generator = family_of(num_experts, top_k), torch.Generator().manual_seed(seed)
    layout = SlabLayout.of(family, dtype, stored)
    random = {
        key: [(torch.randn(s, generator=generator) / s[1] ** 0.5).to(dtype) for s in family.matrices.values()]
        for key in family.keys()  # noqa: SIM118 - not a mapping
    }
    store = MemoryStore(layout, random)
    held = {key.expert: [m.clone() for m in layout.decode(slab)] for key, slab in store.slabs.items()}
    slots_NB = aligned_bytes(num_slots * layout.slab_bytes).view(num_slots, layout.slab_bytes)
    trace, counters, started = Trace(CPU), Counters(), []
    mover: Any = ThreadMover(HostileStore(store, seed, before_read=before_read), trace, counters, num_threads)
    start = mover.start

    def poisoned_start(moves: Sequence[Move]) -> Any:
        for key, slot in moves:
            slot.fill_(POISON)
            started.append(key.expert)
        return start(moves)

    mover.start = poisoned_start
    scheduler = Scheduler(list(slots_NB), SlotTable(num_slots, cache), mover, trace, counters)
    fetcher = Fetcher(Policy.on_demand, family, scheduler)
    experts = OffloadedExperts(family, "decoder", 0, SlotMatrices(slots_NB, layout), scheduler, fetcher, trace)
    return Bench(experts, held, scheduler, mover, counters, started)


def naive(matrices: dict[int, list[Tensor]], hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    output_TD = torch.zeros_like(hidden_TD)
    for t in range(hidden_TD.shape[0]):
        for k in range(ids_TK.shape[1]):
            expert = int(ids_TK[t, k])
            if expert != DROPPED:
                output_TD[t] += weights_TK[t, k] * gated(matrices[expert], hidden_TD[t : t + 1])[0]
    return output_TD


def choices(T: int, K: int, num_experts: int, dropped: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct experts for each token (a share of them dropped), and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(T, num_experts, generator=generator).argsort(1)[:, :K]
    ids_TK = ids_TK.masked_fill(torch.rand(T, K, generator=generator) < dropped, DROPPED)
    return torch.randn(T, D, generator=generator), ids_TK, torch.rand(T, K, generator=generator)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5), f"engine:\n{got}\nnaive loop:\n{expected}"


def test_in_half_precision_a_cpu_computes_few_numbers_of_rows() -> None:
    """Rows of neighbours fill up, and their results are not used."""
    bench, computed, asked = make_bench(6, 2, 3, dtype=torch.bfloat16), [], []

    def counted(matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
        computed.append(len(hidden_ND))
        return gated(matrices, hidden_ND)

    bench.experts._family, bench.experts.few_sizes = replace(bench.experts._family, apply=counted), True
    wide = {expert: [matrix.float() for matrix in held] for expert, held in bench.matrices.items()}
    try:
        for T in (*range(2, 9), *range(40, 400, 24)):
            hidden_TD, ids_TK, weights_TK = choices(T, 2, 6, 0.1, T)
            hidden_TD = hidden_TD.bfloat16()
            asked += ids_TK[ids_TK != DROPPED].unique(return_counts=True)[1].tolist()
            found = bench.experts(hidden_TD, ids_TK, weights_TK)
            assert found.dtype is torch.bfloat16
            torch.testing.assert_close(
                found.float(), naive(wide, hidden_TD.float(), ids_TK, weights_TK), rtol=0.05, atol=0.05
            )
    finally:
        bench.mover.close()
    assert len(computed) == len(asked) and sum(computed) > sum(asked)
    many, few = ({rows for rows in each if rows > FEW_ROWS} for each in (asked, computed))
    assert len(few) <= 12 < len(many) and {rows for rows in asked if rows <= FEW_ROWS} <= set(computed)


@pytest.mark.parametrize("first", [0, 5, 700])
def test_the_rows_that_are_computed_hold_those_that_are_wanted(first: int) -> None:
    for rows in range(1, 1000):
        for all_rows in (first + rows, first + rows + 9, 5000):
            begin, end = run_of(first, first + rows, all_rows)
            assert 0 <= begin <= first and first + rows <= end <= all_rows
            assert end - begin <= max(rows * 9 / 8, rows + FEW_ROWS)
    assert len({run_of(0, rows, 10**6)[1] for rows in range(FEW_ROWS + 1, 4097)}) <= 50


@given(
    T=st.one_of(st.just(1), st.integers(2, 12), st.just(200)),
    K=st.integers(1, 3),
    num_experts=st.integers(3, 6),
    num_slots=st.integers(1, 6),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    cache=st.sampled_from(list(CacheRule)),
    stored=st.sampled_from(list(SlabDtype)),
    seed=st.integers(0, 2**16),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=60)
def test_random_choices_equal_a_naive_loop(
    T: int, K: int, num_experts: int, num_slots: int, dropped: float, cache: CacheRule, stored: SlabDtype, seed: int
) -> None:
    bench = make_bench(num_experts, K, num_slots, cache, stored, seed)
    try:
        for step in range(2):
            hidden_TD, ids_TK, weights_TK = choices(T, K, num_experts, dropped, seed + step)
            bench.started.clear()
            got = bench.experts(hidden_TD, ids_TK, weights_TK)
            assert_close(got, naive(bench.matrices, hidden_TD, ids_TK, weights_TK))
            resident = grouped_experts(
                hidden_TD, ids_TK, weights_TK, num_experts, lambda e, x: gated(bench.matrices[e], x)
            )
            assert torch.equal(got, resident), f"engine:\n{got}\nresident:\n{resident}"
            needed = set(ids_TK.flatten().tolist()) - {DROPPED}
            # each once, whatever the number of tokens; without a cache every time anew
            assert len(bench.started) == len(set(bench.started)), bench.started
            assert set(bench.started) <= needed
            if step == 0 or cache is CacheRule.none:
                assert set(bench.started) == needed
        assert bench.counters.bytes_moved == bench.counters.misses * bench.experts._matrices._layout.slab_bytes
    finally:
        bench.mover.close()


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("T", [1, 5])
def test_no_kept_choice_moves_nothing(T: int, K: int) -> None:
    bench = make_bench(4, K, 2)
    got = bench.experts(torch.randn(T, D), torch.full((T, K), DROPPED), torch.rand(T, K))
    assert torch.equal(got, torch.zeros(T, D)), got
    assert bench.counters.misses == 0
    bench.mover.close()


def test_no_tokens_at_all() -> None:
    bench = make_bench(4, 2, 2)
    empty = torch.empty(0, 2)
    assert bench.experts(torch.empty(0, D), empty.long(), empty).shape == (0, D)
    bench.mover.close()


def test_the_most_used_experts_are_fetched_first() -> None:
    hidden_TD, _, weights_TK = choices(9, 1, 5, 0.0, 0)
    ids_TK = torch.tensor([4, 2, 2, 0, 0, 0, 4, 0, DROPPED])[:, None]
    for num_slots in (1, 2, 5):
        bench = make_bench(5, 1, num_slots)
        bench.experts(hidden_TD, ids_TK, weights_TK)
        assert bench.started == [0, 2, 4], f"{num_slots} slots: {bench.started}"
        bench.mover.close()


def test_what_is_here_is_computed_while_the_rest_travels() -> None:
    """The read of the most used expert is held back until the cached one has been computed."""
    computed = threading.Event()
    in_time: list[bool] = []

    def hold_back(_: int, key: ExpertKey) -> None:
        if key.expert == 0:
            in_time.append(computed.wait(120))

    bench = make_bench(3, 1, 3, CacheRule.lru, num_threads=1, before_read=hold_back)
    hidden_TD, _, weights_TK = choices(6, 1, 3, 0.0, 0)
    bench.experts(hidden_TD, torch.ones(6, 1, dtype=torch.long), weights_TK)
    release = bench.scheduler.release

    def told(key: ExpertKey) -> None:
        release(key)
        if key.expert == 1:
            computed.set()

    bench.scheduler.release = told  # type: ignore[method-assign]
    ids_TK = torch.tensor([0, 0, 0, 0, 1, 0])[:, None]
    assert_close(bench.experts(hidden_TD, ids_TK, weights_TK), naive(bench.matrices, hidden_TD, ids_TK, weights_TK))
    assert in_time == [True]
    bench.mover.close()


def test_routed_experts_lists_each_once_most_used_first() -> None:
    ids_BTK = torch.tensor([[[3, 1], [1, 0]], [[1, DROPPED], [0, 4]]])
    routing = Routing(ids_BTK, torch.ones(ids_BTK.shape), torch.empty(0))
    counts = Counter(ids_BTK.flatten().tolist())
    routed = routed_experts(routing)
    assert sorted(routed) == [0, 1, 3, 4]
    assert [counts[expert] for expert in routed] == [3, 2, 1, 1]
    only = Routing(torch.full((1, 1, 1), 2), torch.ones(1, 1, 1), torch.empty(0))
    assert routed_experts(only) == [2]
    dropped = Routing(torch.full((1, 1, 1), DROPPED), torch.ones(1, 1, 1), torch.empty(0))
    assert routed_experts(dropped) == []
