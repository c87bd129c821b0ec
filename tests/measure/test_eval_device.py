"""An evaluation driven by the device: the host-driven one's predictions and scores, and what it refuses."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate import eval as command
from pregate import tracking
from pregate.cli import compose_run
from pregate.config import GeneratedConfig, Policy, Run, UsageError
from pregate.measure import evaluation
from pregate.measure.report.evaluation_tables import routing_table, score_table
from pregate.tasks.generated import generated_tokenizer
from tests.tiny import pregated_model, upstream_model

ROWS = [
    {"question": f"who is {i}?", "context": f"it is number {i}", "answers": [f"number {i}"], "id": str(i)}
    for i in range(6)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside it is the reference, another model."""
    directory = tmp_path_factory.mktemp("models") / "checkpoint"
    pregated_model(0, 2, vocab_size=512).save_pretrained(directory)
    pregated_model(1, 2, vocab_size=512).save_pretrained(directory.with_name("reference"))
    generated_tokenizer(GeneratedConfig(train=200, validation=20)).save_pretrained(directory)
    (directory / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return directory


def run_of(checkpoint: Path, output: Path, *overrides: str) -> Run:
    return compose_run(
        [
            "task=qa",
            f"task.files.validation={checkpoint / 'rows.jsonl'}",
            "task.columns.id=id",
            "task.max_source_tokens=40",
            "task.max_target_tokens=6",
            f"checkpoint={checkpoint}",
            f"reference={checkpoint.with_name('reference')}",
            f"output={output}",
            f"run_dir={output}",
            "tracking=jsonl",
            "engine.device=cpu",
            "engine.bench_prompts=2",
            "engine.bench_new_tokens=5",
            "engine.bench_repeats=2",
            "eval.batch_size=4",
            "eval.report=true",
            *overrides,
        ]
    )


def evaluated(run: Run, output: Path) -> tuple[dict[str, Any], str]:
    command.main(run)
    return json.loads((output / "eval.json").read_text()), (output / "predictions.jsonl").read_text()


def test_it_predicts_what_the_host_driven_evaluation_predicts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no model that it has served is left where it asks whether the whole one fits."""
    host, host_predictions = evaluated(run_of(checkpoint, tmp_path / "h", "engine.tier=dram"), tmp_path / "h")
    open_engine, free_memory = evaluation.open_engine, evaluation.free_memory
    served: list[weakref.ref[Any]] = []
    left: list[list[bool]] = []

    def noted(*given: Any, **options: Any) -> Any:
        engine = open_engine(*given, **options)
        served.append(weakref.ref(engine.model))
        return engine

    def asked(device: torch.device) -> int:
        left.append([model() is not None for model in served])
        return free_memory(device)

    monkeypatch.setattr(evaluation, "open_engine", noted)
    monkeypatch.setattr(evaluation, "free_memory", asked)
    gc.disable()  # or it could happen to run in between
    try:
        device, predictions = evaluated(run_of(checkpoint, tmp_path / "d", "engine.drive=device"), tmp_path / "d")
    finally:
        gc.enable()
    assert left == [[False, False]]
    assert predictions == host_predictions
    for key in ("scores", "parity", "routing"):
        assert device[key] == host[key]
    assert all(share < 1 for blocks in host["routing"]["agreement"].values() for share in blocks)
    assert device["engine_settings"]["drive"] == "device"
    assert device["engine_settings"]["tier"] == "dram"
    assert (tmp_path / "d" / "report.html").is_file()
    for policy, record in device["engine"].items():
        assert record["tokens_equal_resident"] is True
        assert not {"exposed_ms_per_token", "block_ms"} & set(record)
        assert set(record) <= set(host["engine"][policy])
        assert record["bytes_moved"] == record["misses"] * 8192
        if policy == "gpu_only":
            assert record["misses"] == 0


def test_neither_model_needs_to_fit_as_a_whole(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is served within the budget too, and gives the same scores."""
    roomy, predictions = evaluated(
        run_of(checkpoint, tmp_path / "roomy", "engine.policies=[on_demand]"), tmp_path / "roomy"
    )
    opened, open_engine = [], evaluation.open_engine
    monkeypatch.setattr(
        evaluation, "open_engine", lambda *given, **at: opened.append(given) or open_engine(*given, **at)
    )
    monkeypatch.setattr(evaluation, "free_memory", lambda _: 0)
    settings = ("engine.policies=[on_demand]", "engine.device_budget=50%")
    tight, same = evaluated(run_of(checkpoint, tmp_path / "tight", *settings), tmp_path / "tight")
    assert same == predictions and tight["scores"] == roomy["scores"] and tight["routing"] == roomy["routing"]
    assert len(opened) == 3 and all(policy is not Policy.gpu_only for _, _, policy in opened)
    assert roomy["engine"]["on_demand"]["tokens_equal_resident"] is True
    assert "tokens_equal_resident" not in tight["engine"]["on_demand"]
    assert "The whole model does not fit on the device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.tier=disk"], "not from the disk"),
        (["eval.num_beams=2"], "eval.num_beams=2 needs the host"),
        (["eval.batch_size=33"], "serves 1 to 32 rows, not 33"),
        (["engine.cache=lifo"], "caches none and lru"),
        (["engine.device_budget=10%"], "batch 4 can need"),
    ],
)
def test_what_it_cannot_serve_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        command.main(run_of(checkpoint, tmp_path / "out", "engine.drive=device", *overrides))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_conventional_checkpoint_is_called_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the table, the report and the tracker's table; a pre-gated one beside it is the reference."""
    conventional = tmp_path / "conventional"
    upstream_model(0, vocab_size=512).save_pretrained(conventional)
    generated_tokenizer(GeneratedConfig(train=200, validation=20)).save_pretrained(conventional)
    tables: dict[str, list[str]] = {}
    monkeypatch.setattr(tracking.Tracker, "table", lambda _, name, columns, rows: tables.update({name: columns}))
    run = run_of(checkpoint, tmp_path / "out", f"checkpoint={conventional}", "engine.policies=[pre_gated]")
    found, _ = evaluated(run, tmp_path / "out")
    assert found["checkpoint_label"] == "conventional"
    scores, routing = score_table(found), routing_table(found)
    assert scores is not None and routing is not None
    assert [header.split("\n")[0] for header in scores.headers] == ["Metric", "Conventional", "Reference", "Difference"]
    assert tables["parity"][:3] == ["metric", "conventional", "reference"]
    printed = capsys.readouterr().out
    assert "Metric" in printed and "Conventional" in printed.partition("Offloaded inference")[0]
    assert "Pre-gated" not in printed.partition("Offloaded inference")[0]
    shown = (tmp_path / "out" / "report.html").read_text()
    assert "<th>Conventional<small>" in shown and "<th>Conventional</th>" in shown
    assert "The difference is conventional minus reference" in shown and "<th>Pre-gated<small>" not in shown
    assert "Policy pre-gated, per token" in shown, "that is the policy's name"
    assert "Load, conventional" in routing.headers


def test_an_evaluation_of_earlier_days_has_a_label(checkpoint: Path) -> None:
    """Committed files say nothing of it: what was evaluated then was pre-gated."""
    table = score_table({"scores": {"pre_gated": {"em": 1.0}, "reference": {"em": 2.0}}})
    assert table is not None
    assert [header.split("\n")[0] for header in table.headers] == ["Metric", "Pre-gated", "Reference", "Difference"]
