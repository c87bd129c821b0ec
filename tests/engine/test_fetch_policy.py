"""Policies as pure functions, and the slots a budget buys."""

from __future__ import annotations

import re

import pytest

from pregate.config import Policy, UsageError
from pregate.engine.budget import default_slots, slots_within
from pregate.engine.fetch_policy import fetched_on_enter, fetched_on_route
from pregate.models.experts import ExpertKey, ExpertSpec
from pregate.models.family import experts_of
from tests.tiny import pregated_model


@pytest.fixture
def family() -> ExpertSpec:
    return experts_of(pregated_model(0, 1).config)


ROUTED = [ExpertKey("decoder", 2, 4), ExpertKey("decoder", 2, 1)]


def test_pre_gated_alone_fetches_a_route_at_once(family: ExpertSpec) -> None:
    for policy in Policy:
        fetched = fetched_on_route(policy, "decoder", 2, [4, 1])
        assert fetched == (ROUTED if policy is Policy.pre_gated else []), policy


def test_prefetch_all_alone_fetches_this_block_and_all_of_the_next(family: ExpertSpec) -> None:
    for policy in Policy:
        for block, blocks in ((1, (1, 2)), (2, (2,))):
            whole = [ExpertKey("encoder", b, e) for b in blocks for e in range(5)]
            fetched = fetched_on_enter(policy, family, "encoder", block)
            assert fetched == (whole if policy is Policy.prefetch_all else []), policy


def test_default_slots(family: ExpertSpec) -> None:
    assert default_slots(Policy.gpu_only, family) == 30
    assert default_slots(Policy.prefetch_all, family) == 10
    assert default_slots(Policy.on_demand, family) == default_slots(Policy.pre_gated, family) == 8


@pytest.mark.parametrize(
    ("budget", "slots"), [("50%", 15), ("100%", 30), ("4KB", 4), ("4095", 4), ("1MB", 30), ("10%", 3), (None, 8)]
)
def test_budgets_buy_whole_slots(family: ExpertSpec, budget: str | None, slots: int) -> None:
    assert slots_within(budget, Policy.pre_gated, family, slab_bytes=1000) == slots


def test_a_budget_below_one_expert_is_refused(family: ExpertSpec) -> None:
    with pytest.raises(UsageError, match=r"less than one expert of 1\.00 kB: give at least 1000B"):
        slots_within("999", Policy.pre_gated, family, slab_bytes=1000)
    with pytest.raises(UsageError, match="less than one expert"):
        slots_within("1%", Policy.on_demand, family, slab_bytes=1000)


def test_advised_budgets_are_accepted(family: ExpertSpec) -> None:
    """Whatever the size of an expert: no rounding between the advice and what it is compared with."""
    for slab_bytes in (4096, 8192, 1_234_567, 9_437_184):
        with pytest.raises(UsageError) as caught:
            slots_within(str(slab_bytes - 1), Policy.pre_gated, family, slab_bytes)
        [advised] = re.findall(r"give at least (\S+)\.$", str(caught.value))
        assert slots_within(advised, Policy.pre_gated, family, slab_bytes) == 1
        with pytest.raises(UsageError) as caught:
            slots_within("50%", Policy.gpu_only, family, slab_bytes)
        [advised] = re.findall(r"give (\S+) ", str(caught.value))
        assert slots_within(advised, Policy.gpu_only, family, slab_bytes) == 30


def test_gpu_only_needs_room_for_all(family: ExpertSpec) -> None:
    with pytest.raises(UsageError, match="holds 15 of 30 experts, but gpu_only keeps all"):
        slots_within("50%", Policy.gpu_only, family, slab_bytes=1000)


def test_an_unreadable_budget_is_refused(family: ExpertSpec) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        slots_within("a lot", Policy.pre_gated, family, slab_bytes=1000)
