"""Validation during training: loss and scored greedy generation on the first examples of the evaluation split.

Knows a model's forward and `generate`, a collator and `Task.score`; knows nothing about optimizers or files. The full
evaluation of a finished checkpoint is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pregate.config import UsageError
from pregate.models.family import family_of_model
from pregate.models.finite import finite_logits
from pregate.models.objectives import Objective
from pregate.training.sharding import ShardedModel


@torch.no_grad()
def validate(
    model: Any,
    tokenizer: Any,
    task: Any,
    examples: Sequence[Any],
    *,
    predicts: bool = True,
    collate: Any,
    batch_size: int,
    max_new_tokens: int,
    accelerator: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
    sharded: ShardedModel | None = None,
) -> dict[str, float]:
    """Loss per target token and the task's metrics (percent) of the unwrapped `model` on `examples`.

    `collate` makes the batches; `generate` is given its `prompts`. Without `predicts` nothing is generated and the loss
    is all. Examples are split over the processes and the predictions gathered; every process returns the same numbers.
    With a `sharded` model all of them make the same calls: one that has a batch less repeats an example, and one whose
    answers have ended goes on until all have. Raises `UsageError`, in every process, for a loss or for logits of a
    generation that are not finite.
    """
    was_training, objective = model.training, family_of_model(model).objective
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    order = list(range(len(examples)))
    if predicts:  # neighbours in length share a batch; without answers all are alike
        order.sort(key=lambda i: len(examples[i].source))
    mine = order[rank::world]
    predictions: list[tuple[int, str]] = []
    broken: list[int] = []
    sums = torch.zeros(2, dtype=torch.float64)
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    if sharded:
        batches += [[]] * (-(-len(order[::world]) // batch_size) - len(batches))
    for chosen in batches:
        rows = [examples[i] for i in chosen or order[:1]]
        batch = _on(accelerator.device, collate(rows))
        with autocast():
            inputs = objective.inputs(batch)
            loss = model(**inputs, labels=batch["labels"], loss_only=True, use_cache=False).loss.item()
            if chosen:
                sums += torch.tensor([loss, objective.count(batch).target], dtype=torch.float64)
            if not abs(loss) < float("inf"):
                broken += chosen
            if predicts:
                request = {**_on(accelerator.device, collate.prompts(rows)), **collate.stopping(model)}
                with sharded.generating() if sharded else nullcontext():
                    tokens_BT, not_finite = _generate(model, objective, request, max_new_tokens, sharded is not None)
                broken += [chosen[row] for row in not_finite if chosen]
                texts = tokenizer.batch_decode(tokens_BT, skip_special_tokens=True)[: len(chosen)]
                predictions += zip(chosen, (text.strip() for text in texts), strict=True)
    if sharded:
        sharded.let_go()
    model.train(was_training)
    _refuse_broken(gather_object(broken), examples)
    totals = torch.tensor(gather_object([sums.tolist()])).sum(0)
    loss = float(totals[0] / totals[1])
    if not predicts:
        return {"loss": loss}
    everyone = dict(gather_object(predictions))
    scores = task.score([everyone[i] for i in range(len(examples))], [example.references for example in examples])
    return {**scores.overall, "loss": loss}


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _generate(
    model: Any, objective: Objective, request: dict[str, Any], max_new_tokens: int, together: bool
) -> tuple[Tensor, list[int]]:
    """The new tokens (B, T) of greedy generation, and the rows in which logits were not finite. `together`: with as
    many calls as every other process makes."""
    with finite_logits(model) as finite:
        tokens_BT = model.generate(
            **request, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, synced_gpus=together
        )
        return objective.new_tokens(tokens_BT, request["input_ids"]), finite.rows_not_finite()


def _refuse_broken(broken: Sequence[int], examples: Sequence[Any]) -> None:
    """Raises `UsageError` if there are `broken` examples."""
    if broken:
        first = examples[min(broken)]
        raise UsageError(
            f"Logits or loss of {len(set(broken))} of {len(examples)} validation examples are NaN or infinite, "
            f"first of {getattr(first, 'id', min(broken))!r}: lower the learning_rate, set clip_norm or use "
            "precision=fp32 (what was saved so far is kept)."
        )
