"""The file of records: what is written once, what is torn, what counts."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import zeros

from studies.accuracy.records import append_record, load_records, num_parameters, validation_points


def test_the_environment_is_written_where_it_changes_and_read_everywhere(tmp_path: Path) -> None:
    for cell, torch in (("a", "1"), ("b", "1"), ("c", "2"), ("d", "2"), ("a", "2")):
        append_record(tmp_path, {"cell": cell, "seed": torch, "environment": {"torch": torch}})
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert ["environment" in line for line in lines] == [True, False, True, False, False]
    records = {record["cell"]: record for record in load_records(tmp_path)}
    assert {name: record["environment"]["torch"] for name, record in records.items()} == {
        "a": "2",
        "b": "1",
        "c": "2",
        "d": "2",
    }
    assert len(load_records(tmp_path)) == 4, "of a cell the latest record counts"


def test_a_torn_line_is_left_out_and_does_not_tear_the_next(tmp_path: Path) -> None:
    append_record(tmp_path, {"cell": "a", "environment": {}})
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"cell": "b", "sco')
    append_record(tmp_path, {"cell": "c", "environment": {}})
    assert [record["cell"] for record in load_records(tmp_path)] == ["a", "c"]


def test_validation_points_of_one_stage_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 10, "train/loss": 2.0},
        {"step": 10, "train/eval/f1": 30.0, "train/eval/loss": 2.0},
        {"step": 20, "train/eval/f1": 40.0, "train/eval/loss": 1.0},
        {"step": 10, "train/eval/f1": 31.0, "train/eval/loss": 2.0},
        {"step": 5, "source/eval/f1": 9.0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert validation_points(path) == [{"step": 10, "f1": 31.0, "loss": 2.0}, {"step": 20, "f1": 40.0, "loss": 1.0}]
    assert validation_points(tmp_path / "none") == []


def test_weights_are_counted_over_all_files_of_a_checkpoint(tmp_path: Path) -> None:
    assert num_parameters(tmp_path) is None and num_parameters(tmp_path / "none") is None
    save_file({"a": zeros(3, 4), "b": zeros(5)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": zeros(2, 2, 2), "d": zeros(())}, tmp_path / "model-00002-of-00002.safetensors")
    assert num_parameters(tmp_path) == 12 + 5 + 8 + 1
