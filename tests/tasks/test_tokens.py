"""Prompts, which tokenizer a run gets, and batches."""

import json

import pytest
import torch

from pregate.cli import compose_run
from pregate.config import GeneratedConfig, Learn, UsageError
from pregate.models.objectives import Causal
from pregate.tasks import tokens
from pregate.tasks.base import Example
from pregate.tasks.generated import generated_tokenizer
from pregate.tasks.prompts import prompt_fields
from pregate.tasks.tokens import Collator, check_vocabulary, load_tokenizer
from tests.tiny import SEQ2SEQ

CAUSAL = Causal("decoder")


def word_tokenizer(words, **specials):
    """A tokenizer of whole words without any post-processing; ids from 0 in the order of `words`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **specials)


WORDS = ["<pad>", "</s>", "<unk>", "one", "two", "three", "four", "five"]


@pytest.fixture
def tokenizer():
    return word_tokenizer(WORDS, pad_token="<pad>", eos_token="</s>")


def example(source, target):
    return Example(id="0", source=source, target=target, references=(target,))


def test_prompt_fields():
    assert prompt_fields("question: {question} context: {context} {question}") == ("question", "context")
    assert prompt_fields("{{literal}} {text}") == ("text",)


@pytest.mark.parametrize(
    "prompt", ["question: {question", "}", "{}", "{0}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "no field at all"]
)
def test_prompts_that_cannot_work(prompt):
    with pytest.raises(UsageError, match=r"task.prompt=") as error:
        prompt_fields(prompt)
    assert "{" in str(error.value)


def test_batches_are_padded_on_the_right_and_closed(tokenizer):
    batch = Collator(tokenizer, 10, 10, SEQ2SEQ)([example("one two three", "four"), example("five", "one two")])
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1], [7, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[6, 1, -100], [3, 4, 1]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_cut_texts_still_end_in_end_of_sequence(tokenizer):
    batch = Collator(tokenizer, 3, 2, SEQ2SEQ)([example("one two three four", "five four"), example("", "one")])
    assert batch["input_ids"].tolist() == [[3, 4, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[7, 1], [3, 1]]


def test_a_text_seen_again_is_not_tokenized_again_and_batches_stay_the_same(tokenizer, monkeypatch):
    seen = []

    def counting(texts, **settings):
        seen.extend(texts)
        return tokenizer(texts, **settings)

    counting.pad_token_id, counting.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    batches = [
        [example("one two three four", "five"), example("two", "five")],
        [example("two", "one"), example("one two three four", "two"), example("two", "three")],
    ]
    fresh = [Collator(tokenizer, 4, 3, SEQ2SEQ)(batch) for batch in batches]
    for kept, expected in ((tokens.KEPT_TOKENS, 6), (4, 7)):
        monkeypatch.setattr(tokens, "KEPT_TOKENS", kept)
        seen.clear()
        collate = Collator(counting, 4, 3, SEQ2SEQ)
        for found, right in zip([collate(batch) for batch in batches], fresh, strict=True):
            assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in right.items()}
        # "two" is cut to another length as a source than as a target
        assert len(seen) == expected, seen


def test_source_lengths_are_those_of_the_batch(tokenizer):
    examples = [example("one two three four five", "one"), example("two", "five"), example("", "one two")]
    collate = Collator(tokenizer, 4, 9, SEQ2SEQ)
    assert collate.source_lengths(examples) == [4, 2, 1]
    assert collate(examples)["attention_mask"].sum(1).tolist() == [4, 2, 1]


def test_a_tokenizer_that_adds_end_of_sequence_itself_adds_no_second():
    tokenizer = generated_tokenizer(GeneratedConfig())
    text = "Who leads Kelby Inn?"
    batch = Collator(tokenizer, 32, 8, SEQ2SEQ)([example(text, "Ada Holm")])
    assert batch["input_ids"].tolist() == tokenizer([text])["input_ids"]
    assert batch["labels"].tolist() == tokenizer(["Ada Holm"])["input_ids"]
    assert batch["labels"][0].tolist().count(1) == 1


def run_of(*overrides):
    return compose_run(["data.root=null", "model.source=null", *overrides])


def saved(directory, word):
    word_tokenizer([*WORDS, word], pad_token="<pad>", eos_token="</s>").save_pretrained(directory)
    return directory


def test_which_tokenizer_wins(tmp_path):
    named, checkpoint, source = (saved(tmp_path / name, name) for name in ("named", "checkpoint", "source"))
    everything = [f"model.tokenizer={named}", f"checkpoint={checkpoint}", f"model.source={source}"]
    assert "checkpoint" in load_tokenizer(run_of("task=generated", *everything)).get_vocab()
    assert "named" in load_tokenizer(run_of("task=generated", everything[0], everything[2])).get_vocab()
    assert "▁founded" in load_tokenizer(run_of("task=generated", everything[2])).get_vocab()
    assert "source" in load_tokenizer(run_of("task=squad", everything[2])).get_vocab()


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    tokenizer = load_tokenizer(run_of(f"checkpoint={saved(tmp_path / 'checkpoint', 'word')}"))
    check_vocabulary(tokenizer, "model", {"vocab_size": len(tokenizer)})
    with pytest.raises(UsageError, match=r"has 9 ids but model has 8 embeddings: set model.tokenizer"):
        check_vocabulary(tokenizer, "model", {"vocab_size": 8})


def test_tokenizer_below_the_data_root(tmp_path):
    saved(tmp_path / "t5_tokenizer", "rooted")
    run = compose_run([f"data.root={tmp_path}", "model.tokenizer=${data.root}/t5_tokenizer"])
    assert "rooted" in load_tokenizer(run).get_vocab()
    with pytest.raises(UsageError, match=r"data.root, which is not set"):
        load_tokenizer(run_of("model.tokenizer=${data.root}/t5_tokenizer"))


def test_tokenizers_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"model.tokenizer=.*nowhere is not a directory"):
        load_tokenizer(run_of(f"model.tokenizer={tmp_path}/nowhere"))
    with pytest.raises(UsageError, match=r"There is no tokenizer: set model.tokenizer"):
        load_tokenizer(run_of())
    with pytest.raises(UsageError, match=r"checkpoint=.* gives no tokenizer"):
        load_tokenizer(run_of(f"checkpoint={tmp_path}"))
    word_tokenizer(WORDS).save_pretrained(tmp_path / "bare")
    with pytest.raises(UsageError, match=r"lacks an end-of-sequence token"):
        load_tokenizer(run_of(f"model.tokenizer={tmp_path}/bare"))


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe", "switch_transformers"])
def test_a_model_without_its_tokenizer(model_type, tmp_path):
    """Of the config.json alone transformers makes a tokenizer that writes every text as no token."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UsageError, match=r"model.source=.* gives no tokenizer"):
        load_tokenizer(run_of("task=squad", f"model.source={tmp_path}"))


def test_a_tokenizer_without_a_padding_token(tmp_path):
    """As that of Mixtral. Masks say what is padding, so a decoder-only model pads with any token."""
    word_tokenizer(WORDS, eos_token="</s>").save_pretrained(tmp_path)
    found = load_tokenizer(run_of(f"model.tokenizer={tmp_path}"))
    collate, rows = Collator(found, 4, 3, CAUSAL, separator="three"), [example("one two", "four"), example("", "one")]
    batch, prompts = collate(rows), collate.prompts(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 1], [5, 3, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6, 1], [-100, 3, 1, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert prompts["input_ids"].tolist() == [[3, 4, 5], [1, 1, 5]]
    assert prompts["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(UsageError, match=r"lacks a padding token: set model.tokenizer"):
        Collator(found, 4, 3, SEQ2SEQ)


def beginning_tokenizer():
    """Puts <s> (7) before every text."""
    from tokenizers import processors

    found = word_tokenizer([*WORDS[:7], "<s>"], pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    found._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 7)])
    return found


def test_a_target_goes_on_from_its_source_behind_the_separator(tokenizer):
    collate = Collator(tokenizer, 4, 3, CAUSAL, separator="three")
    batch = collate([example("one two one two", "four"), example("", "one")])
    assert batch["input_ids"].tolist() == [[3, 4, 3, 5, 6, 1], [5, 3, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100] * 4 + [6, 1], [-100, 3, 1, -100, -100, -100]]
    prompts = collate.prompts([example("one two one two", "four"), example("", "one")])
    assert prompts["input_ids"].tolist() == [[3, 4, 3, 5], [0, 0, 0, 5]]
    assert collate.source_lengths([example("one", "")]) == [2]


def test_sources_begin_as_the_tokenizer_begins_a_text(tokenizer):
    batch = Collator(beginning_tokenizer(), 3, 3, CAUSAL)([example("one two three", "four"), example("", "one")])
    assert batch["input_ids"].tolist() == [[7, 3, 4, 6, 1], [7, 3, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6, 1], [-100, 3, 1, -100, -100]]
    # without a beginning there must be something that the first token is predicted from
    batch = Collator(tokenizer, 3, 3, CAUSAL)([example("", "one")])
    assert batch["input_ids"].tolist() == [[1, 3, 1]] and batch["labels"].tolist() == [[-100, 3, 1]]


def test_everything_is_learnt_but_the_first_token(tokenizer):
    batch = Collator(tokenizer, 9, 9, CAUSAL, learn=Learn.everything)([example("one two", "three")])
    assert batch["labels"].tolist() == [[-100, 4, 5, 1]]


def test_a_word_of_a_byte_level_tokenizer_keeps_its_space():
    from tests.tasks.test_chat import chat_tokenizer

    tokenizer = chat_tokenizer(None)
    collate = Collator(tokenizer, 60, 60, CAUSAL, separator="answer:")
    batch = collate([example("What is it?", "A short book.")])
    assert tokenizer.decode(batch["input_ids"][0]) == "<s>What is it? answer: A short book.<|im_end|>"


def test_a_target_is_never_cut_silently(tokenizer, capsys):
    collate = Collator(tokenizer, 3, 2, CAUSAL)
    collate([example("one two three four", "five")])
    assert not capsys.readouterr().err
    assert collate([example("one", "five four three"), example("one", "two one")])["labels"].tolist() == [
        [-100, 7, 1],
        [-100, 4, 1],
    ]
    told = capsys.readouterr().err
    assert told.count("task.max_target_tokens=2 tokens are cut, the first is 'five four three'") == 1


def test_limits_without_room_for_a_prompt_are_refused(tokenizer):
    with pytest.raises(UsageError, match=r"task.max_source_tokens=2 leaves no room.*more than 2"):
        Collator(tokenizer, 2, 2, CAUSAL, separator="one two")
