"""Predictions without a model, against cases worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pregate.cli import compose_run
from pregate.tasks.base import Task
from pregate.tasks.registry import build_task
from studies.accuracy.trivial import (
    first_new_name,
    lead,
    medoid,
    most_frequent,
    prompt_values,
    spread,
    trivial_predictions,
    trivial_scores,
)


def task_over(folder: Path, name: str, train: list[dict[str, Any]], dev: list[dict[str, Any]], *more: str) -> Task:
    (folder / name).mkdir()
    for split, rows in (("train", train), ("validation", dev)):
        (folder / name / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = [f"task.files.{split}={folder}/{name}/{split}.jsonl" for split in ("train", "validation")]
    return build_task(compose_run([f"task={name}", "task.hub=null", *files, *more]))


def test_the_most_frequent_label_is_that_of_training(tmp_path: Path) -> None:
    train = [{"idx": i, "sentence": "s", "label": label} for i, label in enumerate([0, 1, 1])]
    dev = [{"idx": i, "sentence": "s", "label": label} for i, label in enumerate([0, 0, 0, 1])]
    task = task_over(tmp_path, "sst2", train, dev)
    assert trivial_scores(task, "validation") == {"most frequent label": {"accuracy": 25.0}}
    assert trivial_scores(task, "validation", 3) == {"most frequent label": {"accuracy": 0.0}}


def test_answers_without_reading(tmp_path: Path) -> None:
    def row(question: str, context: str, answer: str) -> dict[str, Any]:
        return {"id": "x", "question": question, "context": context, "answers": {"text": [answer]}}

    train = [row("q", "c", "three"), row("q", "c", "two"), row("q", "c", "two")]
    dev = [row("Who met Ada?", "Ada met Bob Lee in Rome.", "Bob Lee"), row("How many?", "It has two.", "two")]
    task = task_over(tmp_path, "squad", train, dev)
    assert trivial_scores(task, "validation") == {
        "most frequent answer": {"em": 50.0, "f1": 50.0},
        "first name not asked for": {"em": 50.0, "f1": 50.0},
    }
    closed = task_over(
        tmp_path, "web_questions", [{"question": "q", "answers": ["a"]}], [{"question": "q", "answers": ["b"]}]
    )
    assert list(trivial_scores(closed, "validation")) == ["most frequent answer"]


def test_summaries_without_reading(tmp_path: Path) -> None:
    train = [{"id": "t", "dialogue": "d", "summary": text} for text in ("a b c", "a b d", "x y z")]
    dev = [{"id": "v", "dialogue": "a b\n\nother words", "summary": "a b"}]
    task = task_over(tmp_path, "dialogsum", train, dev)
    examples = task.examples("validation")
    assert trivial_predictions(task, task.examples("train"), examples) == {
        "first line": ["a b"],
        "one training summary": ["a b c"],
    }
    scores = trivial_scores(task, "validation")
    assert scores["first line"]["rougeL"] == pytest.approx(100.0)
    assert scores["one training summary"]["rougeL"] == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#A#: Hi. How?\n#B#: Fine.", "#A#: Hi. How?"),
        ("\n  One. Two.\n", "One."),
        ("It cost 3.5 pounds! Really?", "It cost 3.5 pounds!"),
        ("no end", "no end"),
        ("", ""),
    ],
)
def test_lead(text: str, expected: str) -> None:
    assert lead(text) == expected


@pytest.mark.parametrize(
    ("context", "question", "expected"),
    [
        ("The Broncos beat the Carolina Panthers.", "Whom did the Broncos beat?", "Carolina Panthers"),
        ("It is in Oslo.", "where?", "Oslo"),
        ("nothing here", "where?", "nothing"),
        ("", "where?", ""),
    ],
)
def test_first_new_name(context: str, question: str, expected: str) -> None:
    assert first_new_name(context, question) == expected


def test_the_first_of_equally_frequent_texts_counts() -> None:
    assert most_frequent(["b", "a", "a", "b"]) == "b"


def test_spread_covers_the_range_evenly() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(10, 4) == [0, 2, 5, 7]


def test_a_medoid_is_close_to_the_others_and_never_judged_by_itself() -> None:
    texts = ["1", "5", "6", "7", "20"]
    assert medoid(texts, lambda one, other: -abs(int(one) - int(other))) == "6"
    assert medoid(["only"], lambda one, other: 0.0) == "only"


def test_prompt_values_undo_a_prompt() -> None:
    prompt = "question: {question} context: {context}"
    values = {"question": "why?", "context": "a\nb context: c {x}"}
    assert prompt_values(prompt, prompt.format(**values)) == values
    assert prompt_values("{{{a}}} {a}", "{1} 1") == {"a": "1"}
    with pytest.raises(ValueError, match="was not made with the prompt"):
        prompt_values(prompt, "summarize: x")
