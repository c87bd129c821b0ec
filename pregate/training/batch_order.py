"""Which examples each optimizer step sees, in which order, on which process.

Pure functions of the seed, the examples' lengths and the step number: nothing here is stateful, so a resumed run, or
one on another number of processes, sees the same sequences in the same steps. Knows nothing about tokenizers, tensors
or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pregate.config import TrainConfig, UsageError

WINDOW_BUCKETS = 64
"""Buckets of similar length are formed within a window of about this many of them."""


@dataclass(frozen=True)
class Lengths:
    """How long the `count` examples are. `of` is asked for many at a time, and only for those that are about to be
    used."""

    count: int
    of: Callable[[list[int]], Sequence[int]]


@dataclass(frozen=True)
class Batching:
    """How one global batch is cut up.

    `batch_sequences` go into each optimizer step over `world_size` processes; a process takes at most
    `micro_sequences` at a time, in `accumulation_steps` micro batches of which the last may be smaller.
    `bucket_sequences` neighbours in length travel together whatever the number of processes.
    """

    batch_sequences: int
    world_size: int
    micro_sequences: int
    accumulation_steps: int
    bucket_sequences: int

    def micro_batches(self, step_indices: Sequence[int], rank: int) -> list[list[int]]:
        """Cut the examples of one step, ordered by length, into the micro batches of process `rank`.

        All processes together see each example once; in one micro step they get examples of like length.
        """
        unit = self.micro_sequences * self.world_size
        units = [step_indices[start : start + unit] for start in range(0, len(step_indices), unit)]
        return [list(part) for part in (unit[rank :: self.world_size] for unit in units) if part]


def derive_batching(train: TrainConfig, sequence_tokens: int, world_size: int) -> Batching:
    """Fit `train.batch_sequences` into micro batches of about `train.micro_batch_tokens` tokens, when a sequence has
    `sequence_tokens`.

    Raises `UsageError` if there are more processes than sequences.
    """
    if train.batch_sequences < world_size:
        raise UsageError(
            f"train.batch_sequences={train.batch_sequences} leaves some of the {world_size} processes without work:"
            f" set it to {world_size} or more, or start fewer processes."
        )
    bucket = min(train.batch_sequences, max(1, train.micro_batch_tokens // sequence_tokens))
    per_process = -(-train.batch_sequences // world_size)
    micro = min(bucket, per_process)
    return Batching(
        batch_sequences=train.batch_sequences,
        world_size=world_size,
        micro_sequences=micro,
        accumulation_steps=-(-per_process // micro),
        bucket_sequences=bucket,
    )


def shuffled_stream(num_examples: int, seed: int, start: int, count: int) -> list[int]:
    """Positions `start` to `start + count` of the endless stream of seeded permutations, one an epoch."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), num_examples)
        order = _generator(seed, 0, epoch).permutation(num_examples)
        indices += order[offset : offset + count - len(indices)].tolist()
    return indices


def step_plan(lengths: Lengths, batching: Batching, seed: int, first_step: int, last_step: int) -> Iterator[list[int]]:
    """Yield the example indices of each step in [first_step, last_step), ordered by length.

    A window of several steps is drawn from the shuffled stream and sorted by length; buckets of neighbours are then
    dealt to random steps, so that micro batches need little padding and a step still mixes lengths where it holds
    several buckets.
    """
    window_steps = _window_steps(lengths.count, batching)
    step = first_step
    while step < last_step:
        window = step // window_steps
        plan = _window_plan(lengths, batching, seed, window, window_steps)
        for indices in plan[step - window * window_steps :][: last_step - step]:
            yield indices
            step += 1


def _window_steps(num_examples: int, batching: Batching) -> int:
    """Steps in a window: enough buckets to sort among, but no example twice where the data set allows it."""
    wanted = -(-WINDOW_BUCKETS * batching.bucket_sequences // batching.batch_sequences)
    return max(1, min(wanted, num_examples // batching.batch_sequences))


def _window_plan(lengths: Lengths, batching: Batching, seed: int, window: int, window_steps: int) -> list[list[int]]:
    size, bucket = batching.batch_sequences, batching.bucket_sequences
    drawn = shuffled_stream(lengths.count, seed, window * window_steps * size, window_steps * size)
    length = dict(zip(drawn, lengths.of(drawn), strict=True))
    drawn.sort(key=length.__getitem__)
    slots = [(step, min(bucket, size - begin)) for step in range(window_steps) for begin in range(0, size, bucket)]
    plan: list[list[int]] = [[] for _ in range(window_steps)]
    taken = 0
    # slots are filled in random order but with ever longer examples, so each step comes out ordered by length
    for slot in _generator(seed, 1, window).permutation(len(slots)):
        step, count = slots[slot]
        plan[step] += drawn[taken : taken + count]
        taken += count
    return plan


def _generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFF, purpose, index])


def micro_batch_plan(
    lengths: Lengths, batching: Batching, *, seed: int, first_step: int, last_step: int, rank: int
) -> Iterator[list[int]]:
    """The micro batches of process `rank` for steps [first_step, last_step), in order."""
    for indices in step_plan(lengths, batching, seed, first_step, last_step):
        yield from batching.micro_batches(indices, rank)
