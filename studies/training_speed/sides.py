"""The two sides of the comparison: one step of `pregate.train`, and transformers' own Trainer.

Both learn the same sequences in the same order from the same weights. The order is that of the Trainer's sampler for
batches of like length.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from pregate.config import Run
from pregate.models.family import family_named
from pregate.models.packing_and_padding import Row
from pregate.models.pregating import PreGating
from pregate.system.machine import set_seed
from pregate.tasks.base import Task
from pregate.tasks.registry import build_task
from pregate.tasks.tokens import load_tokenizer
from pregate.tracking import Tracker
from pregate.training.from_scratch import geometry_config, vocabulary_size
from pregate.training.loop import train_step
from pregate.training.session import Session, prepare
from studies.training_speed.compared_models import BATCH_SEQUENCES, LEARNING_RATE, Case


@dataclass
class Data:
    """The examples of a run, and which of them each step sees."""

    task: Task
    tokenizer: Any
    examples: Sequence[Any]
    rows: Sequence[Row]
    steps: list[list[int]]


@dataclass
class Block:
    """A few steps: how long they took, their losses, and their tokens that are not padding."""

    seconds: float
    cpu_seconds: float
    losses: list[float]
    tokens: int


def read_data(run: Run, steps: int, collate_of: Callable[[Any], Any]) -> Data:
    """The examples that `steps` steps need, their tokens, and their order."""
    task, tokenizer = build_task(run), load_tokenizer(run)
    examples = task.examples(run.task.train_split, steps * BATCH_SEQUENCES)
    rows = collate_of(tokenizer).rows(examples)
    lengths = [row.num_tokens for row in rows]
    order = list(LengthGroupedSampler(BATCH_SEQUENCES, lengths=lengths, generator=torch.Generator().manual_seed(0)))
    batches = [order[first : first + BATCH_SEQUENCES] for first in range(0, steps * BATCH_SEQUENCES, BATCH_SEQUENCES)]
    # the sampler's batches go from long to short; a few steps in a row should be like any other few
    shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(1)).tolist()
    return Data(task, tokenizer, examples, rows, [batches[i] for i in shuffled])


def models(run: Run, case: Case, tokenizer: Any) -> tuple[Any, Any]:
    """Ours, and transformers' own with the same weights, which go through files under the family's names."""
    family = family_named(run.model.family)
    set_seed(0)
    ours = family.model_class(geometry_config(run, PreGating(), vocabulary_size(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        described = {key: value for key, value in ours.config.to_dict().items() if key not in ("pregate", "model_type")}
        source: Any = getattr(transformers, family.source_class)
        config = source.config_class(**described)
        stock = source.from_pretrained(folder, config=config, dtype=torch.float32)
    if hasattr(stock, "set_experts_implementation") and family.source_type != "switch_transformers":
        stock.set_experts_implementation(case.stock)
    return ours, stock


class Ours:
    """`pregate.train`, step by step."""

    def __init__(self, model: Any, data: Data, run: Run, out_dir: Path) -> None:
        train = run.train
        AcceleratorState._reset_state()
        self.session: Session = prepare(
            model,
            data.tokenizer,
            data.task,
            train,
            run=run,
            out_dir=out_dir,
            tracker=Tracker(),
            stage="train",
            carry=[],
        )
        self.device = self.session.accelerator.device
        self.batches: Iterator[dict[str, Tensor]] = (
            self.session.feed.collate([data.examples[i] for i in step]) for step in data.steps
        )

    def block(self, steps: int) -> Block:
        """Take so many steps."""
        session, losses, tokens = self.session, [], 0
        clock = Clock(self.device)
        for _ in range(steps):
            batch = next(self.batches)
            count = session.objective.count(batch)
            losses.append(train_step(session, [batch], count)["loss"])
            session.state.step += 1
            tokens += count.source + count.target
        seconds, cpu_seconds = clock()
        return Block(seconds, cpu_seconds, losses, tokens)


class Clock:
    """Seconds since it was made, of the wall and of this process's cores. On a GPU its work is waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun = self._now()

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter(), time.process_time()

    def __call__(self) -> tuple[float, float]:
        wall, cpu = self._now()
        return wall - self._begun[0], cpu - self._begun[1]


LEAST_PAIRS = 3
"""The first one warms up, and an interval needs two."""


@dataclass
class Interleaved(TrainerCallback):
    """Takes a block of our steps before each block of the Trainer's, and stops when time or steps are over.

    The clock of the Trainer runs from the end of our block to the end of the last of its steps.
    """

    ours: Ours
    block_steps: int
    max_seconds: float
    device: torch.device
    pairs: list[tuple[Block, Block]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.block_steps == 0:
            self.block = self.ours.block(self.block_steps)
            self.losses.clear()
            self.clock = Clock(self.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.block_steps:
            return
        seconds, cpu_seconds = self.clock()
        stock = Block(seconds, cpu_seconds, [loss.item() for loss in self.losses], self.block.tokens)
        self.pairs.append((self.block, stock))
        if len(self.pairs) >= LEAST_PAIRS and time.perf_counter() - self.begun > self.max_seconds:
            control.should_training_stop = True


class InOrder(Seq2SeqTrainer):
    """transformers' Trainer on a given order of examples. `kept` gets the loss of each step, still on the device."""

    def __init__(self, order: list[int], kept: list[Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.order, self.kept = order, kept

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.order

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.kept.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss


def features(data: Data, causal: bool) -> list[dict[str, list[int]]]:
    """What the Trainer's collator pads: the tokens that our collator made."""
    found = []
    for row in data.rows:
        source, target = list(row.source), list(row.target)
        if causal:
            found.append({"input_ids": source + target, "labels": [-100] * len(source) + target})
        else:
            found.append({"input_ids": source, "labels": target})
        found[-1]["attention_mask"] = [1] * len(found[-1]["input_ids"])
    return found


def compare(
    ours: Ours, stock: Any, data: Data, *, causal: bool, block_steps: int, max_seconds: float, bf16: bool, out: Path
) -> list[tuple[Block, Block]]:
    """Pairs of neighbouring blocks on the same batches, ours first."""
    device = ours.device
    # accelerate fixes a precision once a process, and the Trainer asks for its own
    AcceleratorState._reset_state()
    watch = Interleaved(ours, block_steps, max_seconds, device)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=BATCH_SEQUENCES,
        max_steps=len(data.steps),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        bf16=bf16,
        optim="adamw_torch_fused",
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        seed=0,
    )
    trainer = InOrder(
        [index for step in data.steps for index in step],
        watch.losses,
        model=stock,
        args=arguments,
        train_dataset=features(data, causal),
        data_collator=DataCollatorForSeq2Seq(data.tokenizer, model=None if causal else stock),
        callbacks=[watch],
    )
    trainer.train()
    return watch.pairs
