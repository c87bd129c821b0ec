"""Where the batches of a training run come from: examples in tokens on the disk, or rows packed from a stream of text.

Knows tasks, data loaders and which process takes which part of a step; knows nothing about models or updates. Both
kinds give the same batches to a resumed run, and the same steps to any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pregate.config import Run, TrainConfig
from pregate.models.loading import open_model
from pregate.models.objectives import Objective
from pregate.tasks.base import Task
from pregate.tasks.text_stream import Position, TextStream
from pregate.tasks.token_cache import token_rows
from pregate.tasks.tokens import Collator
from pregate.training.batch_order import Batching, Lengths, micro_batch_plan, step_plan
from pregate.training.state_values import TrainState
from pregate.training.taught_answers import TeacherAnswers, batches_to_answer

Batch = dict[str, Tensor]
POSITION = "position"
MEASURED = 512


class Feed(Protocol):
    """`predicts`: validation generates answers and scores them; otherwise its loss is all there is, and judges.
    `fingerprint`: what the content of the training split is known by."""

    predicts: bool
    fingerprint: str
    eval_examples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]

    def micro_batches(self, state: TrainState) -> Iterator[Batch]:
        """This process's micro batches behind `state`, to the last step."""
        ...

    def mark(self, state: TrainState) -> None:
        """Note in `state`, which counts its sequences already, where the data stand after the latest step."""
        ...

    def named(self, state: TrainState, numbers: Sequence[int]) -> list[str]:
        """The examples in this process's micro batches `numbers` of the step behind `state`, for a message."""
        ...


@dataclass(frozen=True)
class Share:
    """What of each step this process takes, and how its loader is set up. multiple: of which lengths of batches are."""

    run: Run
    train: TrainConfig
    objective: Objective
    batching: Batching
    rank: int
    pin_memory: bool
    multiple: int = 1

    def loader(self, data: Any, num_workers: int, **options: Any) -> torch.utils.data.DataLoader[Batch]:
        return torch.utils.data.DataLoader(
            data,
            num_workers=num_workers,
            pin_memory=self.pin_memory,
            # a generator of its own, so that starting the loader does not move the state that dropout draws from
            generator=torch.Generator(),
            **options,
        )


def build_feed(task: Task | TextStream, tokenizer: Any, share: Share) -> Feed:
    """The feed for `task`. Raises `UsageError` for data that is missing or cannot be used."""
    kind = StreamFeed if isinstance(task, TextStream) else ExampleFeed
    return kind(task, tokenizer, share)  # type: ignore[arg-type]


class ExampleFeed:
    """The examples of the training split, whose tokens lie on the disk; batches of like length."""

    predicts = True

    def __init__(self, task: Task, tokenizer: Any, share: Share) -> None:
        run = share.run
        self.share = share
        self.collate = Collator.for_task(run.task, tokenizer, share.objective, share.multiple)
        self.fingerprint = task.fingerprint(run.task.train_split)
        limit = run.data.max_train_examples
        self.rows = token_rows(run, task, run.task.train_split, self.fingerprint, limit, self.collate)
        self.eval_examples = task.examples(run.task.eval_split, share.train.eval_examples)
        self.lengths = Lengths(len(self.rows), _alike if share.train.packing else self.rows.prompt_lengths)

    def micro_batches(self, state: TrainState) -> Iterator[Batch]:
        workers = self.share.run.data.num_workers
        collate = self.collate.packed_rows if self.share.train.packing else self.collate.of_rows
        plan = self._plan(state.step, self.share.train.steps)
        return iter(self.share.loader(self.rows, workers, batch_sampler=plan, collate_fn=collate))

    def _plan(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        share, seed = self.share, self.share.run.seed
        return micro_batch_plan(
            self.lengths, share.batching, seed=seed, first_step=first_step, last_step=last_step, rank=share.rank
        )

    def answer(self, teacher: Any, file: Path, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Learn what `teacher` answers in place of the targets. `file` keeps the answers."""
        share, run = self.share, self.share.run
        steps = step_plan(self.lengths, share.batching, run.seed, 0, share.train.steps)
        used = (index for step in steps for index in step)
        batches = batches_to_answer(used, self.rows.prompt_lengths, run.eval.batch_size)
        assert share.train.teacher is not None
        made_from = {
            "teacher": share.train.teacher,
            "weights": open_model(share.train.teacher).identity(),
            "precision": str(share.train.precision),
            "rows": self.rows.directory.name,
        }
        self.rows = TeacherAnswers(teacher, self.rows, self.collate, autocast, file, made_from).to(batches)

    def named(self, state: TrainState, numbers: Sequence[int]) -> list[str]:
        micro_batches = list(self._plan(state.step, state.step + 1))
        indices = [index for number in numbers for index in micro_batches[number]]
        return [f"example {own!r}" for own in self.rows.ids(indices)]

    def mark(self, state: TrainState) -> None:
        state.epoch = state.sequences / len(self.rows)


def _alike(indices: list[int]) -> list[int]:
    """Lengths of packed examples: no row needs neighbours of like length, so they keep their random order."""
    return [0] * len(indices)


def sequence_tokens(task: Task | TextStream, tokenizer: Any, run: Run, train: TrainConfig, objective: Objective) -> int:
    """The tokens by which sequences are counted into micro batches: the longest source, and where examples are packed
    the mean of source and target together, over the first `MEASURED` examples."""
    if not train.packing or isinstance(task, TextStream):
        return run.task.max_source_tokens
    examples = task.examples(run.task.train_split, min(MEASURED, run.data.max_train_examples or MEASURED))
    rows = Collator.for_task(run.task, tokenizer, objective).rows(examples)
    return -(-sum(row.num_tokens for row in rows) // len(rows))


class StreamFeed:
    """Rows of text, packed as they are read; `TrainState.position` says where the reading stands."""

    predicts = False

    def __init__(self, task: TextStream, tokenizer: Any, share: Share) -> None:
        run = share.run
        self.task, self.tokenizer, self.share = task, tokenizer, share
        self.collate = task.collator(tokenizer)
        self.fingerprint = task.fingerprint(run.task.train_split)
        self.eval_examples = task.first_rows(run.task.eval_split, tokenizer, share.train.eval_examples)
        self._position = Position()

    def micro_batches(self, state: TrainState) -> Iterator[Batch]:
        self._position = Position(*state.position)
        stream = _StepStream(self.task, self.tokenizer, self.collate, self.share, self._position, state.step)
        # one worker can read ahead; more would each need a part of the stream
        workers = min(1, self.share.run.data.num_workers)
        if workers:  # a fork loses the tokenizer's threads; told before, it does not warn of it
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return self._followed(iter(self.share.loader(stream, workers, batch_size=None)))

    def _followed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self._position = Position(*batch.pop(POSITION).tolist())
            yield batch

    def mark(self, state: TrainState) -> None:
        state.position = list(self._position)
        state.epoch = float(self._position.epoch)

    def named(self, state: TrainState, numbers: Sequence[int]) -> list[str]:
        place = self.task.place(self.share.run.task.train_split, Position(*state.position))
        return [f"text from {place}"] if numbers else []


class _StepStream(torch.utils.data.IterableDataset[Batch]):
    """The micro batches of one process, each with the position behind its whole step. Every process reads all rows."""

    def __init__(
        self,
        task: TextStream,
        tokenizer: Any,
        collate: Callable[[Sequence[Any]], Batch],
        share: Share,
        start: Position,
        first_step: int,
    ) -> None:
        super().__init__()
        self.task, self.tokenizer, self.collate, self.share = task, tokenizer, collate, share
        self.start, self.first_step = start, first_step

    def __iter__(self) -> Iterator[Batch]:
        batching = self.share.batching
        rows = self.task.rows(self.share.run.task.train_split, self.tokenizer, self.start)
        for _ in range(self.first_step, self.share.train.steps):
            step = [next(rows) for _ in range(batching.batch_sequences)]
            behind = torch.tensor(step[-1][1])
            for indices in batching.micro_batches(range(len(step)), self.share.rank):
                yield {**self.collate([step[i][0] for i in indices]), POSITION: behind}
