"""The generated set: deterministic, disjoint, answerable from the context alone; and its tokenizer."""

import re
from collections import Counter, defaultdict

import pytest

from pregate.cli import compose_run
from pregate.config import GeneratedConfig, UsageError
from pregate.tasks.generated import (
    KINDS,
    SUBJECT_NOUNS,
    SUBJECT_WORDS,
    check_generated,
    generate,
    generated_tokenizer,
)
from pregate.tasks.registry import build_task
from pregate.tasks.tokens import Collator, load_tokenizer
from tests.tiny import SEQ2SEQ

CONFIG = GeneratedConfig(train=3000, validation=300)
FIRST_ROW = {
    "id": "generated-validation-0",
    "title": "Kelby Inn",
    "context": "Kelby Inn keeps its records in French. It is led by Jonas Moore. It took the salmon for its sign. "
    "It has walls of dull pink. It stands in the centre of Hexton.",
    "question": "Which animal is the sign of Kelby Inn?",
    "answers": {"text": ["salmon"], "answer_start": [77]},
}


@pytest.fixture(scope="module")
def rows():
    return {split: list(generate(CONFIG, split)) for split in ("train", "validation")}


@pytest.fixture(scope="module")
def tokenizer():
    return generated_tokenizer(CONFIG)


STATEMENTS = [
    (kind, re.compile("^" + re.escape(statement.format(it="It", x="VALUE")).replace("VALUE", "(.+)") + "$"))
    for kind in KINDS
    for statement in kind.statements
]


def told(row):
    """[(kind, value)] read back from the sentences of a context with the statement patterns."""
    found = []
    for sentence in row["context"].replace(row["title"], "It", 1).split(". "):
        tried = [(kind, pattern.match(sentence.removesuffix(".") + ".")) for kind, pattern in STATEMENTS]
        matches = [(kind.name, match[1]) for kind, match in tried if match and match[1] in kind.values]
        assert len(matches) == 1, (sentence, matches)
        found += matches
    return found


def asked(row):
    kinds = [k.name for k in KINDS if row["question"] in [q.format(it=row["title"]) for q in k.questions]]
    assert len(kinds) == 1, (row["question"], kinds)
    return kinds[0]


def test_same_seed_same_rows_and_another_seed_other_rows(rows):
    assert list(generate(CONFIG, "validation")) == rows["validation"]
    assert list(generate(GeneratedConfig(train=10, validation=300), "train")) == rows["train"][:10]
    other = list(generate(GeneratedConfig(seed=1, train=10), "train"))
    assert all(a["context"] != b["context"] for a, b in zip(other, rows["train"][:10], strict=True))


def test_rows_stay_the_same_between_versions():
    """A change of wording or of drawing order makes published scores incomparable; this is the first row."""
    row = next(generate(GeneratedConfig(), "validation"))
    assert row == FIRST_ROW


def test_splits_share_no_context_subject_or_person(rows):
    contexts, titles = ({split: {row[key] for row in rows[split]} for split in rows} for key in ("context", "title"))
    assert not contexts["train"] & contexts["validation"]
    assert not titles["train"] & titles["validation"]
    people = {split: {value for row in rows[split] for kind, value in told(row) if kind == "leader"} for split in rows}
    assert people["validation"] and not people["train"] & people["validation"]
    # Held out are combinations, never words: each first and last name is seen in training.
    words = {word for person in people["train"] for word in person.split()}
    assert {word for person in people["validation"] for word in person.split()} <= words


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_kind_once_a_context_and_the_answer_is_where_it_says(rows, split):
    for row in rows[split][:300]:
        facts = told(row)
        assert len(facts) == CONFIG.facts == len({kind for kind, _ in facts})
        (answer,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(answer)] == answer
        assert row["context"].count(answer) == 1
        assert dict(facts)[asked(row)] == answer
        assert 1 <= len(answer.split()) <= 3
        assert row["context"].startswith(row["title"]) and row["title"] in row["question"]


def test_answers_cannot_be_guessed_and_order_tells_nothing(rows):
    answers, places = defaultdict(Counter), Counter()
    for row in rows["train"]:
        facts = [kind for kind, _ in told(row)]
        answers[asked(row)][row["answers"]["text"][0]] += 1
        places[facts.index(asked(row))] += 1
    assert set(answers) == {kind.name for kind in KINDS}
    for kind, counts in answers.items():
        share = counts.most_common(1)[0][1] / counts.total()
        assert len(counts) >= 17 and share < 0.15, (kind, len(counts), share)
    assert min(places.values()) > 0.8 * len(rows["train"]) / CONFIG.facts, places


def test_values_of_different_kinds_share_no_word_with_each_other_or_the_phrases():
    taken = {w for kind in KINDS for text in kind.statements + kind.questions for w in re.findall(r"\w+", text)}
    taken |= {*SUBJECT_WORDS, *SUBJECT_NOUNS}
    for kind in KINDS:
        assert len(kind.statements) >= 3 and len(kind.questions) >= 3
        words = {word for value in kind.values for word in value.split()}
        assert not words & taken, (kind.name, words & taken)
        taken |= words


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"facts": 0}, "facts=0"),
        ({"facts": 13}, "between 1 and 12"),
        ({"train": 0}, "train=0"),
        ({"vocab_size": 40}, "40"),
    ],
)
def test_sizes_that_cannot_be_generated(change, word):
    with pytest.raises(UsageError, match=word):
        check_generated(GeneratedConfig(**change))


def test_only_two_splits():
    with pytest.raises(UsageError, match="choose train or validation"):
        generate(CONFIG, "test")


def test_tokenizer_gives_the_text_back_in_few_tokens(rows, tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) <= CONFIG.vocab_size
    contexts = [row["context"] for row in rows["train"][:500]]
    ids = tokenizer(contexts)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == contexts
    assert all(row[-1] == 1 and 1 not in row[:-1] and 2 not in row for row in ids)
    assert max(len(row) for row in ids) <= 64
    answers = [value for kind in KINDS for value in kind.values]
    ids = tokenizer(answers)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == answers
    assert all(len(row) == len(answer.split()) + 1 for row, answer in zip(ids, answers, strict=True))


def test_tokenizer_spells_other_words_and_survives_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    text = "Zebras, 42 of them: isn't it true?"
    ids = tokenizer(text)["input_ids"]
    assert 2 not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert 2 in tokenizer("naïve")["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text)["input_ids"] == ids and again.get_vocab() == tokenizer.get_vocab()
    assert again.decode(ids, skip_special_tokens=True) == text
    assert (again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2)


def test_a_smaller_vocabulary_spells_more_and_loses_nothing(rows):
    small = generated_tokenizer(GeneratedConfig(vocab_size=128))
    assert len(small) <= 128
    context = rows["train"][0]["context"]
    assert small.decode(small(context)["input_ids"], skip_special_tokens=True) == context


def test_the_task_fits_its_own_token_limits():
    run = compose_run(["task=generated", "task.generated.train=500", "data.root=null"])
    task, tokenizer = build_task(run), load_tokenizer(run)
    examples = task.examples("train")
    assert len(examples) == 500 and len(task.examples("train", 7)) == 7
    batch = Collator(tokenizer, 10_000, 10_000, SEQ2SEQ)(examples)
    assert batch["input_ids"].shape[1] < run.task.max_source_tokens
    assert batch["labels"].shape[1] < run.task.max_target_tokens
    assert task.score([e.target for e in examples], [e.references for e in examples]).overall == {"em": 100, "f1": 100}
