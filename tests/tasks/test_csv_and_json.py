"""csv, tsv, json and jsonl files with faults: the right value, or one sentence with the line and what to do."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pregate.cli import compose_run
from pregate.config import Run, UsageError
from pregate.tasks.base import Task
from pregate.tasks.registry import build_task

JSON_FORM = r"write one whole object {…} on each line, or one list \[{…}, …\] of objects\.$"


@functools.cache
def composed(*overrides: str) -> Run:
    return compose_run(["data.root=null", "task=summarization", *overrides])


def task_of(*overrides: str, **files: Path) -> Task:
    run = composed(*overrides)
    named = {split: str(path) for split, path in files.items()}
    return build_task(replace(run, task=replace(run.task, files=named)))


def pairs(path: Path, *overrides: str) -> list[tuple[str, str]]:
    """(document, summary) of each row."""
    examples = task_of(*overrides, train=path).examples("train")
    return [(example.source.removeprefix("summarize: "), example.target) for example in examples]


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as error:
        pairs(path, *overrides)
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


ROW = {"document": "d", "summary": "s"}
CUT = json.dumps([ROW, ROW], indent=1)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("pretty.jsonl", json.dumps(ROW, indent=2), r"\(line 1, column 2: [^;)]*\): " + JSON_FORM),
        ("pretty.json", f"\n\n{json.dumps(ROW, indent=2)}", r"\(line 3, column 2: [^;)]*\): " + JSON_FORM),
        ("blank.jsonl", f"{json.dumps(ROW)}\n\n\n{{oops}}\n{json.dumps(ROW)}", r"\(line 4, column 2: [^;)]*\): "),
        (
            "cut.jsonl",
            f'{json.dumps(ROW)}\n\n{{"document": "d", "su',
            r"\(line 3, column 19: .*; the file is cut short",
        ),
        ("middle.jsonl", f'{{"document": "d", "su\n{json.dumps(ROW)}', r"\(line 1, column 19: [^;)]*\): "),
        ("cut.json", CUT[: CUT.rindex('"s"')], r"\(line 8, column 14: .*; the file is cut short there\): " + JSON_FORM),
        ("two.jsonl", f"{json.dumps(ROW)}{json.dumps(ROW)}", r"\(line 1, column 34: Extra data\): " + JSON_FORM),
        ("lists.jsonl", '["d", "s"]\n["d", "s"]\n', r"\(line 2, column 1: Extra data\): " + JSON_FORM),
        ("number.jsonl", f"\n{json.dumps(ROW)}\n3\n", r"record 2 is not an object with named columns \(line 3\)"),
        (
            "twice.jsonl",
            f'{json.dumps(ROW)}\n{{"summary": "a", "summary": "b"}}',
            r"line 2: an object names 'summary' twice",
        ),
        ("twice.json", '[{"summary": "a", "summary": "b"}]', r"an object names 'summary' twice"),
        ("deep.jsonl", f'{json.dumps(ROW)}\n{{"document": {"[" * 200_000}', r"\(line 2: maximum recursion depth"),
        ("deep.json", "[" * 200_000, r"\(maximum recursion depth"),
        (
            "digits.jsonl",
            f'{{"document": {"1" * 5000}, "summary": "s"}}',
            r"\(line 1: Exceeds the limit \(4300 digits\)",
        ),
        (
            "latin.jsonl",
            json.dumps(ROW).encode() + '\n{"document": "é"}'.encode("latin-1"),
            r"\(line 2 is not UTF-8\): save",
        ),
        ("latin.csv", "document,summary\nd,s\né,s\n".encode("latin-1"), r"\(line 3 is not UTF-8\): save"),
        ("wide.csv", "document,summary\nd,s\n".encode("utf-16"), r"\(line 1 is not UTF-8\): save"),
        ("cut.csv", "document,summary\nd,é".encode()[:-1], r"\(line 2 ends inside a character\): save the whole"),
        ("zeros.csv", b"document,summary\nd,s\n" + bytes(64), r"\(line 3 holds a NUL byte\)"),
        ("zeros.jsonl", json.dumps(ROW).encode() + b"\n" + bytes(64), r"\(line 2, column 1: "),
        ("long.csv", 'document,summary\n"a\nb",s\n\nd,s,t\n', r"\(line 5 has more cells than the header\)"),
        (
            "open.csv",
            'document,summary\nd,s\n"d,s\nd,s\n',
            r"\(line 3: unexpected end of data; a cell that begins with",
        ),
        (
            "said.tsv",
            'document\tsummary\n"Hm", he said\ts\n',
            r"\(line 2: .* expected after .*; a cell that begins with",
        ),
        (
            "twice.csv",
            "document,summary,document\na,b,c\n",
            r"names column 'document' twice: .*task.header=\[NAME,…\]\.$",
        ),
        ("short.csv", "document,summary\nd,s\n\nd\n", r"1 of 2 examples .* have no summary \(id train-1\)"),
        ("short.tsv", "summary\tdocument\ns\td\n\ns\n", r"without 'document'.*the first is row 2 \(line 4\) of"),
    ],
)
def test_a_fault_is_told_with_its_line(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    path = file(tmp_path, name, content)
    found = refusal(path)
    assert re.search(told, found), found
    assert str(path) in found or name.startswith("short.csv")


@pytest.mark.parametrize(
    ("name", "content", "right"),
    [
        ("mark.csv", "\ufeffdocument,summary\nd,s\n", [("d", "s")]),
        ("mark.tsv", "\ufeffdocument\tsummary\nd\ts\n", [("d", "s")]),
        ("mark.json", "\ufeff" + json.dumps([ROW]), [("d", "s")]),
        ("mark.jsonl", "\ufeff\n" + json.dumps(ROW), [("d", "s")]),
        ("blank.csv", "\n\ndocument,summary\n\nd,s\n", [("d", "s")]),
        ("long.csv", f"document,summary\n{'x' * 200_000},s\n", [("x" * 200_000, "s")]),
        ("quotes.csv", 'document,summary\n"a ""b"", c\nd",s\nsay "e",s\n', [('a "b", c\nd', "s"), ('say "e"', "s")]),
        ("spare.csv", "document,summary,,\nd,s,,\n", [("d", "s")]),
        ("short.csv", "document,summary,topic\nd,s\n", [("d", "s")]),
        ("mac.csv", "document,summary\rd,s\r", [("d", "s")]),
        ("pair.jsonl", '{"document": "\\ud83d\\ude00", "summary": "s"}', [("\U0001f600", "s")]),
        ("null.jsonl", '{"document": "a\\u0000b", "summary": "s"}', [("a\0b", "s")]),
        ("numbers.csv", "document,summary\n1.0,True\n", [("1.0", "True")]),
    ],
)
def test_what_looks_odd_and_is_right(tmp_path: Path, name: str, content: str, right: list[tuple[str, str]]) -> None:
    assert pairs(file(tmp_path, name, content)) == right


def test_a_lone_surrogate_is_refused_with_row_and_column(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", f'{json.dumps(ROW)}\n\n{{"document": "d", "summary": "half \\ud83d"}}')
    assert refusal(path).startswith(
        f"Row 2 (line 3) of {path} holds a text with the lone surrogate '\\ud83d' in column 'summary', but "
    )


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_without_a_header(tmp_path: Path, name: str) -> None:
    text = "long one,short\nlong two,brief\n"
    path = file(tmp_path, name, text.replace(",", "\t") if name == "a.tsv" else text)
    told = refusal(path)
    assert "no column 'document'" in told and "whose columns are long one, short:" in told
    assert "where its first line is no header, name all 2 columns with task.header=[NAME,…]." in told
    right = [("long one", "short"), ("long two", "brief")]
    assert pairs(path, "task.header=[document,summary]") == right
    assert pairs(path, "task.header=[a,b]", "task.columns.document=a", "task.columns.summary=b") == right
    told = refusal(path, "task.header=[document]")
    assert "line 1 has more cells than task.header" in told
    told = refusal(path, "task.header=[document,b]")
    assert "no column 'summary'" in told and "first line is no header" not in told
    path = file(tmp_path, name, f"document,summary\n{text}".replace(",", "\t" if name == "a.tsv" else ","))
    told = refusal(path, "task.header=[document,summary]")
    assert told == f"{path} has the columns of task.header in its first line: leave task.header out."
    assert pairs(path) == right


@pytest.mark.parametrize("sign", [";", "|"])
def test_a_table_with_other_separators_is_told_so(tmp_path: Path, sign: str) -> None:
    rows = f"document{sign}summary\nd{sign}s\n"
    told = refusal(file(tmp_path, "a.csv", rows))
    assert f"one column, 'document{sign}summary': its cells seem to be separated by '{sign}'" in told
    assert pairs(file(tmp_path, "b.csv", rows.replace(sign, ","))) == [("d", "s")]
    assert pairs(file(tmp_path, "c.tsv", rows.replace(sign, "\t"))) == [("d", "s")]


def test_a_header_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^task.header names document twice: give each column"):
        task_of("task.header=[document,document]")
    with pytest.raises(UsageError, match=r"^task.header has an empty name"):
        task_of("task.header=[document,'']")
    with pytest.raises(UsageError, match=r"^task.labels names a twice: give each class"):
        task_of("task.labels=[a,a]")
    lines = file(tmp_path, "a.jsonl", json.dumps(ROW))
    for sources in ({"train": lines}, {}):
        with pytest.raises(UsageError, match=r"^task.header names the columns of csv and tsv files, of which .* none"):
            task_of("task.header=[document,summary]", "task.hub=x/y", **sources)
    table = file(tmp_path, "b.csv", "d,s\n")
    both = task_of("task.header=[document,summary]", train=table, validation=lines)
    assert both.examples("train")[0].target == both.examples("validation")[0].target == "s"


def test_columns_that_a_parquet_file_has_twice_are_refused_by_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["document", "summary", "summary"]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert "columns named 'summary': rename all but one" in refusal(tmp_path / "a.parquet")
    assert pairs(tmp_path / "a.parquet", "task.columns.summary=document") == [("a", "a")]


def follow(settings: list[str], path: Path) -> list[str]:
    """The settings of an error's advice, each with a value that is there."""
    with pytest.raises(UsageError) as error:
        task = build_task(compose_run(settings))
        task.check(None, {"train": None, task.config.eval_split: None})
    advice = str(error.value).split(": ", 1)[1]
    named = re.findall(r"(\+?task\.[\w.]+)=(?:FILE|COLUMN)", advice)
    assert named, error.value
    return [f"{key}={'title' if 'columns' in key else path}" for key in named]


@pytest.mark.parametrize(("task", "extra"), [("squad", []), ("web_questions", []), ("qa", ["task.eval_split=dev"])])
def test_advice_about_files_works_when_it_is_followed(tmp_path: Path, task: str, extra: list[str]) -> None:
    row = {"id": "1", "question": "q", "context": "c", "answers": {"text": ["a"]}}
    path = file(tmp_path, "mine.jsonl", json.dumps(row))
    for root in (tmp_path, tmp_path / "nowhere"):
        settings = [f"data.root={root}", f"task={task}", *extra]
        followed = follow(settings, path)
        assert len(followed) == 2
        right = build_task(compose_run([*settings, *followed]))
        assert [right.examples(split)[0].target for split in ("train", right.config.eval_split)] == ["a", "a"]
        more = follow([*settings, followed[0]], path)  # the first alone says what is still to do
        assert build_task(compose_run([*settings, followed[0], *more])).examples(right.config.eval_split)


def test_only_a_task_with_a_hub_id_is_sent_to_the_hub(tmp_path: Path) -> None:
    for task, offered in (("squad", True), ("qa", False)):
        with pytest.raises(UsageError) as error:
            build_task(compose_run([f"data.root={tmp_path}", f"task={task}"]))
        assert ("data.root=null to load rajpurkar/squad from the hub" in str(error.value)) is offered


def test_advice_about_columns_works_when_it_is_followed(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", json.dumps({"title": "T", "summary": "s"}))
    settings = ["data.root=null", "task=summarization", "task.prompt='{heading}'", f"task.files.train={path}"]
    settings += [f"task.files.validation={path}"]
    followed = follow(settings, path)
    assert followed == ["+task.columns.heading=title"]
    assert build_task(compose_run([*settings, *followed])).examples("train")[0].source == "T"
