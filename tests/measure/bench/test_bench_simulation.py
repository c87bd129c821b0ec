"""The virtual clock against hand-computed timelines, and the planner's figures where they can be known exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pregate.cli import compose_run
from pregate.config import CacheRule, Policy
from pregate.engine.io.base import Move
from pregate.engine.trace import Counters, Span
from pregate.measure.bench.advice import advice
from pregate.measure.bench.models import bench_models
from pregate.measure.bench.simulated_routes import Load
from pregate.measure.bench.simulation import Clock, Durations, Predicted, VirtualMover, simulate
from pregate.measure.bench.step_times import FEW_EXPERTS, durations, few_experts, shallow, stretched
from pregate.measure.request_timing import Timed
from pregate.models.experts import ExpertKey, ExpertSpec
from pregate.models.family import experts_of
from pregate.models.pregating import PreGating
from tests.tiny import pregated_model

BLOCKS = 3
SLAB = 8192


def times(**changes: Any) -> Durations:
    parts = {"before_block": (4.0,) * BLOCKS, "expert": 1.0, "after_blocks": 5.0, "slab": 3.0, **changes}
    return Durations(**parts)


def served(policy: Policy, given: Durations, gating: PreGating, slots: int = 6, **changes: Any) -> Predicted:
    family: ExpertSpec = experts_of(pregated_model(0, gating.lookahead, entry=gating.entry).config)
    settings: dict[str, Any] = {
        "policy": policy,
        "cache": CacheRule.none,
        "num_slots": slots,
        "slab_bytes": SLAB,
        "load": Load(1),
        "prompt_tokens": 2,
        "new_tokens": 6,
        **changes,
    }
    return simulate(family, gating, given, **settings)


def test_the_resident_model_takes_the_sum_of_its_parts() -> None:
    found = served(Policy.gpu_only, times(), PreGating(1), slots=30)
    assert found == Predicted(pytest.approx(3 * 4 + 3 * 1 + 5), 0.0, 0, 1)


def test_on_demand_adds_every_fetch() -> None:
    found = served(Policy.on_demand, times(), PreGating(1))
    assert found.tpot_ms == pytest.approx(20 + 3 * 3)
    assert found.exposed_ms_per_token == pytest.approx(9)
    assert found.bytes_per_step == 3 * SLAB


@pytest.mark.parametrize(("entry", "waited"), [("own", 3.0), ("embedding", 0.0)])
def test_pre_gating_hides_fetches_that_fit_but_for_an_own_entry(entry: str, waited: float) -> None:
    """A slab of 3 ms travels while the expert (1 ms) and the layers behind it (4 ms) compute."""
    found = served(Policy.pre_gated, times(), PreGating(1, entry=entry))
    assert found.tpot_ms == pytest.approx(20 + waited)
    assert found.exposed_ms_per_token == pytest.approx(waited)


def test_a_slow_link_leaves_what_computation_cannot_cover() -> None:
    """Slabs of 7 ms against 1 + 4 ms of computation: 2 ms remain for two blocks, 3 ms for the entry's 4 ms."""
    found = served(Policy.pre_gated, times(slab=7.0), PreGating(1, entry="embedding"))
    assert found.exposed_ms_per_token == pytest.approx(3 + 2 + 2)


def test_slots_for_everything_and_a_cache_move_nothing_in_the_end() -> None:
    found = served(Policy.on_demand, times(), PreGating(1), slots=30, cache=CacheRule.lru, load=Load(1, 5))
    assert found.bytes_per_step == 0
    assert found.tpot_ms == pytest.approx(12 + 3 * 5 * 1 + 5)


def test_prefetch_all_moves_every_expert_of_every_block() -> None:
    assert served(Policy.prefetch_all, times(), PreGating(1), slots=10).bytes_per_step == 3 * 5 * SLAB


def test_computing_beside_a_transfer_is_slower_and_so_is_the_transfer() -> None:
    """A slab of 4 ms takes 8 ms beside computation, in which 4 ms of work are done at half speed."""
    clock = Clock(times(compute_slowdown=2.0, link_slowdown=2.0))
    [transfer] = VirtualMover(clock, 4.0, SLAB, Counters()).start([Move(ExpertKey("decoder", 0, 0), 0)])
    clock.compute(6.0)
    assert clock.now == pytest.approx(8 + 2)
    assert transfer.done()
    [late] = VirtualMover(clock, 4.0, SLAB, Counters()).start([Move(ExpertKey("decoder", 0, 1), 0)])
    clock.compute(1.0)
    assert not late.done()
    late.wait()
    assert clock.now == pytest.approx(10 + 2 + 3)


def test_after_a_wait_computing_takes_longer_and_that_is_no_waiting() -> None:
    """On demand every one of three slabs is waited for; a step that waits for nothing resumes nothing."""
    plain = served(Policy.on_demand, times(), PreGating(1))
    slow = served(Policy.on_demand, times(resume=0.5), PreGating(1))
    assert slow.tpot_ms == pytest.approx(plain.tpot_ms + 3 * 0.5)
    assert slow.exposed_ms_per_token == pytest.approx(plain.exposed_ms_per_token)
    kept = served(Policy.on_demand, times(resume=0.5), PreGating(1), slots=30, cache=CacheRule.lru, load=Load(1, 5))
    assert kept.tpot_ms == pytest.approx(12 + 3 * 5 * 1 + 5)


def test_slabs_travel_in_the_order_they_were_asked_for() -> None:
    clock = Clock(times())
    mover = VirtualMover(clock, 3.0, SLAB, Counters())
    first, second = mover.start([Move(ExpertKey("decoder", 0, n), n) for n in range(2)])
    second.wait()
    assert first.done() and clock.now == 6.0


def test_durations_are_read_off_a_trace() -> None:
    """Two steps of 20 ms after the first token at 10 ms; two blocks, the second with two experts."""
    spans = []
    for begin in (10.0, 30.0):
        spans += [
            Span("compute", "decoder block 0 expert 3", begin + 4, begin + 5),
            Span("compute", "decoder block 1 expert 0", begin + 8, begin + 10),
            Span("compute", "decoder block 1 expert 1", begin + 10, begin + 12),
        ]
    spans.append(Span("compute", "encoder block 0 expert 1", 1.0, 2.0))  # while the prompt is read
    timed = Timed(torch.zeros(1, 1), [0.010, 0.030, 0.050], [], spans)
    found, active_experts = durations(timed, slab_ms=2.5)
    assert active_experts == pytest.approx(1.5)
    assert found.before_block == pytest.approx((4.0, 3.0))
    assert found.expert == pytest.approx(1.5)
    assert found.after_blocks == pytest.approx(8.0)
    assert found.slab == 2.5


def test_a_whole_step_is_put_together_from_a_shallow_one() -> None:
    parts = times(before_block=(4.0, 2.0, 3.0))
    assert stretched(parts, 6) == times(before_block=(4.0, 2.0, 3.0, 2.5, 2.5, 2.5))
    assert stretched(parts, 3) == parts
    assert stretched(times(before_block=(4.0,)), 2) == times(before_block=(4.0, 4.0))


def row(policy: str, cache: str, speed: float, link: float, compute: float = 10.0) -> dict[str, Any]:
    return {"policy": policy, "cache": cache, "tokens_per_s": speed, "link_ms": link, "compute_ms": compute}


@pytest.mark.parametrize(
    ("link", "said"),
    [(8.0, "Pre-gating pays: 1.50×"), (0.5, "there is little to hide"), (50.0, "a cache, smaller slabs or a larger")],
)
def test_the_advice_follows_the_floors(link: float, said: str) -> None:
    rows = [row("on_demand", "none", 10, link), row("pre_gated", "none", 15, link), row("on_demand", "lru", 30, link)]
    assert said in advice(rows)
    if link == 50.0:
        assert "on_demand with an lru cache reaches 2.00×" in advice(rows)
    assert "Plan both" in advice(rows[:1])


@pytest.mark.parametrize(("settings", "blocks"), [([], 2), (["pregate.lookahead=3"], 4)])
def test_a_shallow_model_has_few_layers_and_the_widths_of_the_whole_one(settings: list[str], blocks: int) -> None:
    [whole] = bench_models(compose_run(["model=switch_base_64", *settings]))
    small = shallow(whole)
    assert [len(layers) for layers in small.family.layers.values()] == [blocks, blocks]
    assert [len(layers) for layers in whole.family.layers.values()] == [6, 6]
    assert small.family.matrices == whole.family.matrices and small.dtype == whole.dtype
    assert small.gating == whole.gating and small.family.num_experts == FEW_EXPERTS
    assert small.num_bytes() < 0.08 * whole.num_bytes(), "what is timed is small"
    assert len(few_experts(whole).family.keys()) == 12 * FEW_EXPERTS


def test_late_weights_fetch_as_early_and_a_later_start_later() -> None:
    early = served(Policy.pre_gated, times(slab=7.0), PreGating(1))
    assert vars(served(Policy.pre_gated, times(slab=7.0), PreGating(1, weights="late"))) == vars(early)
    later = served(Policy.pre_gated, times(slab=7.0), PreGating(1, start=1))
    assert later.bytes_per_step == early.bytes_per_step > 0 and vars(later) != vars(early)
