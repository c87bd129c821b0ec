"""A conversation goes on from the KV cache of the turns before, and says what a fresh run on the whole text says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from pregate.config import UsageError
from pregate.engine.engine import OffloadEngine
from tests.engine.families import SOURCES, Source, checkpoint
from tests.engine.hostile import Streamer
from tests.engine.olmoe import olmoe, prompts
from tests.engine.serving import Served

PAD = 5
"""A word like any other, whose embedding is not zero."""
PLAIN: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return olmoe()


@pytest.fixture(params=[4096, 3], ids=["whole", "chunks"])
def engine(model: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("olmoe")
    model.save_pretrained(directory)
    with OffloadEngine.open(directory, device_budget="20%", prefill_chunk=request.param) as opened:
        yield opened
        assert opened.counters.bytes_moved > 0


def fresh(model: Any, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return model.generate(input_ids=tokens, attention_mask=mask, **PLAIN | options)[:, tokens.shape[1] :]


@pytest.mark.parametrize("rows", [1, 3])
def test_every_turn_equals_a_fresh_run_on_the_whole_text(model: Any, engine: Any, rows: int) -> None:
    talk, read = engine.conversation(), []
    engine.model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    tokens = mask = torch.empty(rows, 0, dtype=torch.long)
    for turn in range(3):
        said = prompts(rows, length=6 + turn, padding=2, seed=turn)
        tokens, mask = torch.cat([tokens, said["input_ids"]], 1), torch.cat([mask, said["attention_mask"]], 1)
        read.clear()
        reply = talk.reply(**said, **PLAIN, eos_token_id=None)
        assert torch.equal(reply, fresh(model, tokens, mask, eos_token_id=None))
        # of the text before, the last token alone was not read
        assert sum(read) == 6 + turn + (turn > 0) + 3
        tokens, mask = torch.cat([tokens, reply], 1), torch.cat([mask, torch.ones_like(reply)], 1)
        assert torch.equal(talk.tokens, tokens) and torch.equal(talk.mask, mask)


def test_a_generation_config_of_the_caller_leaves_the_rest_to_the_models_own(model: Any, engine: Any) -> None:
    """Upstream fills what it does not say from the model's: here the token at which the first row ends early."""
    said = prompts(3)
    first = model.generate(**said, **PLAIN, eos_token_id=None)[:, said["input_ids"].shape[1] :]
    own = engine.model.generation_config
    own.eos_token_id = int(first[0, 1])
    try:
        talks = engine.conversation(), engine.conversation()
        talks[0].reply(**said, **PLAIN)
        talks[1].reply(**said, generation_config=GenerationConfig(**PLAIN))
        own.use_cache = False
        engine.generate(**prompts(1), generation_config=GenerationConfig(**PLAIN))  # upstream reads no chunks then
    finally:
        own.eos_token_id, own.use_cache = None, True
    assert torch.equal(talks[0].tokens, talks[1].tokens) and torch.equal(talks[0].mask, talks[1].mask)
    assert not talks[1].mask[0, -2:].any() and talks[1].mask[1:, -4:].any()


def test_padding_behind_an_early_end_is_no_text(model: Any, engine: Any) -> None:
    said = prompts(3)
    first = fresh(model, **said_to(said), eos_token_id=None)
    end = int(first[0, 1])  # where the first row ends after two tokens
    talk = engine.conversation()
    reply = talk.reply(**said, **PLAIN, eos_token_id=[end, 95])
    assert reply[0].tolist() == [*first[0, :2].tolist(), 0, 0]
    mask = torch.cat([said["attention_mask"], torch.ones_like(reply)], 1)
    mask[0, -2:] = 0
    assert torch.equal(talk.mask[0], mask[0])
    more = prompts(3, seed=1)
    tokens = torch.cat([talk.tokens, more["input_ids"]], 1)
    whole = torch.cat([talk.mask, more["attention_mask"]], 1)
    expected = fresh(model, tokens, whole, eos_token_id=None)
    assert torch.equal(talk.reply(**more, **PLAIN, eos_token_id=None), expected)


def said_to(said: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"tokens": said["input_ids"], "mask": said["attention_mask"]}


def test_a_turn_that_was_cut_short_can_be_repeated(model: Any, engine: Any) -> None:
    talk, calls = engine.conversation(), []

    def interrupt(_: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    first = talk.reply(**prompts(1), **PLAIN)
    before = talk.tokens.clone()
    with pytest.raises(KeyboardInterrupt):
        talk.reply(**prompts(1, seed=1), **PLAIN, streamer=Streamer(interrupt))
    assert torch.equal(talk.tokens, before) and first.numel()
    tokens = torch.cat([before, prompts(1, seed=1)["input_ids"]], 1)
    assert torch.equal(talk.reply(**prompts(1, seed=1), **PLAIN), fresh(model, tokens, torch.ones_like(tokens)))


def test_what_a_conversation_cannot_be_is_refused(engine: Any, served: Served) -> None:
    talk = engine.conversation()
    talk.reply(**prompts(2), **PLAIN)
    with pytest.raises(UsageError, match="has 2 rows, not 1: give a turn for each"):
        talk.reply(**prompts(1), **PLAIN)
    with pytest.raises(UsageError, match="leave num_beams at 1"):
        talk.reply(**prompts(2), num_beams=2)
    with pytest.raises(UsageError, match="Where stop_strings ends a row among several is not known"):
        talk.reply(**prompts(2), stop_strings=["x"])
    with (
        OffloadEngine.open(served.directory) as other,
        pytest.raises(UsageError, match="A conversation needs a decoder-only model"),
    ):
        other.conversation()


def test_a_cache_of_ones_own_works_with_generate(model: Any, engine: Any) -> None:
    """As with upstream's `generate`: the whole text, and the cache that an earlier call gave."""
    asked = prompts(1)
    first = engine.generate(**asked, **PLAIN, eos_token_id=None, return_dict_in_generate=True)
    text = torch.cat([first.sequences, prompts(1, seed=1)["input_ids"]], 1)
    mask, read = torch.ones_like(text), []
    engine.model.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    second = engine.generate(
        input_ids=text, attention_mask=mask, past_key_values=first.past_key_values, **PLAIN, eos_token_id=None
    )
    assert torch.equal(second[:, text.shape[1] :], fresh(model, text, mask, eos_token_id=None))
    # of the text before, the last token alone was not read
    assert sum(read) == text.shape[1] - first.sequences.shape[1] + 1 + 3


def side_by_side(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the left."""
    longest = max(map(len, rows))
    missing = [longest - len(row) for row in rows]
    ids = [[PAD] * number + row for number, row in zip(missing, rows, strict=True)]
    mask = [[0] * number + [1] * len(row) for number, row in zip(missing, rows, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("source", [source for source in SOURCES if source.form == "float32"], ids=str)
def test_every_family_answers_each_row_as_if_it_were_alone(families: Path, source: Source) -> None:
    """Turns of different lengths, rows that end early, and prompts in chunks shorter than the padding."""
    directory, model = checkpoint(families, source, "early")
    draw = torch.Generator().manual_seed(3)

    def alone(text: list[int], ends: Any) -> list[int]:
        return fresh(model, *side_by_side([text]).values(), eos_token_id=ends, pad_token_id=PAD)[0].tolist()

    texts: list[list[int]] = [[], [], []]
    ends = None
    with OffloadEngine.open(directory, device_budget="40%") as engine:
        talk = engine.conversation()
        for chunk, lengths in (1, (3, 8, 12)), (3, (9, 6, 2)), (4096, (2, 2, 5)):
            engine.prefill_chunk = chunk
            said = [torch.randint(2, 61, (length,), generator=draw).tolist() for length in lengths]
            texts = [text + turn for text, turn in zip(texts, said, strict=True)]
            ends = ends or [alone(texts[0], None)[1]]  # the first row ends after two tokens
            replies = talk.reply(**side_by_side(said), **PLAIN, eos_token_id=ends, pad_token_id=PAD).tolist()
            expected = [alone(text, ends) for text in texts]
            assert [reply[: len(row)] for reply, row in zip(replies, expected, strict=True)] == expected
            assert [text.tolist() for text in map(torch.masked_select, talk.tokens, talk.mask.bool())] == [
                text + row for text, row in zip(texts, expected, strict=True)
            ]
            texts = [text + row for text, row in zip(texts, expected, strict=True)]
        assert engine.counters.bytes_moved > 0 and len({token for row in expected for token in row}) > 3
