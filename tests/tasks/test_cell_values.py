"""What cells of every type say, in every column, format and kind of task: the right text, or one sentence that names
row, column and type."""

from __future__ import annotations

import csv
import datetime
import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings

from pregate.cli import compose_run
from pregate.config import Run, UsageError
from pregate.tasks.base import Example, Task
from pregate.tasks.registry import build_training_task, splits_read
from pregate.tasks.span_corruption import SpanCorruption
from tests.tasks.corpora import SETTINGS, sentinel_tokenizer

COLUMNS = {
    "qa": ("question", "context", "answers"),
    "summarization": ("document", "summary"),
    "classification": ("text", "label"),
    "denoising": ("text",),
}
PROMPTS = {"qa": "question: {} context: {}", "summarization": "summarize: {}", "classification": "classify: {}"}
NO_REFERENCE = {"qa": "have no answer", "summarization": "have no summary", "classification": "have a label that is"}
WRITTEN_OUT = "a list, a struct or bytes written as text"
LABELS = ["bad", "good", "3"]


@functools.cache
def composed(kind: str) -> Run:
    name = [f"task={kind}", f"task.labels={LABELS}"] if kind != "denoising" else SETTINGS
    return compose_run(["data.root=null", "task.hub=null", *name])


def task_over(kind: str, path: Path | None, **changes: Any) -> Task | SpanCorruption:
    """The task of `kind` over a file, or over the hub for None."""
    run = composed(kind)
    changes |= {"hub": "some/set"} if path is None else {"files": {"train": str(path)}}
    return build_training_task(replace(run, task=replace(run.task, **changes)))


def write(form: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), dialect="excel" if form == "csv" else "excel-tab")
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if form == "json" else "\n".join(json.dumps(row) for row in rows))
    return path


def sentence(error: pytest.ExceptionInfo[UsageError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    return text


# What a cell says, written a second time and otherwise: by walking over it with the place of each value in it.

ONE, LISTED = "one", "listed"
NUMBERS = {"prompt": {ONE}, "answers": {ONE, LISTED}, "summary": set(), "text": set(), "label": {ONE}, "id": {ONE}}


class RefusedError(Exception):
    """Its text: a pattern of the types that a refusal may name."""


class Fault(str):
    pass


def values(cell: Any, depth: int = 0) -> list[tuple[str, Any]]:
    """(place, value) of everything that is said; `text` of a struct is what the struct says."""
    if isinstance(cell, dict):
        cell = cell["text"] if "text" in cell else Fault("struct without a field text")
        cell = Fault("struct") if isinstance(cell, dict) else cell
    if isinstance(cell, list):
        inner = [(LISTED, value) for item in cell for _, value in values(item, 1)]
        return [(ONE, Fault("a list inside a list"))] if depth else inner
    return [] if cell is None else [(ONE, cell)]


def fault_of(place: str, value: Any, role: str) -> str | None:
    if isinstance(value, Fault):
        return str(value)
    if role in ("label", "id") and place == LISTED:
        return "a list"
    if isinstance(value, str):
        return "surrogate" if any(0xD800 <= ord(character) < 0xE000 for character in value) else None
    if type(value) is int and place in NUMBERS[role]:
        return None
    if type(value) is float:
        return "NaN" if math.isnan(value) else "float"
    return {bool: "boolean", int: "whole number", bytes: "bytes", datetime.date: "date"}[type(value)]


def said(cell: Any, role: str) -> list[str] | None:
    """The texts of a cell in a role, None for null; raises `RefusedError`."""
    found = values(cell)
    faults = [fault for place, value in found if (fault := fault_of(place, value, role))]
    if faults:
        raise RefusedError("|".join(faults))
    if cell is None or (isinstance(cell, dict) and cell["text"] is None):
        return None
    texts = [value if isinstance(value, str) else f"{value:d}" for _, value in found]
    return [text if place == ONE else text.strip() for (place, _), text in zip(found, texts, strict=True)]


def label_of(cell: Any) -> str | None:
    """By hand for LABELS: their words and positions; the word "3" is no position."""
    if isinstance(cell, dict) and "text" in cell:
        cell = cell["text"]
    if isinstance(cell, list):
        raise RefusedError("a list")
    if type(cell) is float and cell in (0.0, 1.0, 2.0, 3.0):
        cell = int(cell)
    if type(cell) is float and cell.is_integer():
        return None
    table = {"bad": "bad", "0": "bad", "good": "good", "1": "good", "3": "3", "2": "3"}
    texts = said(cell, "label")
    return table.get(texts[0].strip()) if texts else None


def expected(kind: str, rows: list[dict[str, Any]]) -> list[Example] | str:
    """The examples of rows, or a pattern of the refusal."""
    examples, without = [], 0
    for number, row in enumerate(rows, start=1):
        name = "none"
        try:
            shown = []
            for name in COLUMNS[kind][:-1]:
                texts = said(row[name], "prompt")
                if texts is None:
                    return rf"has rows without {name!r}.*\(the first is row {number} "
                shown.append(" ".join(text for text in texts if text))
            name = COLUMNS[kind][-1]
            if kind == "classification":
                word = label_of(row[name])
                right = () if word is None else (word,)
            else:
                stripped = [text.strip() for text in said(row[name], name) or []]
                kept = [text for text in stripped if text]
                right = tuple(dict.fromkeys(kept if kind == "qa" else [" ".join(kept)] if kept else []))
            name = "id"
            cell = row.get("id")
            whole = type(cell) is float and math.isfinite(cell) and cell == math.floor(cell)
            if isinstance(cell, dict | list):
                raise RefusedError("struct" if isinstance(cell, dict) else "a list")
            own = said(math.floor(cell) if whole else cell, "id")
        except RefusedError as refused:
            return rf"^Row {number} (\((line \d+)?.*\) )?of \S.* holds .*({refused}).* in column '{name}', but "
        without += not right
        identity = own[0] if own else f"train-{number - 1}"
        source = PROMPTS[kind].format(*shown)
        examples.append(Example(identity, source, right[0] if right else "", right))
    return rf"^{without} of {len(rows)} examples.*{NO_REFERENCE[kind]}" if without else examples


TEXTS = st.one_of(
    st.sampled_from(
        ["bad", "3", " good ", "", "  ", "None", "1.0", "[x]", "{a}", 'say "hi"', "two\nlines", "tab\there"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
SCALARS = [st.none(), TEXTS, st.integers(-2, 5), st.integers(), st.booleans(), st.floats(), st.sampled_from([1.0, 0.5])]
JSON_ONLY = [st.just("half \ud83d")]
ARROW_ONLY = [st.binary(max_size=4), st.just(datetime.date(2020, 1, 2))]


def nested(scalars: list[st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Any cell: scalars, lists, structs with and without a text, and these in each other."""
    names = st.sampled_from(["text", "text", "answer_start", "other"])
    return st.recursive(
        st.one_of(scalars),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, min_size=1, max_size=2)),
        max_leaves=5,
    )


@st.composite
def tables(draw: st.DrawFn, kind: str, form: str) -> list[dict[str, Any]]:
    """Rows of texts in which some columns hold something else; in the first row, if cells of a column are alike."""
    arrow, table = form in ("parquet", "hub"), form in ("csv", "tsv")
    if table:
        lists = st.lists(TEXTS, max_size=2)
        cells = st.one_of(TEXTS, lists.map(str), lists.map(lambda found: str({"text": found})))
    else:
        cells = nested([*SCALARS, *(ARROW_ONLY if arrow else JSON_ONLY)])
    names = [*COLUMNS[kind], "id"]
    count = draw(st.integers(1, 3))
    rows = [{name: f"{name} {number}" for name in names} for number in range(count)]
    for row in rows:
        row.update({"label": draw(st.sampled_from(LABELS))} if kind == "classification" else {})
    for name in draw(st.lists(st.sampled_from(names), unique=True, max_size=3)):
        number, cell = draw(st.integers(0, count - 1)), draw(cells)
        for row in rows if arrow else [rows[number]]:
            row[name] = cell
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cells")


def as_written(form: str, path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the rows are once they are in a file: Arrow gives all structs of a column the same fields."""
    if form in ("parquet", "hub"):
        return pq.read_table(path).to_pylist()
    return rows


def outcome(kind: str, form: str, path: Path, **changes: Any) -> list[Any] | str:
    """The examples, or for denoising the documents, of a file; the sentence of a refusal."""
    import datasets

    def load_dataset(*args: Any, **options: Any) -> Any:
        return datasets.Dataset(pq.read_table(path))

    with mock.patch.object(datasets, "load_dataset", load_dataset):
        try:
            task = task_over(kind, None if form == "hub" else path, **changes)
            if isinstance(task, SpanCorruption):
                return [text for chunk in task._chunks("train") for text in task._texts(chunk)]
            return task.examples("train")
        except UsageError as error:
            assert "\n" not in str(error) and str(error).endswith("."), error
            return str(error)


def written(form: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{'parquet' if form == 'hub' else form}"
    try:
        return write("parquet" if form == "hub" else form, path, rows)
    except (pa.ArrowException, OverflowError):  # a struct without fields, lists of unlike things
        assume(False)
        raise


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *((kind, form) for kind in PROMPTS for form in ("parquet", "jsonl", "csv")),
        *(("qa", "hub"), ("summarization", "json"), ("classification", "tsv")),
    ],
)
def test_random_cells_are_right_or_refused_by_name(kind: str, form: str, folder: Path) -> None:
    seen: dict[bool, int] = {True: 0, False: 0}

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(tables(kind, form))
    def holds(rows: list[dict[str, Any]]) -> None:
        path = written(form, folder, rows)
        found = outcome(kind, form, path, columns={**composed(kind).task.columns, "id": "id"})
        right = (
            expected_of_table(kind, rows) if form in ("csv", "tsv") else expected(kind, as_written(form, path, rows))
        )
        seen[isinstance(right, str)] += 1
        if isinstance(right, str):
            assert isinstance(found, str) and re.search(right, found), (right, found)
        else:
            assert found == right

    holds()
    assert min(seen.values()) > 3, seen


def expected_of_table(kind: str, rows: list[dict[str, Any]]) -> list[Example] | str:
    """A table's cells are text; one that Python has written out is refused."""
    for number, row in enumerate(rows, start=1):
        for name in (*COLUMNS[kind], "id"):
            if row[name].startswith(("['", '["', "[]", "{'")):
                return rf"^Row {number} \(line \d+.*\) of \S* holds {WRITTEN_OUT} in column '{name}'"
    return expected(kind, rows)


@pytest.mark.parametrize("form", ["parquet", "hub", "jsonl", "csv"])
def test_random_documents_are_right_or_refused_by_name(form: str, folder: Path) -> None:
    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(tables("denoising", form))
    def holds(rows: list[dict[str, Any]]) -> None:
        path = written(form, folder, rows)
        found = outcome("denoising", form, path)
        right: list[str] = []
        for number, row in enumerate(as_written(form, path, rows), start=1):
            cell = row["text"]
            try:
                if form in ("csv", "tsv") and cell.startswith(("['", '["', "[]", "{'")):
                    raise RefusedError(WRITTEN_OUT)
                right.append(" ".join(said(cell, "text") or []))
            except RefusedError as refused:
                assert isinstance(found, str), (found, refused)
                assert re.search(rf"^Row {number} .*holds .*({refused}).* in column 'text', but ", found), (
                    found,
                    refused,
                )
                return
        assert found == [text for text in right if text]

    holds()


SENTENCES = [["Gates decide early.", "So copies overlap."], ["One sentence."]]
ANSWERS = [["Denver Broncos", "Broncos"], ["1999"]]
SHAPES = {
    "SQuAD's struct": [{"text": texts, "answer_start": [177] * len(texts)} for texts in ANSWERS],
    "a list of structs": [[{"text": text, "answer_start": 3} for text in texts] for texts in ANSWERS],
    "a list of texts": ANSWERS,
}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_lists_of_sentences_are_joined_and_the_perfect_summary_scores_100(form: str, tmp_path: Path) -> None:
    rows = [{"document": [f"{text} Long." for text in texts], "summary": texts} for texts in SENTENCES]
    path = written(form, tmp_path, rows)
    found = outcome("summarization", form, path)
    right = ["Gates decide early. So copies overlap.", "One sentence."]
    assert [example.source for example in found] == [
        "summarize: Gates decide early. Long. So copies overlap. Long.",
        "summarize: One sentence. Long.",
    ]
    assert [(example.target, example.references) for example in found] == [(text, (text,)) for text in right]
    task = task_over("summarization", path)
    assert isinstance(task, Task)
    assert task.score(right, [example.references for example in found]).overall["rouge1"] == 100.0
    assert task.score(right[::-1], [example.references for example in found]).overall["rouge1"] < 50


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("shape", "column"),
    [(shape, "answers") for shape in SHAPES] + [(shape, "answers.text") for shape in list(SHAPES)[:2]],
)
def test_right_answers_in_every_shape_score_100(form: str, shape: str, column: str, tmp_path: Path) -> None:
    cells = SHAPES[shape]
    rows = [{"question": "q", "context": "c", "answers": cell} for cell in cells]
    path = written(form, tmp_path, rows)
    found = outcome("qa", form, path, columns={**composed("qa").task.columns, "answers": column})
    assert [example.references for example in found] == [tuple(texts) for texts in ANSWERS]
    task = task_over("qa", path)
    assert isinstance(task, Task)
    scores = task.score(["the Broncos", "1999"], [example.references for example in found]).overall
    assert scores == {"em": 100.0, "f1": 100.0}
    assert task.score(["1999", "Broncos"], [example.references for example in found]).overall["em"] == 0


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_whole_numbers_are_their_digits(form: str, tmp_path: Path) -> None:
    rows = [{"id": 7, "question": 12, "context": "c", "answers": [1999, 2000]}]
    found = outcome("qa", form, written(form, tmp_path, rows), columns={**composed("qa").task.columns, "id": "id"})
    assert found == [Example("7", "question: 12 context: c", "1999", ("1999", "2000"))]


@pytest.mark.parametrize(
    ("labels", "cells", "words"),
    [
        (["no", "yes"], [True, False, {"text": "no"}, " yes "], ["yes", "no", "no", "yes"]),
        (["true", "false"], [True, False], ["true", "false"]),  # not the positions 1 and 0
        (["False", "True"], [True, False], ["True", "False"]),
        (["1.0", "2.0"], [1.0, 2.0, "1.0"], ["1.0", "2.0", "1.0"]),  # not the position 1
        (["1", "2", "3", "4", "5"], [1, 5, "3", 2.0], ["1", "5", "3", "2"]),
        (["0.5", "1.5"], [0.5, 1.5], ["0.5", "1.5"]),
        (["1", "0"], [True, 0, 1], ["1", "0", "1"]),
    ],
)
def test_labels_by_hand(labels: list[str], cells: list[Any], words: list[str], tmp_path: Path) -> None:
    path = write("jsonl", tmp_path / "a.jsonl", [{"text": "t", "label": cell} for cell in cells])
    task = task_over("classification", path, labels=labels)
    assert isinstance(task, Task)
    assert [example.target for example in task.examples("train")] == words


@pytest.mark.parametrize(
    ("labels", "cell", "told"),
    [
        (
            ["1", "2", "3", "4", "5"],
            0,
            "1 of 1 examples .* a label that is not one of 1, 2, 3, 4, 5",
        ),  # not the first of them
        (["None", "some"], None, "1 of 1 examples .* neither 0 to 1 nor one of None, some"),
        (["a", "b", "c"], True, "holds a boolean in column 'label'"),
        (["a", "b"], 0.5, r"holds a float \(0.5\) in column 'label'"),
        (["a", "b"], math.nan, "holds NaN in column 'label'"),
        (["a", "b"], [1], "holds a list in column 'label'"),
    ],
)
def test_labels_that_say_nothing(labels: list[str], cell: Any, told: str, tmp_path: Path) -> None:
    task = task_over(
        "classification", write("jsonl", tmp_path / "a.jsonl", [{"text": "t", "label": cell}]), labels=labels
    )
    assert isinstance(task, Task)
    with pytest.raises(UsageError, match=told) as error:
        task.examples("train")
    sentence(error)


def test_an_id_is_never_a_python_value(tmp_path: Path) -> None:
    rows = [{"id": cell, "document": "d", "summary": "s"} for cell in (None, 3.0, 4, "x")]
    columns = {"id": "id", "document": "document", "summary": "summary"}
    found = outcome("summarization", "jsonl", write("jsonl", tmp_path / "a.jsonl", rows), columns=columns)
    assert [example.id for example in found] == ["train-0", "3", "4", "x"]
    short = tmp_path / "a.csv"
    short.write_text("document,summary,id\nd,s,7\nd,s\n")
    assert [example.id for example in outcome("summarization", "csv", short, columns=columns)] == ["7", "train-1"]


def test_text_that_arrow_cannot_read_is_named(tmp_path: Path) -> None:
    summaries = pa.array([b"good", b"bad \xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"document": ["d", "d"], "summary": summaries}), tmp_path / "a.parquet")
    for form in ("parquet", "hub"):
        found = outcome("summarization", form, tmp_path / "a.parquet")
        assert re.search(r"^Row 2 of .* holds a value of type string that cannot be read .* in column 'summary'", found)


def test_a_dotted_column_needs_a_struct(tmp_path: Path) -> None:
    rows = [{"question": "q", "context": "c", "answers": cell} for cell in ({"text": ["a"]}, "a")]
    columns = {"question": "question", "context": "context", "answers": "answers.text"}
    for cell, told in ("a", "a text"), (["a"], "a text inside a list"), (5, "a whole number"):
        rows[1]["answers"] = cell
        found = outcome("qa", "jsonl", write("jsonl", tmp_path / "a.jsonl", rows), columns=columns)
        assert found.startswith(f"Row 2 (line 2) of {tmp_path}/a.jsonl holds {told} in column 'answers.text', but ")
    rows[0]["answers"] = rows[1]["answers"] = []  # nothing tells that there is such a field, and nothing says no
    found = outcome("qa", "jsonl", write("jsonl", tmp_path / "a.jsonl", rows), columns=columns)
    assert found.startswith("2 of 2 examples in split 'train' of task 'qa' have no answer")


def test_cells_behind_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    rows = [{"document": "d", "summary": cell} for cell in ("a", "b", 0.5)]
    task = task_over("summarization", write("jsonl", tmp_path / "a.jsonl", rows))
    assert isinstance(task, Task)
    assert [example.target for example in task.examples("train", 2)] == ["a", "b"]
    task.check(None, {"train": 2})
    with pytest.raises(UsageError, match="Row 3 "):
        task.check(None, {"train": None})


def test_what_a_run_reads_is_checked_before_it_starts(tmp_path: Path) -> None:
    settings = ["train.eval_examples=5", "task.eval_split=dev"]
    assert splits_read(compose_run([*settings, "eval.examples=9"])) == {"train": None, "dev": 9}
    assert splits_read(compose_run([*settings, "then_eval=false"])) == {"train": None, "dev": 5}
    assert splits_read(compose_run([*settings, "data.max_train_examples=7"])) == {"train": 7, "dev": None}
    assert splits_read(compose_run([*settings, "eval.split=test", "eval.examples=2"])) == {
        "train": None,
        "dev": 5,
        "test": 2,
    }


def test_a_late_document_is_refused_by_the_check(tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"w{i}" for i in range(30))} for _ in range(2000)] + [{"text": ["fine", 0.5]}]
    task = task_over("denoising", write("jsonl", tmp_path / "a.jsonl", rows))
    next(task.rows("train", sentinel_tokenizer()))
    with pytest.raises(
        UsageError, match=r"^Row 2001 \(line 2001\) .* holds a float \(0.5\) inside a list in column 'text'"
    ):
        task.check(sentinel_tokenizer(), ["train"])
