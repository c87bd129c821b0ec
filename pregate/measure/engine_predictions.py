"""Predictions through an engine.

Knows engines, tokenizers and tasks' examples; knows nothing about where results are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pregate.config import UsageError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.measure.equality import watched
from pregate.models.finite import WHAT_TO_CHECK
from pregate.tasks.base import Example
from pregate.tasks.tokens import Collator


def length_sorted_batches(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar source length, which wastes the least padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].source))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def predict(
    engine: OffloadEngine | DeviceEngine,
    tokenizer: Any,
    examples: Sequence[Example],
    collate: Collator,
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
    progress: Callable[[int], None] = lambda done: None,
    name: str = "the model",
) -> list[str]:
    """The decoded prediction of each example, in order; greedy, or the best of `num_beams`. Raises `UsageError` that
    names the model (`name`) and an example for which its logits are not finite."""
    device = engine.model.device
    predictions = [""] * len(examples)
    for batch in length_sorted_batches(examples, batch_size):
        inputs = collate.prompts([examples[i] for i in batch])
        with watched(engine) as rows_not_finite:
            tokens_BT = engine.generate(
                input_ids=inputs["input_ids"].to(device),
                attention_mask=inputs["attention_mask"].to(device),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                **collate.stopping(engine.model),
            )
            refuse_not_finite(rows_not_finite(), [examples[i] for i in batch for _ in range(num_beams)], name, engine)
        new_BT = collate.objective.new_tokens(tokens_BT, inputs["input_ids"])
        texts = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        for index, text in zip(batch, texts, strict=True):
            predictions[index] = text.strip()
        progress(len(batch))
    return predictions


def refuse_not_finite(
    rows: Sequence[int], examples: Sequence[Example], name: str, engine: OffloadEngine | DeviceEngine
) -> None:
    """Raises `UsageError` that names the first example of `rows`, whose logits are not finite."""
    if rows:
        raise UsageError(
            f"{name} cannot be scored: its logits for example {examples[rows[0]].id!r} are NaN or infinite (policy "
            f"{engine.policy}): {WHAT_TO_CHECK}."
        )
