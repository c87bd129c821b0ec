"""What a model answers to prompts, greedily, in tokens.

Knows rows, a collator and how `generate` is called; knows nothing about what the answers are for.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pregate.models.objectives import until_end
from pregate.models.packing_and_padding import Row
from pregate.tasks.tokens import Collator


def answers(prompts: Sequence[Row], model: Any, generate: Callable[..., Tensor], collate: Collator) -> list[array[int]]:
    """What `model` answers to the sources of `prompts`, one batch: at most `collate.max_target_tokens` tokens each, up
    to and with the first token at which generation stops. `generate`: the model's, or that of the engine that serves
    it."""
    inputs = collate.objective.prompts([row.source for row in prompts], collate.padding)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    stopping = collate.stopping(model)
    limit = collate.max_target_tokens
    generated_BT = generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1, **stopping)
    new_BT = collate.objective.new_tokens(generated_BT, inputs["input_ids"])
    start = model.generation_config.decoder_start_token_id
    end = stopping.get("eos_token_id", model.generation_config.eos_token_id)
    # a decoder of its own begins with a token that it has not said
    new_BT = new_BT[:, int(new_BT[0, 0] == start) :]
    said_BT = until_end(new_BT, end) & until_end(new_BT, collate.tokenizer.eos_token_id)
    return [array("i", new_T[said_T].tolist()) for new_T, said_T in zip(new_BT, said_BT, strict=True)]
