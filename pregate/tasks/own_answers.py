"""What a model answers to prompts, greedily, in tokens.

Knows rows, a collator and how `generate` is called; knows nothing about what the answers are for.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor

from pregate.models.objectives import Row
from pregate.tasks.tokens import Collator


def answers(prompts: Sequence[Row], model: Any, generate: Callable[..., Tensor], collate: Collator) -> list[array[int]]:
    """What `model` answers to the sources of `prompts`, one batch: at most `collate.max_target_tokens` tokens each, up
    to and with the first token at which generation stops. `generate`: the model's, or that of the engine that serves
    it."""
    stops = model.generation_config.eos_token_id
    ends = {collate.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    start = model.generation_config.decoder_start_token_id
    inputs = collate.objective.prompts([row.source for row in prompts], collate.padding)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    generated_BT = generate(**inputs, max_new_tokens=collate.max_target_tokens, do_sample=False)
    new_BT = collate.objective.new_tokens(generated_BT, inputs["input_ids"]).tolist()
    return [_up_to_the_end(ids, start, ends) for ids in new_BT]


def _up_to_the_end(ids: Sequence[int], start: int | None, ends: Collection[int]) -> array[int]:
    """What was generated, without the token that a decoder begins with, up to the first of `ends`: behind it stands
    padding."""
    ids = ids[ids[0] == start :]
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return array("i", ids[: first + 1])
