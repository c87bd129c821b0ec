"""The experts' reference implementation against the resident experts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pregate.config import SlabDtype, UsageError
from pregate.engine.device.ops.expert_outputs import (
    ExpertScratch,
    expert_outputs,
    up_and_down,
)
from pregate.engine.storage.slabs import SlabLayout
from tests.engine.device.experts_cases import ExpertsCase, assert_close, family_of

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", list(SlabDtype))
@pytest.mark.parametrize(
    ("slots", "top_k"),
    [([0], 1), ([-1], 1), ([2, 0, 2, -1, 1], 1), ([3] * 6, 1), ([1, 3, 3, 1, -1, 2, -1, -1], 2)],
    ids=str,
)
def test_as_the_resident_experts(dtype: torch.dtype, stored: SlabDtype, slots: list[int], top_k: int) -> None:
    case = ExpertsCase.random(len(slots), slots, width=24, hidden=56, dtype=dtype, stored=stored, top_k=top_k)
    expert_outputs(*case.arguments)
    assert_close(case.out_BD, case.resident())
    dropped_B = (case.slot_N.view(-1, top_k) < 0).all(1)
    assert (case.out_BD[dropped_B] == 0).all()
    assert (case.out_BD[~dropped_B] != 0).any(1).all()


def test_poison_shows_where_a_slot_holds_nothing() -> None:
    """So that the other tests mean something."""
    case = ExpertsCase.random(0, [1, 0], width=24, hidden=56, stored=SlabDtype.fp8)
    case.slot_N[0] = 2
    expert_outputs(*case.arguments)
    assert case.out_BD[0].isnan().all() and case.out_BD[1].isfinite().all(), case.out_BD


def test_scratch_is_as_large_as_it_says() -> None:
    layout = SlabLayout.of(family_of(wi=(56, 24), wo=(24, 56)), torch.bfloat16)
    assert ExpertScratch.empty(3, layout, "cpu").num_bytes == 3 * (56 + 24) * 2


def test_experts_of_another_form_are_refused() -> None:
    case = ExpertsCase.random(0, [1, 0], width=24, hidden=56)
    with pytest.raises(UsageError, match=r"'gelu'.*only relu"):
        expert_outputs(*case.arguments[:-1], "gelu")
    gated = family_of(wi_0=(56, 24), wi_1=(56, 24), wo=(24, 56))
    for family in (gated, family_of(wi=(56, 24), wo=(24, 55)), family_of(only=(3, 3))):
        with pytest.raises(UsageError, match="only an up and a down matrix"):
            up_and_down(SlabLayout.of(family, torch.float32))


@pytest.mark.parametrize("stored", list(SlabDtype))
def test_the_reference_reads_no_number_back(stored: SlabDtype) -> None:
    case = ExpertsCase.random(0, [2, -1, 2, 1], width=24, hidden=56, stored=stored, top_k=2)
    with FakeTensorMode() as mode:
        empty = case.converted(mode.from_tensor)
        expert_outputs.reference(*empty.arguments)
    assert empty.out_BD.shape == (2, 24)
