"""Training, from a prepared model to its checkpoint: step, log, validate, save, finish.

Knows the order of events. What a step sees is decided in `feeds` and `batch_order`, its loss in `losses` and `distill`,
its update in `optimizer_and_schedule`, and what is written in `saved_state`. Knows nothing about model families, task
formats or trackers.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pregate.config import Keep, UsageError
from pregate.models.family import family_of_model
from pregate.models.objectives import TokenCounts
from pregate.system.process_group import main_only
from pregate.system.stopping import Terminated
from pregate.training import sharded_saved_state
from pregate.training.disk_space import make_room, model_bytes, saved_bytes
from pregate.training.durable_directories import save_model
from pregate.training.losses import loss_share
from pregate.training.not_finite import check_finite, check_weights
from pregate.training.optimizer_and_schedule import clip_gradients, learning_rate, optimizer_bytes, set_learning_rate
from pregate.training.progress import Progress
from pregate.training.run_dir_lock import CHECKPOINT, KEPT, LAST
from pregate.training.saved_state import save_last
from pregate.training.session import Session
from pregate.training.state_values import random_state
from pregate.training.stop_after_step import Interrupts
from pregate.training.validation import validate


@dataclass(frozen=True)
class TrainSummary:
    """The outcome of `fine_tune`. Scores in percent, or the loss where nothing is scored; `metrics` are the last logged
    values; `checkpoint_step` is the step whose state `checkpoint` holds; `peak_device_bytes` is what the caller
    measured around it, if it did."""

    steps: int
    checkpoint: str
    checkpoint_step: int | None
    best_score: float | None = None
    best_step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    target_tokens: int = 0
    peak_device_bytes: int | None = None


def fine_tune(session: Session) -> TrainSummary:
    """Train the model of `session` in place; leave what `train.keep` names in `out_dir/checkpoint`, its latest in
    `out_dir/last`.

    Where experts are offloaded, `out_dir/kept` holds what the model has learnt, of which
    `pregate.training.offloaded.complete` makes the checkpoint.

    Metrics go to the tracker under `{stage}/`, validation under `{stage}/eval/`. Ctrl-C and SIGTERM save `out_dir/last`
    and raise `KeyboardInterrupt` and `Terminated`, in every process after the same step, whichever got the signal.
    Raises `UsageError` for a loss or for weights that are no longer finite, and for a disk that is full.
    """
    state, train, main = session.state, session.train, session.accelerator.is_main_process
    session.tracker.rewind(state.step, session.stage)
    begun = time.perf_counter() - state.elapsed_seconds
    progress = Progress(session.stage, state.step, train.steps, train.log_every, main)
    with Interrupts() as interrupts, progress:
        while state.step < train.steps:
            started = time.perf_counter()
            micro_batches, tokens, stop = next_step(session, interrupts)
            if stop:
                save(session)
                raise stop
            metrics = train_step(session, micro_batches, tokens)
            advance(session, metrics, tokens, time.perf_counter() - started)
            progress.update(state.step, metrics["loss"], metrics["tokens_per_s"])
            if due(state.step, train.eval_every, train.steps):
                progress.note(evaluate(session))
            state.elapsed_seconds = time.perf_counter() - begun
            if due(state.step, train.save_every, train.steps):
                save(session)
        _, stop = agreed(session, TokenCounts(), interrupts)
        if stop:
            raise stop
    return finish(session)


def due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def next_step(
    session: Session, interrupts: Interrupts
) -> tuple[list[dict[str, Tensor]], TokenCounts, type[KeyboardInterrupt] | None]:
    """This process's micro batches of the next step, the tokens of the whole global batch, and how to stop, if at all.

    All processes agree on the last two.
    """
    batches: list[dict[str, Tensor]] = []
    count = len(session.batching.micro_batches(range(session.batching.batch_sequences), session.rank))
    try:
        while len(batches) < count and not interrupts.pending:
            batches.append(next(session.micro_batches))
    except RuntimeError:
        if not interrupts.pending:  # else the signal went to all processes, and the loader's workers have died of it
            raise
    own = sum((session.objective.count(batch) for batch in batches), TokenCounts())
    tokens, stop = agreed(session, own, interrupts)
    return batches, tokens, stop


def agreed(
    session: Session, own: TokenCounts, interrupts: Interrupts
) -> tuple[TokenCounts, type[KeyboardInterrupt] | None]:
    """The tokens of all processes, and what to raise if any of them was asked to stop: Ctrl-C before SIGTERM."""
    asked = [int(interrupts.first == number) for number in (signal.SIGINT, signal.SIGTERM)]
    told = torch.tensor([own.source, own.target, *asked], device=session.accelerator.device)
    source, target, pressed, ended = session.accelerator.reduce(told, "sum").tolist()  # type: ignore[union-attr]
    return TokenCounts(source, target), KeyboardInterrupt if pressed else Terminated if ended else None


def train_step(session: Session, micro_batches: list[dict[str, Tensor]], tokens: TokenCounts) -> dict[str, float]:
    """One optimizer step over the global batch. Returns its losses, gradient norm and learning rate.

    Raises `UsageError`, before the update, if loss or gradients are no longer finite.
    """
    accelerator, optimizer, train = session.accelerator, session.optimizer, session.train
    if session.offloaded:
        session.offloaded.start_clock()
    rate = learning_rate(train, session.state.step)
    set_learning_rate(optimizer, rate)
    sums = torch.zeros(len(part_names(session)), device=accelerator.device)
    totals: list[Tensor] = []
    for batch, weight, no_sync in micro_steps(session, micro_batches):
        with no_sync, session.passes():
            total, parts = forward(session, batch, tokens)
            # DDP and FSDP average gradients over processes, while shares are meant to add up
            accelerator.backward(total * weight * accelerator.num_processes)
        sums += weight * parts
        totals += [total.detach()] * weight
    if session.sharded:
        session.sharded.drop_unused()
    losses = dict(zip(part_names(session), accelerator.reduce(sums, "sum").tolist(), strict=True))  # type: ignore[union-attr]
    norm = clip_gradients(session.model.parameters(), train.clip_norm).item()
    fetched = session.offloaded.figures() if session.offloaded else {}
    check_finite(session, losses["loss"], norm, totals)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**losses, "grad_norm": norm, "lr": rate, **fetched}


def micro_steps(
    session: Session, micro_batches: list[dict[str, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], int, AbstractContextManager[Any]]]:
    """The micro batches of a step, the weight of each, and the context to run it in.

    DDP sums gradients with the last one. A sharded model sums them with each, because it would have to keep all of them
    whole; and its processes must run equally many, so the last one is repeated with no weight where there is one less.
    """
    for index in range(session.batching.accumulation_steps if session.sharded else len(micro_batches)):
        batch, last = micro_batches[min(index, len(micro_batches) - 1)], index == len(micro_batches) - 1
        alone = nullcontext() if last or session.sharded else session.accelerator.no_sync(session.wrapped)
        yield batch, int(index < len(micro_batches)), alone


def part_names(session: Session) -> list[str]:
    """The terms of the loss, as logged; `loss` is the cross-entropy."""
    return ["loss", "balance", "z", *(session.distillation.parts() if session.distillation else [])]


def forward(session: Session, batch: dict[str, Tensor], tokens: TokenCounts) -> tuple[Tensor, Tensor]:
    """The loss share of one micro batch to differentiate, and its unweighted `part_names`, detached.

    Router logits are asked for only where a loss on them has weight, output logits never.
    """
    train, distillation = session.train, session.distillation
    batch = {key: value.to(session.accelerator.device, non_blocking=True) for key, value in batch.items()}
    inputs: dict[str, Any] = session.objective.inputs(batch) | {"labels": batch["labels"], "loss_only": True}
    routed = bool(train.balance_loss or train.z_loss or train.distill_routing)
    with session.autocast():
        # the teacher first: its activations are gone before the student's are kept
        taught = distillation.answer(batch) if distillation else None
        if distillation:
            inputs["lesson"] = distillation.lesson(taught)
        outputs = session.wrapped(**inputs, output_router_logits=routed, use_cache=False)
    share = loss_share(
        outputs,
        batch,
        tokens,
        objective=session.objective,
        balance_weight=train.balance_loss,
        z_weight=train.z_loss,
        scores=family_of_model(session.model).scores,
    )
    if distillation is None:
        return share.total, share.parts()
    lesson = distillation.share(outputs, taught, batch, tokens)
    return share.total + lesson.total, torch.cat([share.parts(), torch.stack([*lesson.parts.values()]).detach()])


def advance(session: Session, metrics: dict[str, float], tokens: TokenCounts, seconds: float) -> None:
    """Count the finished step, add its speed to `metrics`, and log them when due."""
    state, train = session.state, session.train
    state.step += 1
    state.sequences += session.batching.batch_sequences
    session.feed.mark(state)
    state.source_tokens += tokens.source
    state.target_tokens += tokens.target
    metrics["tokens_per_s"] = (tokens.source + tokens.target) / seconds
    if due(state.step, train.log_every, train.steps) or state.step == 1:
        log(session, {**metrics, "epoch": state.epoch})


def log(session: Session, metrics: dict[str, float], prefix: str = "") -> None:
    named = {f"{session.stage}/{prefix}{key}": value for key, value in metrics.items()}
    session.state.metrics.update(named)
    session.tracker.log(named, session.state.step)


def evaluate(session: Session) -> str:
    """Validate, log, and keep the model in `out_dir/checkpoint` if it is the one to keep so far; a line to print."""
    state, train = session.state, session.train
    with session.passes():
        metrics = validate(
            session.model,
            session.tokenizer,
            session.task,
            session.feed.eval_examples,
            collate=session.feed.collate,
            predicts=session.feed.predicts,
            batch_size=session.run.eval.batch_size,
            max_new_tokens=session.run.task.max_target_tokens,
            accelerator=session.accelerator,
            autocast=session.autocast,
            sharded=session.sharded,
        )
    log(session, metrics, prefix="eval/")
    score, loss = metrics[session.task.primary_metric], metrics["loss"]
    best = state.improves(score, loss, lower=not session.feed.predicts)
    if best:
        state.best_score, state.best_loss, state.best_step = score, loss, state.step
    if best if train.keep == Keep.best else state.step == train.steps:

        def write() -> None:
            make_room(session.out_dir / LAST, saved_bytes(session.model))
            kept = KEPT if session.offloaded else CHECKPOINT
            save_model(session.out_dir / kept, session.model, session.tokenizer, session.carry, state.step)

        if session.sharded:
            save_sharded_checkpoint(session)
        else:
            main_only(write, "writing the checkpoint")
    shown = "  ".join(f"{key} {value:.2f}" for key, value in metrics.items())
    return f"step {state.step}  validation {shown}" + ("  (best)" if best else "")


def save(session: Session) -> None:
    """Write `out_dir/last`, from which `run.resume` continues."""
    random_states = gather_object([random_state()])
    if session.sharded:
        save_parts(session, random_states)
        return

    def write() -> None:
        check_weights(session)
        session.tracker.sync()  # first: what a durable state has behind it is not logged again
        make_room(session.out_dir / LAST, saved_bytes(session.model) + optimizer_bytes(session.optimizer))
        save_last(
            session.out_dir / LAST,
            session.model,
            session.tokenizer,
            session.optimizer,
            session.state,
            random_states,
            session.carry,
            session.train.keep_last,
        )

    main_only(write, "saving the state")


def save_parts(session: Session, random_states: list[dict[str, Any]]) -> None:
    """As `save`, where every process has a part of the model."""
    directory, model, optimizer = session.out_dir / LAST, session.model, session.optimizer

    def make_ready() -> None:
        session.tracker.sync()
        make_room(directory, model_bytes(model) + optimizer_bytes(optimizer))

    sharded_saved_state.of_all(lambda: check_weights(session) or [])
    main_only(make_ready, "looking for space on the disk")
    sharded_saved_state.save_last(directory, model, optimizer, session.state, random_states, session.train.keep_last)


def save_sharded_checkpoint(session: Session) -> None:
    assert session.sharded
    model, layers, step = session.model, session.sharded.layers, session.state.step
    main_only(lambda: make_room(session.out_dir / LAST, model_bytes(model)), "looking for space on the disk")
    place = session.out_dir / CHECKPOINT
    sharded_saved_state.save_checkpoint(place, model, layers, session.tokenizer, session.carry, step)


def finish(session: Session) -> TrainSummary:
    """The summary; the model is left in evaluation mode. Raises `UsageError` for a lost checkpoint."""
    state, checkpoint = session.state, session.out_dir / CHECKPOINT
    if not checkpoint.is_dir() and not (session.offloaded and (session.out_dir / KEPT).is_dir()):
        raise UsageError(
            f"{checkpoint} is gone, and no step is left that could make it again: put it back, or train in another "
            "run_dir=DIR."
        )
    session.model.eval()
    return TrainSummary(
        steps=state.step,
        best_score=state.best_score,
        best_step=state.best_step,
        metrics=dict(state.metrics),
        seconds=state.elapsed_seconds,
        target_tokens=state.target_tokens,
        checkpoint=str(checkpoint),
        checkpoint_step=state.best_step if session.train.keep == Keep.best else state.step,
    )
