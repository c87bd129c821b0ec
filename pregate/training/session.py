"""Everything a training run is made of, put together before the first step or brought back from disk.

Knows Accelerate, data loaders and which setting belongs where; knows nothing about the order of training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor

from pregate.config import Run, TrainConfig, UsageError
from pregate.runtime import set_seed
from pregate.training.batching import Batching, MicroBatchSampler, derive_batching
from pregate.training.checkpoint import TrainState, load_last, recover, set_random_state
from pregate.training.optim import autocast_dtype, build_optimizer, set_dropout

if TYPE_CHECKING:
    from pregate.tasks.base import Example, Task
    from pregate.tracking import Tracker


@dataclass
class Session:
    """The live objects of one training run; `wrapped` is `model` as Accelerate runs it."""

    model: Any
    wrapped: Any
    tokenizer: Any
    task: Task
    train: TrainConfig
    run: Run
    tracker: Tracker
    stage: str
    out_dir: Path
    carry: Sequence[Path]
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager[Any]]
    collate: Callable[[Sequence[Example]], dict[str, Tensor]]
    batching: Batching
    micro_batches: Iterator[dict[str, Tensor]]
    num_examples: int
    eval_examples: list[Example]
    state: TrainState

    @property
    def rank(self) -> int:
        return self.accelerator.process_index


def prepare(
    model: Any,
    tokenizer: Any,
    task: Task,
    train: TrainConfig,
    *,
    run: Run,
    out_dir: Path,
    tracker: Tracker,
    stage: str,
    carry: Sequence[Path],
) -> Session:
    """Build everything a step needs, or bring it back from `out_dir/last`. Raises `UsageError`."""
    from pregate.tasks.text import Collator

    # autocast is ours and per run, because Accelerate fixes its precision once per process
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ddp])
    allowed = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in allowed:
        raise UsageError(
            f"Training runs on one process or under DDP, not {accelerator.distributed_type.value}: "
            "start it with `accelerate launch --multi_gpu` or plain python."
        )
    batching = derive_batching(train, run.task.max_source_tokens, accelerator.num_processes)
    examples = task.examples(run.task.train_split, run.data.max_train_examples)
    eval_examples = task.examples(run.task.eval_split, train.eval_examples)
    for split, found in ((run.task.train_split, examples), (run.task.eval_split, eval_examples)):
        if not found:
            raise UsageError(f"The {split} split of task {run.task.name} has no examples: check its files.")
    set_seed(run.seed + accelerator.process_index)
    configure(model, train)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, train)
    state = restore(model, optimizer, run, out_dir, accelerator)
    collate = Collator(tokenizer, run.task.max_source_tokens, run.task.max_target_tokens)
    dtype, device = autocast_dtype(train.precision, accelerator.device), accelerator.device.type
    return Session(
        model=model,
        wrapped=accelerator.prepare_model(model),
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
        autocast=functools.partial(torch.autocast, device, dtype=dtype) if dtype else nullcontext,
        collate=collate,
        batching=batching,
        micro_batches=iter(build_loader(examples, collate, batching, train, run, state.step, accelerator)),
        num_examples=len(examples),
        eval_examples=eval_examples,
        state=state,
    )


def configure(model: Any, train: TrainConfig) -> None:
    """Apply the settings of `train` that live in the model."""
    if train.dropout is not None:
        set_dropout(model, train.dropout)
    if hasattr(model, "set_expert_path"):
        model.set_expert_path(train.expert_path)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def restore(
    model: Any, optimizer: torch.optim.Optimizer, run: Run, out_dir: Path, accelerator: Accelerator
) -> TrainState:
    """The state to start from: that of `out_dir/last` when resuming and it exists, a fresh one otherwise."""
    if accelerator.is_main_process:
        recover(out_dir / "checkpoint")
        recover(out_dir / "last")
    accelerator.wait_for_everyone()
    found = load_last(out_dir / "last", model, optimizer) if run.resume else None
    if found is None:
        return TrainState()
    state, random_states = found
    if not (out_dir / "checkpoint").is_dir():
        state.best_score = state.best_loss = state.best_step = None
    if accelerator.process_index < len(random_states):
        set_random_state(random_states[accelerator.process_index])
    return state


def build_loader(
    examples: list[Example],
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    batching: Batching,
    train: TrainConfig,
    run: Run,
    first_step: int,
    accelerator: Accelerator,
) -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    """This process's micro batches from `first_step` to the end."""
    sampler = MicroBatchSampler(
        [len(example.source) for example in examples],
        batching,
        seed=run.seed,
        first_step=first_step,
        last_step=train.steps,
        rank=accelerator.process_index,
    )
    return torch.utils.data.DataLoader(
        examples,  # type: ignore[arg-type]
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=run.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # a generator of its own, so that starting the loader does not move the state that dropout draws from
        generator=torch.Generator(),
    )
