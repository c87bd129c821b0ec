"""Every process tokenizes its share of the examples, and all get the same lengths."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from pregate.system.peers import Group
from pregate.training import shared_lengths
from pregate.training.batch_order import Batching, step_plan
from pregate.training.shared_lengths import SharedLengths


class Counted:
    """Lengths of 100 examples; `asked`: those that were found out here."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 100

    def of(self, indices: Sequence[int]) -> list[int]:
        self.asked += indices
        return [index * 7 % 23 for index in indices]


def test_three_processes_share_the_work_and_plan_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_lengths, "PATIENCE_S", 60.0)
    batching = Batching(6, world_size=3, micro_sequences=2, accumulation_steps=1, bucket_sequences=2)
    alone = Counted()
    expected = list(step_plan(alone, batching, seed=5, first_step=3, last_step=40))
    store, counted = HashStore(), [Counted() for _ in range(3)]
    lengths = [SharedLengths(own, Group(rank, 3, store), "a") for rank, own in enumerate(counted)]
    with ThreadPoolExecutor(3) as threads:
        plans = list(threads.map(lambda one: list(step_plan(one, batching, 5, 3, 40)), lengths))
    assert plans == [expected] * 3
    assert sorted(index for own in counted for index in own.asked) == sorted(alone.asked)
    assert max(len(own.asked) for own in counted) <= len(alone.asked) // 3 + 3
    # what everybody has read is not kept
    assert store.num_keys() <= 3 * 2


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_lengths, "PATIENCE_S", 0.0)
    own = Counted()
    assert SharedLengths(own, Group(0, 2, HashStore()), "a").of([4, 5, 6]) == Counted().of([4, 5, 6])
    assert sorted(own.asked) == [4, 5, 6]
