"""Validation of a model that gives no numbers: told by the first example, whether its loss or a generation shows it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pregate.config import UsageError
from pregate.tasks.tokens import Collator
from pregate.training.validation import validate
from tests.tiny import SEQ2SEQ, pregated_model
from tests.training.copying import SHALLOW, FirstWords, word_tokenizer


def validated(model: Any, **options: Any) -> dict[str, float]:
    tokenizer, task = word_tokenizer(), FirstWords()
    return validate(
        model,
        tokenizer,
        task,
        task.examples("validation"),
        collate=Collator(tokenizer, 10, 4, SEQ2SEQ),
        batch_size=2,
        max_new_tokens=4,
        accelerator=Accelerator(cpu=True),
        autocast=nullcontext,
        **options,
    )


def broken_word(model: Any) -> str:
    """A NaN for one word of the source, and the first example that shows it."""
    word = "w4"
    examples = FirstWords().examples("validation")
    shown = [example.id for example in examples if word in example.source.split()]
    assert 0 < len(shown) < len(examples) and shown[0] != "0", "all or the first, so the test says nothing"
    number = word_tokenizer().convert_tokens_to_ids(word)
    embedding = torch.nn.Embedding.from_pretrained(model.encoder.embed_tokens.weight.detach().clone())
    embedding.weight.data[number] = torch.nan
    model.encoder.embed_tokens = embedding
    return shown[0]


def test_the_first_example_is_named() -> None:
    model = pregated_model(**SHALLOW)
    assert 0 < validated(model)["loss"] < 10
    first = broken_word(model)
    with pytest.raises(
        UsageError, match=rf"validation examples are NaN or infinite, first of '{first}': lower the lea"
    ):
        validated(model)


def test_a_generation_shows_what_the_loss_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation reads its own tokens; here the last row of each of four batches is broken, late."""
    model = pregated_model(**SHALLOW)
    forward = model.forward

    def late(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if output.logits is not None and output.past_key_values.get_seq_length() == 3:
            output.logits[-1, ..., 5] = torch.inf
        return output

    monkeypatch.setattr(model, "forward", late)
    with pytest.raises(UsageError, match=r"Logits or loss of 4 of 7 validation examples are NaN or infinite"):
        validated(model)
    assert validated(model, predicts=False)["loss"] > 0


def test_answers_stop_where_the_collator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = pregated_model(**SHALLOW), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: asked.append(options) or generate(**options))
    monkeypatch.setattr(Collator, "stopping", lambda *_: {"eos_token_id": [1, 5]})
    assert 0 < validated(model)["loss"] < 10
    assert asked and all(options["eos_token_id"] == [1, 5] for options in asked)
