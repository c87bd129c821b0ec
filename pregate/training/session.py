"""Everything a training run is made of, put together before the first step or brought back from disk.

Knows Accelerate and which setting belongs where; knows nothing about the order of training.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from pregate.config import DistillData, ExpertPath, Keep, Run, Trainable, TrainConfig
from pregate.models.dropout import use_fast_dropout
from pregate.models.family import family_of_model
from pregate.models.objectives import Objective
from pregate.system.machine import set_seed
from pregate.system.process_group import join, main_only
from pregate.tasks.base import Task
from pregate.tasks.text_stream import TextStream
from pregate.tracking import Tracker
from pregate.training.batch_order import Batching, derive_batching
from pregate.training.disk_space import check_space
from pregate.training.distill import Distillation, load_distillation
from pregate.training.durable_directories import recover, step_of
from pregate.training.feeds import ExampleFeed, Feed, Share, build_feed, sequence_tokens
from pregate.training.lora import add_adapters
from pregate.training.offloaded import Offloaded
from pregate.training.optimizer_and_schedule import autocast_dtype, build_optimizer, freeze_all_but, set_dropout
from pregate.training.resume_changes import check_data
from pregate.training.run_dir_lock import CHECKPOINT, KEPT, LAST, SOURCE
from pregate.training.saved_state import data_of, settle
from pregate.training.sharded_saved_state import Weights, fill, open_last
from pregate.training.sharding import ShardedModel, shard
from pregate.training.state_values import TrainState, set_random_state
from pregate.training.taught_answers import FILE as TEACHER_ANSWERS
from pregate.training.weights_without_experts import lacks_experts

LENGTHS = 8
"""Lengths of batches are multiples of this where every new length costs."""


@dataclass
class Session:
    """The live objects of one training run; `wrapped` is `model` as Accelerate runs it, a teacher stays bare.
    `sharded`: the same model where it is split over the processes."""

    model: Any
    wrapped: Any
    tokenizer: Any
    task: Task | TextStream
    train: TrainConfig
    run: Run
    tracker: Tracker
    stage: str
    out_dir: Path
    carry: Sequence[Path]
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager[Any]]
    objective: Objective
    feed: Feed
    batching: Batching
    micro_batches: Iterator[dict[str, Tensor]]
    state: TrainState
    distillation: Distillation | None = None
    sharded: ShardedModel | None = None
    offloaded: Offloaded | None = None

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    def passes(self) -> AbstractContextManager[None]:
        """For a forward and a backward pass of the model, or for a validation."""
        return nullcontext() if self.offloaded is None else self.offloaded.passes()


def prepare(
    model: Any,
    tokenizer: Any,
    task: Task | TextStream,
    train: TrainConfig,
    *,
    run: Run,
    out_dir: Path,
    tracker: Tracker,
    stage: str,
    carry: Sequence[Path] = (),
    weights: Weights | None = None,
    offloaded: Offloaded | None = None,
) -> Session:
    """Build everything a step needs, or with `run.resume` bring it back from `out_dir/last`, if that exists, as if
    training had never stopped.

    The files in `carry` are copied into every saved directory. `weights`: of a model that is not filled. `offloaded`:
    where the experts of `model` are, if that is elsewhere. Raises `UsageError` for settings that cannot work, and for a
    disk that is too small or holds no whole state to resume from.
    """
    join()
    # autocast is ours and per run, because Accelerate fixes its precision once per process
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp])
    objective = family_of_model(model).objective
    tokens = sequence_tokens(task, tokenizer, run, train, objective)
    batching = derive_batching(train, tokens, accelerator.num_processes)
    pin_memory = accelerator.device.type == "cuda"
    dtype, device = autocast_dtype(train.precision, accelerator.device), accelerator.device.type
    # products in a short dtype are compiled for each length on a CPU
    multiple = LENGTHS if device == "cpu" and dtype is not None else 1
    share = Share(run, train, objective, batching, accelerator.process_index, pin_memory, multiple)
    feed = build_feed(task, tokenizer, share)
    set_seed(run.seed + accelerator.process_index)
    configure(model, train)
    sharded = shard(model, train.sharding, accelerator.device, accelerator.num_processes)
    if sharded is None:
        model.to(accelerator.device)
    if weights is not None:
        fill(model, *weights)
    optimizer = build_optimizer(model, train)
    checkpoint = None if offloaded is None else offloaded.checkpoint_bytes
    state = restore(model, optimizer, train, run, out_dir, accelerator, sharded, checkpoint)
    # the first stage of a run, the training of its source, may be all that there is of it
    learnt = out_dir / LAST if state.data else out_dir / SOURCE / LAST
    check_data(run, learnt, state.data or data_of(learnt), feed.fingerprint)
    state.data = feed.fingerprint
    with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, and has no replacement of its meaning yet
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        wrapped = model if sharded else accelerator.prepare_model(model)
    # its cache would keep a copy of every weight that was gathered, until the end of the forward pass
    cached = sharded is None
    autocast = functools.partial(torch.autocast, device, dtype=dtype, cache_enabled=cached) if dtype else nullcontext
    distillation = load_distillation(
        train, accelerator.device, dtype, accelerator.num_processes, offloaded and offloaded.teacher
    )
    if distillation is not None and train.distill_data is DistillData.generations:
        assert isinstance(feed, ExampleFeed), "check_objective has refused a text"
        feed.answer(distillation.teacher, out_dir / TEACHER_ANSWERS, autocast)
    if distillation is not None and not distillation.parts():
        distillation = None  # its answers were all that it had to teach
    return Session(
        model=model,
        wrapped=wrapped,
        tokenizer=tokenizer,
        task=task,
        train=train,
        run=run,
        tracker=tracker,
        stage=stage,
        out_dir=out_dir,
        carry=carry,
        accelerator=accelerator,
        optimizer=optimizer,
        autocast=autocast,
        objective=objective,
        feed=feed,
        batching=batching,
        micro_batches=feed.micro_batches(state),
        state=state,
        distillation=distillation,
        sharded=sharded,
        offloaded=offloaded,
    )


def configure(model: Any, train: TrainConfig) -> None:
    """Apply the settings of `train` that live in the model."""
    if train.dropout is not None:
        set_dropout(model, train.dropout)
    if hasattr(model, "set_expert_path") and not lacks_experts(model):
        model.set_expert_path(train.expert_path)
    if train.expert_path != ExpertPath.reference:
        use_fast_dropout(model)
    if train.trainable == Trainable.gates:
        freeze_all_but(model, model.gates())
    elif train.trainable == Trainable.all_but_experts:
        for block in model.moe_blocks():
            block.module.experts.requires_grad_(False)
    elif train.trainable == Trainable.lora:
        add_adapters(model, train.lora)
        for gate in model.gates():
            gate.requires_grad_(True)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def restore(
    model: Any,
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    run: Run,
    out_dir: Path,
    accelerator: Accelerator,
    sharded: ShardedModel | None = None,
    checkpoint_bytes: int | None = None,
) -> TrainState:
    """The state to start from: that of `out_dir/last` when resuming and it exists, a fresh one otherwise."""

    def tidy() -> None:
        for kept in (CHECKPOINT, KEPT):
            recover(out_dir / kept)
        if run.resume:
            settle(out_dir / LAST)

    main_only(tidy, "looking for a saved state")
    found = open_last(out_dir / LAST, model, optimizer, sharded) if run.resume else None
    state, random_states = found or (TrainState(), [])
    saves = -(-(train.steps - state.step) // train.save_every)
    main_only(lambda: check_space(out_dir, model, optimizer, saves, checkpoint_bytes), "looking for space on the disk")
    if found is None:
        return state
    kept = next((out_dir / name for name in (KEPT, CHECKPOINT) if (out_dir / name).is_dir()), None)
    # of a later step it is that of an attempt that did not save its state, and the steps may come out otherwise now
    if train.keep == Keep.best and (kept is None or (step_of(kept) or 0) > state.step):
        state.best_score = state.best_loss = state.best_step = None
    if accelerator.process_index < len(random_states):
        set_random_state(random_states[accelerator.process_index])
    return state
