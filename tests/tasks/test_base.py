"""From rows to examples: the same ones from every source, for every task."""

import csv
import json
from pathlib import Path

import pytest

from pregate.cli import compose_run
from pregate.config import TaskKind, UsageError
from pregate.config.groups import config_dir
from pregate.tasks.base import CHUNK_ROWS, Example
from pregate.tasks.registry import build_task, build_training_task

SQUAD = [
    {
        "id": f"q{i}",
        "title": "T",
        "context": f"It was {i} o'clock, {{said}} he.",
        "question": f"What time {i}?",
        "answers": {"text": [f"{i} o'clock", f" {i} o'clock ", str(i)], "answer_start": [7, 7, 7]},
    }
    for i in range(5)
]
WEB = [{"url": "", "question": f"who {i}?", "answers": [f"A{i}", f"B{i}"]} for i in range(3)]
XSUM = [{"document": f"Long\ntext {i}.", "summary": f"Short {i}.", "id": str(i)} for i in range(3)]
DIALOGSUM = [
    {"id": f"test_{i}_{j}", "dialogue": f"#Person1#: {i}?", "summary": f"S{i}{j}", "topic": "t"}
    for i in range(4)
    for j in range(3)
]
SST2 = [{"idx": i, "sentence": f"film {i} ", "label": i % 2} for i in range(4)]

TASKS = {
    "squad": (
        SQUAD,
        Example("q1", "question: What time 1? context: It was 1 o'clock, {said} he.", "1 o'clock", ("1 o'clock", "1")),
    ),
    "web_questions": (WEB, Example("train-1", "question: who 1?", "A1", ("A1", "B1"))),
    "xsum": (XSUM, Example("1", "summarize: Long\ntext 1.", "Short 1.", ("Short 1.",))),
    "dialogsum": (DIALOGSUM, Example("test_1_0", "summarize: #Person1#: 1?", "S10", ("S10", "S11", "S12"))),
    "sst2": (SST2, Example("1", "sst2 sentence: film 1 ", "positive", ("positive",))),
}


def dataset(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


def task_of(*overrides):
    return build_task(compose_run(["data.root=null", *overrides]))


@pytest.mark.parametrize("name", TASKS)
def test_parquet_and_hub_columns_give_the_same_examples(name, tmp_path, monkeypatch):
    import datasets

    rows, second = TASKS[name]
    (tmp_path / name).mkdir()
    dataset(rows).to_parquet(tmp_path / name / "train.parquet")
    calls = []

    def load_dataset(path, config=None, *, split, revision=None):
        calls.append((path, config, split, revision))
        return dataset(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_root = task_of(f"task={name}", f"data.root={tmp_path}").examples("train")
    assert calls == []
    from_hub = task_of(f"task={name}").examples("train")
    assert from_root == from_hub
    assert from_root[1] == second
    ids = {
        "squad": "rajpurkar/squad",
        "web_questions": "stanfordnlp/web_questions",
        "xsum": "EdinburghNLP/xsum",
        "dialogsum": "knkarthick/dialogsum",
        "sst2": "stanfordnlp/sst2",
    }
    assert calls == [(ids[name], None, "train", "refs/convert/parquet" if name == "xsum" else None)]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9])
def test_limit_is_a_prefix_and_never_splits_a_group(limit, tmp_path):
    (tmp_path / "dialogsum").mkdir()
    dataset(DIALOGSUM).to_parquet(tmp_path / "dialogsum" / "test.parquet")
    task = task_of("task=dialogsum", f"data.root={tmp_path}")
    everything = task.examples("test")
    assert len(everything) == 4 and {len(e.references) for e in everything} == {3}
    assert task.examples("test", limit) == everything[:limit]


def test_groups_and_ids_survive_chunk_borders(tmp_path):
    rows = [{"dialogue": f"D{i // 3}", "summary": f"S{i}"} for i in range(CHUNK_ROWS + 5)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = task_of("task=dialogsum", "task.hub=null", "task.columns.id=null", f"task.files.train={tmp_path}/a.jsonl")
    examples = task.examples("train")
    assert [len(e.references) for e in examples[:-1]] == [3] * (len(examples) - 1)
    assert sum(len(e.references) for e in examples) == len(rows)
    assert examples[CHUNK_ROWS // 3].id == f"train-{CHUNK_ROWS // 3 * 3}"


def test_a_limit_leaves_the_rest_unread(tmp_path):
    good = "\n".join(json.dumps({"question": "q", "context": "c", "answers": "a"}) for _ in range(5))
    (tmp_path / "a.jsonl").write_text(good + "\n{broken")
    task = task_of("task=qa", f"task.files.train={tmp_path}/a.jsonl")
    assert len(task.examples("train", 4)) == 4
    with pytest.raises(UsageError, match=r"a.jsonl cannot be read as jsonl"):
        task.examples("train")


def test_own_question_answering_by_overrides_alone(tmp_path):
    rows = [
        {"key": 7, "q": "who?", "passage": "Ada {x}.", "a": ["Ada", "", "A."]},
        {"key": 8, "q": "when?", "a": "now"},
    ]
    rows[1]["passage"] = "Now."
    (tmp_path / "my.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "dev.json").write_text(json.dumps(rows[1:], indent=2))
    task = task_of(
        "task=qa",
        f"task.files.train={tmp_path}/my.jsonl",
        f"task.files.validation={tmp_path}/dev.json",
        "task.columns.id=key",
        "task.columns.question=q",
        "task.columns.context=passage",
        "task.columns.answers=a",
    )
    assert task.examples("train") == [
        Example("7", "question: who? context: Ada {x}.", "Ada", ("Ada", "A.")),
        Example("8", "question: when? context: Now.", "now", ("now",)),
    ]
    assert task.examples("validation") == task.examples("train")[1:]


def test_a_field_without_an_entry_is_a_column_of_its_own_name(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"title": "T", "question": "q", "context": "c", "answers": "a"}))
    task = task_of("task=qa", f"task.files.train={tmp_path}/a.jsonl", "task.prompt='{title}: {question}'")
    assert task.examples("train")[0].source == "T: q"


@pytest.mark.parametrize(("suffix", "dialect"), [("csv", "excel"), ("tsv", "excel-tab")])
def test_own_summarization_from_a_table(tmp_path, suffix, dialect):
    with (tmp_path / f"t.{suffix}").open("w", newline="") as file:
        csv.writer(file, dialect).writerows([["n", "article", "highlights"], ["007", 'A, "b"\nc\td', "short"]])
    task = task_of(
        "task=summarization",
        f"task.files.train={tmp_path}/t.{suffix}",
        "task.columns.id=n",
        "task.columns.document=article",
        "task.columns.summary=highlights",
    )
    assert task.examples("train") == [Example("007", 'summarize: A, "b"\nc\td', "short", ("short",))]


def test_own_classification_with_words_positions_and_shards(tmp_path):
    for shard, labels in enumerate((["spam", "ham"], ["1", "0"])):
        with (tmp_path / f"part-{shard}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *[[f"mail {label}", label] for label in labels]])
    task = task_of("task=classification", "task.labels=[spam,ham]", f"task.files.train='{tmp_path}/part-*.csv'")
    assert [(e.source, e.target) for e in task.examples("train")] == [
        ("classify: mail spam", "spam"),
        ("classify: mail ham", "ham"),
        ("classify: mail 1", "ham"),
        ("classify: mail 0", "spam"),
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 1], ["no", "yes"]),
        ([True, False], ["yes", "no"]),
        ([1.0, 0.0], ["yes", "no"]),
        (["yes", "0"], ["yes", "no"]),
    ],
)
def test_label_columns_of_any_type(values, words, tmp_path):
    dataset([{"text": "t", "label": value} for value in values]).to_parquet(tmp_path / "a.parquet")
    task = task_of("task=classification", "task.labels=[no,yes]", f"task.files.train={tmp_path}/a.parquet")
    assert [e.target for e in task.examples("train")] == words


def test_every_task_yaml_builds(monkeypatch):
    names = sorted(path.stem for path in (config_dir() / "task").glob("*.yaml"))
    assert {"squad", "web_questions", "xsum", "dialogsum", "sst2", "generated", "qa", "summarization"} <= set(names)
    for name in names:
        extra = ["task.labels=[a,b]"] if name == "classification" else []
        run = compose_run([f"task={name}", *extra, "data.root=null", *(["task.hub=x/y"])])
        task = build_training_task(run)
        assert task.name == {"span_corruption": "corpus", "language_modelling": "corpus"}.get(name, name)
        assert task.primary_metric in task.metric_names
        assert run.task.kind in TaskKind


def test_a_stream_of_text_has_no_number_of_examples(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("a b c")
    settings = ["task=language_modelling", "data.max_train_examples=5", f"task.files.train={tmp_path / 'c.txt'}"]
    with pytest.raises(UsageError, match=r"data\.max_train_examples counts examples"):
        build_training_task(compose_run(settings))
