"""Data that cannot be used: each ends in one sentence that says what to do."""

import json

import pytest

from pregate.cli import compose_run
from pregate.config import UsageError
from pregate.tasks.records import read_columns
from pregate.tasks.registry import build_task

ROW = {"id": "1", "question": "q?", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}}


def task_of(*overrides):
    return build_task(compose_run(["data.root=null", *overrides]))


def write_parquet(path, rows):
    import datasets

    path.parent.mkdir(exist_ok=True, parents=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def cells(chunk, field):
    return [chunk.read(row, field, lambda cell: cell) for row in range(len(chunk))]


def sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def test_missing_data_directory(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere is not a directory: point data.root") as error:
        task_of("task=squad", f"data.root={tmp_path}/nowhere")
    sentence(error)


def test_data_root_without_the_task(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"no directory 'squad' \(directories there: other\)") as error:
        task_of("task=squad", f"data.root={tmp_path}")
    sentence(error)


def test_missing_split_lists_what_is_there(tmp_path):
    write_parquet(tmp_path / "squad" / "train.parquet", [ROW])
    task = task_of("task=squad", f"data.root={tmp_path}")
    with pytest.raises(UsageError, match=r"no validation.parquet .* which holds train.parquet") as error:
        task.examples("validation")
    sentence(error)


def test_missing_column_lists_the_columns(tmp_path):
    write_parquet(tmp_path / "squad" / "train.parquet", [ROW])
    with pytest.raises(
        UsageError, match=r"no column 'q' in .*, whose columns are id, question, context, answers, "
    ) as error:
        task_of("task=squad", f"data.root={tmp_path}", "task.columns.question=q").examples("train")
    assert "answers.text" in sentence(error) and "task.columns.question=COLUMN" in sentence(error)
    lines = write_lines(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(UsageError, match=r"no column 'summary'.* task.columns.summary=COLUMN") as error:
        task_of("task=summarization", f"task.files.train={lines}", "task.columns.document=context").examples("train")
    assert "answers.text" in sentence(error)


def test_missing_column_on_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"sentence": "s"}]))
    with pytest.raises(UsageError, match=r"no column 'label' in stanfordnlp/sst2, whose columns are sentence"):
        task_of("task=sst2", "task.columns.id=null").examples("train")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_empty_split(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text({"csv": "question,context,answers\n", "jsonl": "", "json": "[]"}[suffix])
    with pytest.raises(UsageError, match=r"Split 'train' of task 'qa' is empty") as error:
        task_of("task=qa", f"task.files.train={path}").examples("train")
    sentence(error)


def test_examples_without_an_answer_are_counted_and_named(tmp_path):
    answers = [["a"], [], [""], None, ["b"]]
    rows = [{"id": f"n{i}", "question": "q", "context": "c", "answers": a} for i, a in enumerate(answers)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    task = task_of("task=qa", f"task.files.validation={path}", "task.columns.id=id")
    with pytest.raises(
        UsageError, match=r"3 of 5 examples in split 'validation' .* have no answer \(id n1, n2, n3\)"
    ) as e:
        task.examples("validation")
    sentence(e)
    assert len(task.examples("validation", 1)) == 1


def test_labels_out_of_range_are_counted_and_named(tmp_path):
    write_parquet(tmp_path / "sst2" / "test.parquet", [{"idx": i, "sentence": "s", "label": i - 1} for i in range(5)])
    with pytest.raises(
        UsageError, match=r"3 of 5 examples .* neither 0 to 1 nor one of negative, positive.*id 0, 3, 4"
    ) as e:
        task_of("task=sst2", f"data.root={tmp_path}").examples("test")
    assert "task.columns.label=COLUMN" in sentence(e)


def test_null_in_a_shown_column(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"document": "d", "summary": "s"}, {"document": None, "summary": "s"}])
    with pytest.raises(UsageError, match=r"rows without 'document'") as error:
        task_of("task=summarization", f"task.files.train={path}").examples("train")
    sentence(error)


def test_no_source_of_data():
    with pytest.raises(UsageError, match=r"Task 'qa' has no source of data: set task.files.train=FILE") as error:
        task_of("task=qa")
    sentence(error)


def test_unknown_primary_metric():
    with pytest.raises(
        UsageError, match=r"primary_metric=bleu is no metric of a qa task: choose one of em, f1"
    ) as error:
        task_of("task=squad", "task.primary_metric=bleu")
    sentence(error)


def test_limit_below_one(tmp_path):
    with pytest.raises(UsageError, match=r"0 examples of split 'train' are too few"):
        task_of("task=generated").examples("train", 0)


def test_file_that_is_not_there_or_of_no_known_kind(tmp_path):
    with pytest.raises(UsageError, match=r"task.files.train=gone.csv does not exist"):
        task_of("task=qa", "task.files.train=gone.csv")
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(UsageError, match=r"a.xlsx cannot be read as data: use a file ending in .parquet, .csv"):
        task_of("task=qa", f"task.files.train={tmp_path}/a.xlsx")
    path = write_lines(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(UsageError, match=r"no file for split 'validation' \(task.files names train\)"):
        task_of("task=qa", f"task.files.train={path}").examples("validation")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.parquet", "not parquet at all", "parquet"),
        ("a.csv", "question,context,answers\nq,c,a,surplus\n", "line 2 has more cells than the header"),
        ("a.json", '{"question": ', "json"),
        ("a.jsonl", "[1, 2]\n", "record 1 is not an object"),
        ("a.jsonl", '"text"\n', "record 1 is not an object"),
    ],
)
def test_files_that_cannot_be_parsed(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=reason) as error:
        task_of("task=qa", f"task.files.train={tmp_path / name}").examples("train")
    assert name in sentence(error) and "cannot be read as" in sentence(error)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (
            ConnectionError("Couldn't reach 'rajpurkar/squad' on the Hub"),
            "cannot be loaded from the hub .*data.root=DIR",
        ),
        (ValueError("Unknown split \"dev\". Should be one of ['train']."), "has no split 'dev'.*Should be one of"),
    ],
)
def test_hub_that_fails(monkeypatch, raised, expected):
    import datasets

    def load_dataset(*args, **kwargs):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=expected) as error:
        task_of("task=squad").examples("dev")
    sentence(error)


def test_named_files_come_before_the_data_root(tmp_path):
    write_parquet(tmp_path / "qa" / "train.parquet", [{**ROW, "answers": "rooted"}])
    path = write_lines(tmp_path / "mine.jsonl", [{**ROW, "answers": "named"}])
    rooted = task_of("task=qa", f"data.root={tmp_path}")
    assert rooted.examples("train")[0].target == "rooted"
    named = task_of("task=qa", f"data.root={tmp_path}", f"task.files.train={path}")
    assert named.examples("train")[0].target == "named"


def test_shards_are_read_in_order_and_no_further_than_asked(tmp_path):
    for shard in range(2):
        rows = [{**ROW, "id": f"{shard}{i}"} for i in range(4)]
        write_parquet(tmp_path / "squad" / f"train-0000{shard}-of-00003.parquet", rows)
    (tmp_path / "squad" / "train-00002-of-00003.parquet").write_text("broken")
    task = task_of("task=squad", f"data.root={tmp_path}")
    assert [e.id for e in task.examples("train", 6)] == ["00", "01", "02", "03", "10", "11"]
    with pytest.raises(UsageError, match=r"train-00002-of-00003.parquet cannot be read as parquet"):
        task.examples("train")


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_chunks_keep_order_size_and_dotted_columns(tmp_path, form):
    rows = [{"answers": {"text": [str(i)]}, "a.b": i} for i in range(7)]
    path = tmp_path / f"a.{form}"
    write_parquet(path, rows) if form == "parquet" else write_lines(path, rows)
    task = compose_run(["task=qa", f"task.files.train={path}", "data.root=null"]).task
    chunks = list(read_columns(task, None, "train", {"target": "answers.text", "n": "a.b"}, 3))
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert [n for chunk in chunks for n in cells(chunk, "n")] == list(range(7))
    assert [t for chunk in chunks for t in cells(chunk, "target")] == [[str(i)] for i in range(7)]


@pytest.mark.parametrize("where", ["files", "hub"])
def test_a_seed_decides_the_order_of_shards(tmp_path, monkeypatch, where):
    import datasets

    for shard in range(4):
        write_parquet(tmp_path / f"{shard}.parquet", [{"n": 3 * shard + i} for i in range(3)])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"n": i} for i in range(12)])
    )
    source = f"task.files.train='{tmp_path}/*.parquet'" if where == "files" else "task.hub=x/y"
    task = compose_run(["task=qa", source, "data.root=null"]).task

    def read(shuffle):
        return [cells(chunk, "n") for chunk in read_columns(task, None, "train", {"n": "n"}, 3, shuffle)]

    plain = read(None)
    assert plain == [[3 * shard + i for i in range(3)] for shard in range(4)]
    orders = [read([seed]) for seed in range(5)]
    assert all(sorted(order) == plain for order in orders)
    assert orders[0] == read([0])
    assert len({str(order) for order in orders}) > 2
