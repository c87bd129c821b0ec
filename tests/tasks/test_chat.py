"""Conversations: their tokens against `apply_chat_template`, where they are cut, and which records are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pregate.cli import compose_run
from pregate.config import Learn, TaskConfig, UsageError
from pregate.models.objectives import Causal
from pregate.tasks.base import Example, Message
from pregate.tasks.conversation_tokens import ChatTemplate
from pregate.tasks.registry import build_task
from pregate.tasks.tokens import Collator, load_tokenizer
from tests.tiny import SEQ2SEQ

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
NOT_CUT = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}now you:{% endif %}"
LAST_OTHERWISE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA}
TURNS = (
    Message("system", "Be brief."),
    Message("user", "Who wrote the book?"),
    Message("assistant", "Ada wrote it."),
    Message("user", "When was that?\n"),
    Message("assistant", "In the year 1843."),
)
SHORT = Example("q", "What is it?", "A short book.", ("A short book.",))
LONG = Example("chat", "…", TURNS[-1].content, (TURNS[-1].content,), TURNS)


def chat_tokenizer(template: str | None) -> Any:
    """Byte-level BPE with merges across spaces and line ends, and a beginning of its own for every text."""
    texts = [f"{m.role}\n\n{m.content}" for m in TURNS] + [SHORT.source, SHORT.target]
    specials = ["<pad>", "<|im_end|>", "<s>", "<|im_start|>", "<|head|>", "<|/head|>", "<|eot|>"]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts * 3, trainer)
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    eos = "<|eot|>" if template == LLAMA else "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token=eos, bos_token="<s>")
    tokenizer.chat_template = template
    return tokenizer


def collator(tokenizer: Any, **settings: Any) -> Collator:
    sizes = {"max_source_tokens": 200, "max_target_tokens": 100}
    return Collator.for_task(TaskConfig(**{**sizes, **settings}), tokenizer, Causal("decoder"))


def templated(tokenizer: Any, messages: Any, answering: bool = False) -> list[int]:
    turns = [message._asdict() for message in messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=answering)["input_ids"]


def learnt_text(tokenizer: Any, batch: Any, row: int = 0) -> str:
    return tokenizer.decode([label for label in batch["labels"][row].tolist() if label != -100])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("example", [SHORT, LONG], ids=["task", "conversation"])
def test_tokens_are_those_of_the_template(name: str, example: Example) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    collate = collator(tokenizer)
    whole = templated(tokenizer, example.conversation)
    assert collate([example])["input_ids"].tolist() == [whole]
    prompt = templated(tokenizer, example.conversation[:-1], answering=True)
    assert collate.prompts([example])["input_ids"].tolist() == [prompt]
    assert whole[: len(prompt)] == prompt and len(prompt) > 3
    assert (whole[0] == tokenizer.bos_token_id) == (name == "llama") and whole.count(tokenizer.bos_token_id) <= 1


ENDS = {"chatml": "<|im_end|>\n", "llama": "<|eot|>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_answers_are_learnt_or_the_last_or_everything(name: str) -> None:
    tokenizer, end = chat_tokenizer(TEMPLATES[name]), ENDS[name]
    first, last = (message.content for message in TURNS if message.role == "assistant")
    learnt = {learn: learnt_text(tokenizer, collator(tokenizer, learn=learn)([LONG])) for learn in Learn}
    assert learnt[Learn.answers] == f"{first}{end}{last}{end}"
    assert learnt[Learn.last_answer] == f"{last}{end}"
    assert learnt[Learn.everything] == tokenizer.decode(templated(tokenizer, TURNS)[1:])
    assert learnt_text(tokenizer, collator(tokenizer)([LONG, SHORT]), 1) == f"A short book.{end}"


def test_a_template_that_cannot_be_cut_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"cannot be cut where the assistant's turn begins.*task.chat_template=null"):
        collator(chat_tokenizer(NOT_CUT))
    with pytest.raises(UsageError, match=r"cannot write a user's turn and an answer \(.*no users"):
        collator(chat_tokenizer("{{ raise_exception('no users') }}"))
    assert collator(chat_tokenizer(NOT_CUT), chat_template=None).chat is None


def test_a_template_that_writes_earlier_answers_otherwise_teaches_the_last() -> None:
    tokenizer = chat_tokenizer(LAST_OTHERWISE)
    with pytest.raises(UsageError, match=r"Example 'chat'.*task.learn=last_answer"):
        collator(tokenizer)([LONG])
    batch = collator(tokenizer, learn=Learn.last_answer)([LONG])
    assert learnt_text(tokenizer, batch) == "In the year 1843.<|im_end|>\n"


def test_a_prompt_that_is_too_long_loses_its_first_turns_and_then_its_end() -> None:
    tokenizer = chat_tokenizer(CHATML)
    full = templated(tokenizer, TURNS[:-1], answering=True)
    kept = (TURNS[0], *TURNS[3:])
    shorter = templated(tokenizer, kept[:-1], answering=True)
    assert len(shorter) < len(full) - 1
    batch = collator(tokenizer, max_source_tokens=len(full) - 1)([LONG])
    assert batch["input_ids"].tolist() == [templated(tokenizer, kept)]
    least = collator(tokenizer, max_source_tokens=len(shorter) - 3)
    text = tokenizer.decode(least.prompts([LONG])["input_ids"][0])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhen was")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and "that?" not in text
    assert learnt_text(tokenizer, least([LONG])) == "In the year 1843.<|im_end|>\n"
    with pytest.raises(UsageError, match=r"Example 'q': task.max_source_tokens leaves no room"):
        collator(tokenizer, max_source_tokens=4)([SHORT])


def test_an_answer_is_never_cut_silently(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chat_tokenizer(CHATML)
    tokens = len(templated(tokenizer, SHORT.conversation)) - len(templated(tokenizer, SHORT.conversation[:1], True))
    batch = collator(tokenizer, max_target_tokens=tokens - 1)([SHORT])
    learnt = learnt_text(tokenizer, batch)
    assert learnt.endswith("<|im_end|>\n") and "A short book.".startswith(learnt.removesuffix("<|im_end|>\n"))
    assert (batch["labels"] != -100).sum() <= tokens - 1
    told = capsys.readouterr().err
    assert f"task.max_target_tokens={tokens - 1} tokens are cut, the first is 'A short book.'" in told


def test_what_joins_the_prompt_is_learnt_and_the_tokens_stay_the_templates() -> None:
    tokenizer = chat_tokenizer(CHATML)
    odd = Example("odd", "x", "\nline", ("line",))
    whole = templated(tokenizer, odd.conversation)
    batch = collator(tokenizer)([odd])
    assert batch["input_ids"].tolist() == [whole] and learnt_text(tokenizer, batch).endswith("line<|im_end|>\n")


def records(tmp_path: Path, *rows: dict[str, Any]) -> list[str]:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return ["task=chat", f"task.files.train={tmp_path}/rows.jsonl", "tracking=jsonl"]


GOOD = [{"role": role, "content": content} for role, content in TURNS]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_conversations_are_read(form: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arguments = records(tmp_path, {"key": "a", "messages": GOOD}, {"key": "b", "messages": GOOD[1:3]})
    if form == "parquet":
        rows = [{"key": "a", "messages": GOOD}, {"key": "b", "messages": GOOD[1:3]}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        arguments[1] = f"task.files.train={tmp_path}/rows.parquet"
    task = build_task(compose_run([*arguments, "task.columns.id=key"]))
    first, second = task.examples("train")
    assert first.messages == TURNS and first.references == ("In the year 1843.",) and first.id == "a"
    assert second.conversation == TURNS[1:3] and second.source == "user: Who wrote the book?"
    scores = task.score(["in the year 1843", "no"], [first.references, second.references]).overall
    assert scores["em"] == 50.0 and 0 < scores["rougeL"] <= 100


BAD = {
    "no list": ("hello", "a text"),
    "nobody": ([], "messages of nobody"),
    "no answer": (GOOD[:2], "messages of system, user"),
    "an answer to nobody": (GOOD[2:3], "messages of assistant"),
    "a number": ([{"role": "user", "content": 3}, GOOD[2]], "a whole number"),
    "no content": ([{"role": "user", "text": "x"}, GOOD[2]], "inside a list"),
    "a stranger": ([{"role": "tool", "content": "x"}, *GOOD[1:3]], "a message of 'tool'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_conversations_are_refused_by_their_id(case: str, tmp_path: Path) -> None:
    messages, words = BAD[case]
    arguments = records(tmp_path, {"key": "fine", "messages": GOOD}, {"key": "x7", "messages": messages})
    task = build_task(compose_run([*arguments, "task.columns.id=key"]))
    with pytest.raises(UsageError, match=rf"Row 2 \(line 2, id 'x7'\).*{words}"):
        task.examples("train")


def test_what_needs_a_template_says_so(tmp_path: Path) -> None:
    run = compose_run(records(tmp_path, {"messages": GOOD}))
    with pytest.raises(UsageError, match=r"needs a chat template and the tokenizer has none: set task\.chat"):
        Collator.for_task(run.task, chat_tokenizer(None), Causal("decoder"))
    assert Collator.for_task(TaskConfig(), chat_tokenizer(CHATML), SEQ2SEQ).chat is None


def test_a_template_in_a_file_goes_with_the_tokenizer(tmp_path: Path) -> None:
    chat_tokenizer(LLAMA).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    arguments = [*records(tmp_path, {"messages": GOOD}), f"model.tokenizer={tmp_path}/tokenizer"]
    assert load_tokenizer(compose_run(arguments)).chat_template == LLAMA
    tokenizer = load_tokenizer(compose_run([*arguments, f"task.chat_template={tmp_path}/chatml.jinja"]))
    tokenizer.save_pretrained(tmp_path / "saved")
    kept = load_tokenizer(compose_run([*arguments, f"model.tokenizer={tmp_path}/saved"]))
    assert ChatTemplate(kept, 50, 50).tokenizer.chat_template == CHATML
    with pytest.raises(UsageError, match=r"task.chat_template=.*missing cannot be read"):
        load_tokenizer(compose_run([*arguments, f"task.chat_template={tmp_path}/missing"]))


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Qwen3's way: an answer without thought has an empty one, which the prompt holds where thinking is off."""


def test_an_empty_thought_belongs_to_the_prompt() -> None:
    tokenizer = chat_tokenizer(THINKING)
    row = collator(tokenizer).rows([SHORT])[0]
    assert tokenizer.decode(row.target) == f"{SHORT.target}<|im_end|>\n"
    assert tokenizer.decode(row.source).endswith("<think>\n\n</think>\n\n")


CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}<|head|>final{% endif %}<|/head|>"
    "{{ m.content }}{{ '<|eot|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
"""The way of gpt-oss: the generation prompt ends ahead of the channel."""


def test_a_channel_ahead_of_the_answer_belongs_to_the_prompt() -> None:
    tokenizer = chat_tokenizer(CHANNELS)
    collate = collator(tokenizer, max_target_tokens=4)
    for example in (SHORT, LONG):
        (row,) = collator(tokenizer, learn=Learn.last_answer).rows([example])
        assert [*row.source, *row.target] == templated(tokenizer, example.conversation)
        assert tokenizer.decode(row.target, skip_special_tokens=True) == example.target
    assert tokenizer.decode(collate.prompts([SHORT])["input_ids"][0]).endswith(
        "<|im_start|>assistant<|head|>final<|/head|>"
    )
    label = Example("l", "x", "a", ("a",))
    (row,) = collate.rows([label])
    assert tokenizer.decode(row.target) == "a<|eot|>" and len(row.target) == 2


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA, "<|eot|>"), (CHANNELS, "<|eot|>")])
def test_an_answer_ends_where_the_template_ends_a_turn(template: str, end: str) -> None:
    tokenizer = chat_tokenizer(template)
    number, other = tokenizer.convert_tokens_to_ids([end, "<pad>"])
    for own, wanted in ((None, [number]), (other, [other, number]), ([other, number], None), (number, None)):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
        assert collator(tokenizer).stopping(model).get("eos_token_id") == wanted
        assert Collator(tokenizer, 9, 9, Causal("decoder")).stopping(model) == {}


def test_how_a_template_writes_does_not_depend_on_the_day(capsys: pytest.CaptureFixture[str]) -> None:
    dated = "Today is {{ strftime_now('%d') if strftime_now is defined else '?' }}." + CHATML
    collate = collator(chat_tokenizer(dated), max_target_tokens=4)
    lengths, source, target, learnt = collate.rendering(SHORT)
    assert collate.tokenizer.decode(source).startswith("Today is %d.<|im_start|>user") and lengths == [len(source)]
    assert "%d" not in collate.tokenizer.decode(collate.rows([SHORT])[0].source)
    assert 0 < len(target) <= 4 and learnt == []
    assert capsys.readouterr().err.count("are cut") == 1, "the rendering told of its cut"


SPOKEN = (
    "{% for m in messages %}{% if m.role == 'assistant' %} In {% endif %}{{ m.content }}"
    "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
)
"""The way of Vicuna: no generation prompt, and words with a space ahead of an answer."""
SOMETIMES = CHATML.replace("{{ m.content }}", "{% if 'year' not in m.content %}<|head|>{% endif %}{{ m.content }}", 1)


@pytest.mark.parametrize("template", [SPOKEN, SOMETIMES])
def test_an_answer_is_asked_for_as_it_was_learnt(template: str) -> None:
    """White space ahead of the text is the answer's, because a token may join them."""
    tokenizer = chat_tokenizer(template)
    example = Example("q", "What is it?", "short book.", ("short book.",))
    written = collator(tokenizer).rows([example])[0]
    assert [*written.source, *written.target] == templated(tokenizer, example.conversation)
    assert collator(tokenizer).prompts([example])["input_ids"][0].tolist() == [*written.source]
    assert tokenizer.decode(written.target, skip_special_tokens=True).strip() == example.target


def test_an_answer_without_the_lead_begins_at_the_generation_prompt() -> None:
    tokenizer = chat_tokenizer(SOMETIMES)
    (row,) = collator(tokenizer, learn=Learn.last_answer).rows([LONG])
    assert tokenizer.decode(row.target) == f"{LONG.target}<|im_end|>\n"
