"""Validation during training: loss and scored greedy generation on the first examples of the evaluation split.

Knows a model's forward and `generate`, a collator and `Task.score`; knows nothing about optimizers or files. The full
evaluation of a finished checkpoint is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

from pregate.training.losses import TokenCounts, cross_entropy_sum

if TYPE_CHECKING:
    from pregate.tasks.base import Example, Task


def decoder_inputs(model: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Teacher-forcing inputs: `labels` (B, T) shifted right by the model, which then spares a loss of its own."""
    return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}


@torch.no_grad()
def validate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Example],
    *,
    collate: Callable[[Sequence[Example]], dict[str, torch.Tensor]],
    batch_size: int,
    max_new_tokens: int,
    accelerator: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """Loss per target token and the task's metrics (percent) of the unwrapped `model` on `examples`.

    Examples are split over the processes and the predictions gathered; every process returns the same numbers.
    """
    was_training = model.training
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    # neighbours in length share a batch, and each process gets every world-th of them
    mine = sorted(range(len(examples)), key=lambda i: len(examples[i].source))[rank::world]
    predictions: list[tuple[int, str]] = []
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(mine), batch_size):
        chosen = mine[start : start + batch_size]
        batch = {k: v.to(accelerator.device) for k, v in collate([examples[i] for i in chosen]).items()}
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with autocast():
            logits_BTV = model(**inputs, **decoder_inputs(model, batch["labels"]), use_cache=False).logits
            tokens_BT = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        loss = cross_entropy_sum(logits_BTV, batch["labels"]).item()
        sums += torch.tensor([loss, TokenCounts.of(batch).target], dtype=torch.float64)
        texts = tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)
        predictions += zip(chosen, (text.strip() for text in texts), strict=True)
    model.train(was_training)
    everyone = dict(gather_object(predictions))
    totals = torch.tensor(gather_object([sums.tolist()])).sum(0)
    scores = task.score([everyone[i] for i in range(len(examples))], [example.references for example in examples])
    return {**scores.overall, "loss": float(totals[0] / totals[1])}
