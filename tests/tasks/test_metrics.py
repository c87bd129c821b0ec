"""Every metric against cases computed by hand, and against naive loops on random texts."""

import random

import pytest

from pregate.cli import compose_run
from pregate.config import UsageError
from pregate.tasks.metrics import Accuracy, ExactMatchF1, Rouge, exact_match, normalize_answer, same_label, token_f1
from pregate.tasks.registry import build_task


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles", "beatles"),
        ("a theatre, an anthem; the Bathe", "theatre anthem bathe"),
        ("U.S. Army!", "us army"),
        ("co-op 1,000", "coop 1000"),
        ("“Zürich”\u00a0Ärzte", "“zürich” ärzte"),
        ("The", ""),
        (" ?! ", ""),
        ("the-end", "theend"),
        ("tab\tand\nline", "tab and line"),
    ],
)
def test_normalisation_of_squad_1_1(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "em", "f1"),
    [
        ("Denver Broncos", ["Denver Broncos"], 100, 100),
        ("the denver broncos.", ["Denver Broncos"], 100, 100),
        ("Saint Bernadette", ["Saint Bernadette Soubirous"], 0, 80),  # 2 shared, P 2/2, R 2/3
        ("cat cat dog", ["cat"], 0, 50),  # 1 shared, P 1/3, R 1/1
        ("cat cat", ["cat cat cat"], 0, 80),  # 2 shared, P 2/2, R 2/3
        ("Soubirous Bernadette", ["Bernadette Soubirous"], 0, 100),  # a bag of words
        ("in 1858", ["the year", "1858"], 0, 200 / 3),  # best of several
        ("gold", ["golden", "the gold", "Gold statue"], 100, 100),
        ("ZÜRICH", ["Zürich"], 100, 100),
        ("cafe", ["café"], 0, 0),
        ("", ["anything"], 0, 0),
        ("the", ["anything"], 0, 0),
        ("", ["a"], 100, 0),  # both empty after normalisation: v1.1 counts the match, and no shared word
        ("The!", ["an"], 100, 0),
        ("x", ["y", "z"], 0, 0),
    ],
)
def test_exact_match_and_f1(prediction, references, em, f1):
    scores = ExactMatchF1(keep_in_memory=True).compute(predictions=[prediction], references=[references])
    assert scores == pytest.approx({"em": em, "f1": f1})


def test_f1_equals_a_naive_loop():
    rng = random.Random(0)
    for _ in range(300):
        predicted = [rng.choice("bcdef") for _ in range(rng.randrange(6))]
        expected = [rng.choice("bcdef") for _ in range(rng.randrange(6))]
        left, shared = list(expected), 0
        for word in predicted:
            if word in left:
                left.remove(word)
                shared += 1
        precision, recall = shared / max(1, len(predicted)), shared / max(1, len(expected))
        naive = 0.0 if shared == 0 else 200 * precision * recall / (precision + recall)
        assert token_f1(" ".join(predicted), " ".join(expected)) == pytest.approx(naive)
        assert exact_match(" ".join(predicted), " ".join(expected)) == 100 * (predicted == expected)


@pytest.mark.parametrize(
    ("prediction", "references", "rouge1", "rouge2", "rouge_l"),
    [
        # stems: the cat were run / the cat run fast; 3 of 4 words, 1 of 3 pairs, longest common run of words 3 of 4
        ("The cats were running", ["the cat runs fast"], 75, 100 / 3, 75),
        # the best reference differs from score to score
        ("red blue green", ["blue red green", "red blue"], 100, 200 / 3, 80),
        ("police killed the gunman", ["police kill the gunman"], 100, 100, 100),
        ("the gunman kill police", ["police killed the gunman"], 100, 100 / 3, 50),
        ("word", ["word"], 100, 0, 100),  # no pair of words on either side
        ("two two two", ["two one"], 40, 0, 40),  # repeated words count once per occurrence
        ("", ["something"], 0, 0, 0),
        ("...", ["something"], 0, 0, 0),
        ("café", ["caf"], 100, 0, 100),  # rouge_score keeps ASCII letters and digits only
        ("It's 1,000", ["it s 1 000"], 100, 100, 100),
    ],
)
def test_rouge(prediction, references, rouge1, rouge2, rouge_l):
    scores = Rouge(keep_in_memory=True).compute(predictions=[prediction], references=[references])
    assert scores == pytest.approx({"rouge1": rouge1, "rouge2": rouge2, "rougeL": rouge_l})


def test_rouge_equals_a_naive_loop():
    def common(a, b):
        if not a or not b:
            return 0
        return 1 + common(a[1:], b[1:]) if a[0] == b[0] else max(common(a[1:], b), common(a, b[1:]))

    def f_measure(shared, num_predicted, num_expected):
        return 200 * shared / (num_predicted + num_expected) if shared else 0.0

    rng, rouge = random.Random(1), Rouge(keep_in_memory=True)
    for _ in range(100):
        predicted = [rng.choice("bcd") for _ in range(rng.randrange(1, 7))]
        expected = [rng.choice("bcd") for _ in range(rng.randrange(1, 7))]
        got = rouge.best(" ".join(predicted), [" ".join(expected)])
        for n, name in ((1, "rouge1"), (2, "rouge2")):
            grams = [tuple(predicted[i : i + n]) for i in range(len(predicted) - n + 1)]
            left = [tuple(expected[i : i + n]) for i in range(len(expected) - n + 1)]
            num_expected, shared = len(left), 0
            for gram in grams:
                if gram in left:
                    left.remove(gram)
                    shared += 1
            assert got[name] == pytest.approx(f_measure(shared, len(grams), num_expected)), (predicted, expected)
        assert got["rougeL"] == pytest.approx(f_measure(common(predicted, expected), len(predicted), len(expected)))


def test_accuracy_ignores_case_and_white_space_only():
    assert same_label(" Positive\n", "positive") == 100
    assert same_label("positive.", "positive") == 0
    assert same_label("", "positive") == 0
    scores = Accuracy(keep_in_memory=True).compute(
        predictions=["negative", "Positive", "posit"], references=[["negative"], ["positive"], ["positive"]]
    )
    assert scores == pytest.approx({"accuracy": 200 / 3})


def test_overall_is_the_mean_of_per_example_scores_and_metrics_can_be_used_again():
    metric = ExactMatchF1(keep_in_memory=True)
    predictions, references = ["blue", "dark blue", "red"], [["blue"], ["blue"], ["green", "red rose"]]
    for _ in range(2):
        scores = metric.compute(predictions=predictions, references=references, per_example=True)
        per_example = scores.pop("per_example")
        assert per_example == {"em": [100, 0, 0], "f1": pytest.approx([100, 200 / 3, 200 / 3])}
        assert scores == pytest.approx({"em": 100 / 3, "f1": 700 / 9})


@pytest.mark.parametrize(
    ("overrides", "prediction", "reference", "names"),
    [
        (["task=squad"], "blue", ["The blue"], {"em", "f1"}),
        (["task=xsum"], "a b c", ["a b c"], {"rouge1", "rouge2", "rougeL"}),
        (["task=sst2"], "positive", ["positive"], {"accuracy"}),
    ],
)
def test_task_scores_are_percent_per_example_and_overall(overrides, prediction, reference, names):
    task = build_task(compose_run([*overrides, "data.root=null"]))
    assert set(task.metric_names) == names
    scores = task.score([prediction, "zzz"], [reference, ("yyy",)])
    assert scores.overall == dict.fromkeys(names, 50.0)
    assert scores.per_example == {name: [100.0, 0.0] for name in names}


def test_nothing_to_score_is_the_users_error():
    task = build_task(compose_run(["task=squad", "data.root=null"]))
    with pytest.raises(UsageError, match="no predictions"):
        task.score([], [])
    with pytest.raises(UsageError, match="1 of 2 predictions have no reference"):
        task.score(["a", "b"], [["a"], []])
