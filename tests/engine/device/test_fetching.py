"""In which order the policies fetch beside the computation, which slots they protect, and what they compute with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pregate.config import Policy
from pregate.engine.device import fetching as policies
from pregate.engine.device.fetching import BlockShape, SlabMemory, make_experts, slots_needed
from pregate.engine.device.slots import DeviceSlots
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.family import experts_of
from pregate.models.routing import DROPPED
from tests.tiny import pregated_model

EXPERTS, BLOCKS, WIDTH, FIRST = 5, 4, 20, 15


class NotedSide:
    """Notes where a side stream forks off and joins again; of a fork behind another's mark, that the mark is fresh."""

    def __init__(self, notes: list[str], other: NotedSide | None = None) -> None:
        self.notes, self.marks, self.other = notes, 0, other

    @contextmanager
    def fork(self, behind: int | None = None) -> Iterator[None]:
        if behind is not None:
            assert self.other is not None and behind == self.other.marks, "not behind the slots' assignment"
            yield
            return
        self.notes.append("(")
        yield
        self.notes.append(")")

    def mark(self) -> int:
        self.marks += 1
        return self.marks

    def join(self, mark: int) -> None:
        self.notes.append(f"join{mark}")


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches of the kernels, in their order: `f2/1` fetches for block 2 with 1 fetch protected."""
    noted: list[str] = []

    def assign(*arguments: Any) -> None:
        wanted_N, protected_fetches = arguments[len(DeviceSlots._fields)], arguments[-1]
        wanted = wanted_N[wanted_N >= 0]
        block = (int(wanted[0]) - FIRST) // EXPERTS if len(wanted) else "-"
        noted.append(f"f{block}/{protected_fetches}")

    monkeypatch.setattr(policies, "assign_slots", assign)
    monkeypatch.setattr(policies, "gather_slabs", lambda *_: None)
    monkeypatch.setattr(policies, "expert_outputs", lambda *_: noted.append("experts"))
    return noted


def experts(policy: Policy, side: Any, batch: int = 2) -> Any:
    layout = SlabLayout.of(experts_of(pregated_model().config), torch.float32)
    slots, slabs = BLOCKS * EXPERTS, FIRST + BLOCKS * EXPERTS
    memory = SlabMemory(
        layout,
        torch.zeros(slots, layout.slab_bytes, dtype=torch.uint8),
        torch.zeros(slabs, dtype=torch.int64),
        DeviceSlots.empty(slabs, slots, "cpu"),
        keep=True,
    )
    blocks = BlockShape([FIRST + b * EXPERTS for b in range(BLOCKS)], EXPERTS, 1, batch, "relu", ())
    return make_experts(policy, memory, blocks, side)


def step(served: Any, order: str) -> None:
    """`c2` commits the route of block 2, `r2` runs it."""
    served.begin_step()
    for word in order.split():
        block = int(word[1:])
        if word[0] == "c":
            served.commit(block, torch.tensor([[[1]], [[3]]]), torch.tensor([True, True]))
        else:
            served.run(block, torch.zeros(2, WIDTH), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("policy", "order", "expected"),
    [
        (Policy.gpu_only, "c0 r0 c1 r1 c2 r2 c3 r3", "experts experts experts experts"),
        (Policy.on_demand, "c0 c1 r0 c2 r1 c3 r2 r3", "f0/0 experts f1/0 experts f2/0 experts f3/0 experts"),
        (
            Policy.pre_gated,
            "c0 c1 r0 c2 r1 c3 r2 r3",
            "( f0/0 ) ( f1/1 ) join1 experts ( f2/1 ) join2 experts ( f3/1 ) join3 experts join4 experts",
        ),
        (
            Policy.pre_gated,  # lookahead 2, own entry gates: block 2's route is known before block 1's
            "c0 c2 r0 c1 c3 r1 r2 r3",
            "( f0/0 ) join1 experts ( f1/0 ) ( f2/1 ) ( f3/2 ) join2 experts join3 experts join4 experts",
        ),
        (
            Policy.pre_gated,  # lookahead 2, embedding entries
            "c0 c1 c2 r0 c3 r1 r2 r3",
            "( f0/0 ) ( f1/1 ) ( f2/2 ) join1 experts ( f3/2 ) join2 experts join3 experts join4 experts",
        ),
        (
            Policy.pre_gated,  # conventional
            "c0 r0 c1 r1 c2 r2 c3 r3",
            "( f0/0 ) join1 experts ( f1/0 ) join2 experts ( f2/0 ) join3 experts ( f3/0 ) join4 experts",
        ),
        (
            Policy.prefetch_all,
            "c0 c1 r0 c2 r1 c3 r2 r3",
            "f0/0 ( f1/1 ) experts join1 ( f2/1 ) experts join2 ( f3/1 ) experts join3 experts",
        ),
    ],
)
def test_fetches_begin_as_early_as_they_may(
    policy: Policy, order: str, expected: str, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step is like the first, and every copy is joined before the step ends. The slots that `pre_gated`
    copies to are assigned on a stream of their own, which forks off where the copies could."""
    assigning = NotedSide(notes)
    monkeypatch.setattr(policies, "side_stream", lambda device: assigning)
    side = NotedSide(notes, assigning)
    served = experts(policy, side)
    for _ in range(2):
        notes.clear()
        side.marks = 0
        step(served, order)
        assert " ".join(notes) == expected


def test_only_rows_that_live_and_were_not_dropped_are_fetched_for(notes: list[str]) -> None:
    served = experts(Policy.on_demand, NotedSide(notes), batch=4)
    served.begin_step()
    ids_BTK = torch.tensor([[[1]], [[3]], [[DROPPED]], [[4]]])
    served.commit(2, ids_BTK, torch.tensor([True, False, True, True]))
    assert served._wanted[2].tolist() == [FIRST + 2 * EXPERTS + 1, -1, -1, FIRST + 2 * EXPERTS + 4]


def test_slots_needed_by_policy() -> None:
    """Of 35 slabs; 3 choices of 5 experts, then 8 choices of them; a lookahead of 2."""
    for policy, few, many in (
        (Policy.gpu_only, 35, 35),
        (Policy.on_demand, 3, 5),
        (Policy.pre_gated, 9, 15),
        (Policy.prefetch_all, 10, 10),
    ):
        assert slots_needed(policy, 35, 3, EXPERTS, 2) == few, policy
        assert slots_needed(policy, 35, 8, EXPERTS, 2) == many, policy


def test_a_closed_engine_holds_no_slots(notes: list[str]) -> None:
    served = experts(Policy.pre_gated, NotedSide(notes))
    served.forget_slots()
    assert served._memory.slots_SB.numel() == served._memory.addresses_G.numel() == 0
