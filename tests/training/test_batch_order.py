"""Which sequences a step sees: counts, determinism, independence of the number of processes, little padding."""

from __future__ import annotations

import random
import statistics

import pytest

from pregate.config import TrainConfig, UsageError
from pregate.training.batch_order import (
    Batching,
    Lengths,
    derive_batching,
    micro_batch_plan,
    shuffled_stream,
    step_plan,
)


@pytest.mark.parametrize(
    ("batch", "micro_tokens", "source", "world", "micro", "accumulation"),
    [
        (256, 8192, 256, 1, 32, 8),  # the paper's recipe on one device
        (256, 8192, 256, 8, 32, 1),
        (256, 8192, 256, 16, 16, 1),  # bounded by what a process gets
        (10, 1024, 256, 1, 4, 3),  # 4 + 4 + 2
        (5, 64, 256, 1, 1, 5),  # one sequence where none fits
        (6, 4096, 32, 1, 6, 1),
        (7, 96, 32, 2, 3, 2),
    ],
)
def test_derived_numbers(batch: int, micro_tokens: int, source: int, world: int, micro: int, accumulation: int) -> None:
    train = TrainConfig(batch_sequences=batch, micro_batch_tokens=micro_tokens)
    batching = derive_batching(train, source, world)
    assert (batching.micro_sequences, batching.accumulation_steps) == (micro, accumulation)


def test_more_processes_than_sequences_are_refused() -> None:
    with pytest.raises(UsageError, match="batch_sequences=3 leaves some of the 4 processes"):
        derive_batching(TrainConfig(batch_sequences=3), 256, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [4, 5, 9, 16])
@pytest.mark.parametrize("micro_tokens", [10, 25, 1000])
def test_processes_share_a_step_without_loss_or_repetition(world: int, batch: int, micro_tokens: int) -> None:
    train = TrainConfig(batch_sequences=batch, micro_batch_tokens=micro_tokens)
    batching = derive_batching(train, 10, world)
    parts = [batching.micro_batches(range(batch), rank) for rank in range(world)]
    assert sorted(i for micro in parts for indices in micro for i in indices) == list(range(batch))
    for micro in parts:
        assert 1 <= len(micro) <= batching.accumulation_steps
        assert all(1 <= len(indices) <= batching.micro_sequences for indices in micro)


def test_the_stream_is_one_permutation_after_another() -> None:
    stream = shuffled_stream(7, seed=3, start=0, count=21)
    for epoch in range(3):
        assert sorted(stream[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert stream[:7] != stream[7:14]
    assert shuffled_stream(7, seed=3, start=5, count=11) == stream[5:16]
    assert shuffled_stream(7, seed=4, start=0, count=21) != stream


def known(count: int) -> list[int]:
    """The length of each example."""
    rng = random.Random(0)
    return [rng.randint(5, 400) for _ in range(count)]


def lengths_of(count: int) -> Lengths:
    lengths = known(count)
    return Lengths(count, lambda indices: [lengths[index] for index in indices])


@pytest.mark.parametrize(("examples", "batch", "bucket"), [(500, 8, 8), (500, 24, 5), (10, 16, 4), (37, 4, 4)])
def test_a_plan_can_be_entered_at_any_step(examples: int, batch: int, bucket: int) -> None:
    lengths = lengths_of(examples)
    batching = Batching(batch, 1, bucket, -(-batch // bucket), bucket)
    plan = list(step_plan(lengths, batching, 11, 0, 70))
    assert [len(indices) for indices in plan] == [batch] * 70
    for first in (1, 29, 63, 64, 69):
        assert list(step_plan(lengths, batching, 11, first, 70)) == plan[first:]
    assert list(step_plan(lengths, batching, 11, 0, 70)) == plan
    assert list(step_plan(lengths, batching, 12, 0, 70)) != plan


def test_every_epoch_of_whole_windows_sees_each_example_once() -> None:
    batching = Batching(4, 1, 4, 1, 4)
    plan = list(step_plan(lengths_of(64), batching, 0, 0, 32))
    for epoch in (plan[:16], plan[16:]):
        assert sorted(i for indices in epoch for i in indices) == list(range(64))


def test_steps_do_not_depend_on_the_number_of_processes() -> None:
    train = TrainConfig(steps=9, batch_sequences=12, micro_batch_tokens=40)
    lengths, seen = lengths_of(100), []
    for world in (1, 2, 3):
        batching = derive_batching(train, 10, world)
        steps: list[list[int]] = [[] for _ in range(9)]
        for rank in range(world):
            sampler = micro_batch_plan(lengths, batching, seed=5, first_step=0, last_step=9, rank=rank)
            micro_count = len(batching.micro_batches(range(12), rank))
            for step in steps:
                for _ in range(micro_count):
                    step += next(sampler)
        seen.append([sorted(step) for step in steps])
    assert seen[0] == seen[1] == seen[2]


def test_bucketing_leaves_little_padding_and_mixes_lengths_over_steps() -> None:
    lengths = known(4096)
    batching = Batching(32, 1, 8, 4, 8)
    plan = list(step_plan(lengths_of(4096), batching, 0, 0, 16))
    padded = used = 0
    for indices in plan:
        for micro in batching.micro_batches(indices, 0):
            padded += len(micro) * max(lengths[i] for i in micro)
            used += sum(lengths[i] for i in micro)
    shuffled = shuffled_stream(len(lengths), 0, 0, 512)
    chunks = [shuffled[i : i + 8] for i in range(0, 512, 8)]
    plain = sum(8 * max(lengths[i] for i in chunk) for chunk in chunks) / sum(lengths[i] for i in shuffled)
    assert padded / used < 1.05 < 1.5 < plain, (padded / used, plain)
    # a step of 4 random buckets: its mean length varies half as much as single lengths, not as much
    means = [sum(lengths[i] for i in indices) / 32 for indices in step_plan(lengths_of(4096), batching, 0, 0, 128)]
    assert statistics.pstdev(means) < 0.65 * statistics.pstdev(lengths)


def test_lengths_are_asked_for_one_window_ahead_only() -> None:
    asked: list[int] = []
    lengths = Lengths(4096, lambda indices: asked.extend(indices) or known(4096)[: len(indices)])
    batching = Batching(batch_sequences=8, world_size=1, micro_sequences=8, accumulation_steps=1, bucket_sequences=8)
    plan = step_plan(lengths, batching, 0, 0, 512)
    first = next(plan)
    assert set(first) <= set(asked)
    assert asked == shuffled_stream(4096, 0, 0, 8 * 64)
