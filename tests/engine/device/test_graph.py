"""Streams and graphs: without CUDA they change nothing; with it, they order what must be ordered."""

from __future__ import annotations

import pytest
import torch

from pregate.engine.device.graph import STEPS_AT_ONCE, WARM_UPS, InOrder, StepGraphs, side_stream
from pregate.engine.device.sampler_state import StepKind

CPU = torch.device("cpu")
GREEDY, SAMPLED = StepKind(), StepKind(sample=True)


def test_on_a_cpu_steps_run_as_they_are() -> None:
    ran: list[StepKind] = []
    graphs = StepGraphs(ran.append, lambda: pytest.fail("nothing is captured here"), CPU)
    graphs.prepare(GREEDY)
    graphs.run(GREEDY)
    graphs.run(SAMPLED, 3)
    graphs.forget()
    assert ran == [GREEDY, *[SAMPLED] * 3]


def test_on_a_cpu_the_side_stream_is_the_only_one() -> None:
    side = side_stream(CPU)
    assert isinstance(side, InOrder)
    ran = []
    with side.fork():
        ran.append("beside")
        mark = side.mark()
    side.join(mark)
    ran.append("behind")
    assert ran == ["beside", "behind"]


@pytest.mark.gpu
def test_each_kind_is_captured_once_and_replayed() -> None:
    device = torch.device("cuda")
    count, calls = torch.zeros(1, device=device), []

    def step(kind: StepKind) -> None:
        calls.append(kind)
        count.add_(10 if kind.sample else 1)

    graphs = StepGraphs(step, count.zero_, device)
    for kind in (GREEDY, SAMPLED, GREEDY):
        graphs.prepare(kind)
    captured = len(calls)
    count.zero_()
    for kind, steps in ((GREEDY, 1), (SAMPLED, 2), (GREEDY, 2 * STEPS_AT_ONCE + 3)):
        graphs.run(kind, steps)
    assert count.item() == 21 + 2 * STEPS_AT_ONCE + 3
    expected = 2 * (2 * WARM_UPS + 1 + STEPS_AT_ONCE)
    assert len(calls) == captured == expected, "warm-ups and captures of each kind, and no call after that"
    graphs.forget()


@pytest.mark.gpu
def test_a_fork_runs_beside_and_joins_inside_a_graph() -> None:
    """The side stream reads what came before it, and what follows the join reads what it wrote."""
    device = torch.device("cuda")
    side = side_stream(device)
    size = 1 << 22
    source, moved, result = (torch.zeros(size, device=device) for _ in range(3))

    def step(kind: StepKind) -> None:
        source.add_(1)
        with side.fork():
            moved.copy_(source)
            mark = side.mark()
        other = torch.randn(512, 512, device=device)
        for _ in range(8):
            other = other @ other
        side.join(mark)
        result.copy_(moved * 2)

    graphs = StepGraphs(step, source.zero_, device)
    graphs.prepare(GREEDY)
    source.zero_()
    for number in range(1, 20):
        graphs.run(GREEDY)
        assert (result == 2 * number).all()
