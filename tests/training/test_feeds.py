"""Pre-training through the whole loop: packed batches, resume, two processes, and the command that users run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, SwitchTransformersForConditionalGeneration

from pregate.cli import compose_run, entry_point
from pregate.config import TaskKind
from pregate.config.choices import PRE_TRAINING
from pregate.tasks import text_stream
from pregate.tasks.language_modelling import LanguageModelling
from pregate.training.batch_order import derive_batching
from pregate.training.feeds import Share, StreamFeed
from pregate.training.loop import TrainSummary, fine_tune
from pregate.training.session import prepare
from pregate.training.state_values import TrainState
from tests.engine.olmoe import olmoe
from tests.tasks.corpora import SETTINGS, corpus_task, sentinel_tokenizer, write_corpus
from tests.tiny import SEQ2SEQ, pregated_model
from tests.training.copying import SHALLOW, Recorder, recipe, short_run

GEOMETRY = (
    "{d_model: 16, d_kv: 8, d_ff: 16, num_heads: 2, num_layers: 2, num_decoder_layers: 2, num_experts: 4,"
    " num_sparse_encoder_layers: 2, num_sparse_decoder_layers: 2}"
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_stream, "BLOCK_DOCUMENTS", 7)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"))


def feed(root: Path, rank: int = 0, world: int = 1, workers: int = 0, **changes: Any) -> StreamFeed:
    train, run = recipe(**changes), short_run()
    run.task.max_source_tokens, run.data.num_workers = 16, workers
    share = Share(run, train, SEQ2SEQ, derive_batching(train, 16, world), rank, pin_memory=False)
    return StreamFeed(corpus_task(root), sentinel_tokenizer(), share)


def test_processes_share_the_rows_of_a_step(root: Path) -> None:
    steps = 5
    alone = feed(root, steps=steps)
    state = TrainState()
    one = [batch["input_ids"] for batch in alone.micro_batches(state)]
    alone.mark(state)
    assert len(one) == steps * alone.share.batching.accumulation_steps
    parts, positions = [], []
    for rank in range(3):
        part = feed(root, rank, 3, steps=steps)
        own = TrainState()
        parts.append(torch.cat([batch["input_ids"] for batch in part.micro_batches(own)]))
        part.mark(own)
        positions.append(own.position)
    assert [len(part) for part in parts] == [10, 10, 10]
    rows = [sorted(batch.tolist()) for batch in (torch.cat(one), torch.cat(parts))]
    assert rows[0] == rows[1]
    assert positions == [state.position] * 3


def test_a_worker_reads_ahead_without_moving_the_position(root: Path) -> None:
    found = []
    for workers in (0, 1):
        stream = feed(root, workers=workers, steps=30, micro_batch_tokens=1000)
        state, seen = TrainState(), []
        batches = stream.micro_batches(state)
        for _ in range(12):
            seen.append(next(batches)["labels"].tolist())
            stream.mark(state)
        found.append((seen, state.position, state.epoch))
    assert found[0] == found[1]


def pre_train(
    out_dir: Path,
    root: Path,
    *,
    kind: TaskKind = TaskKind.denoising,
    resume: bool = False,
    tracker: Recorder | None = None,
    **changes: Any,
) -> tuple[Any, Recorder, TrainSummary]:
    run = short_run(resume)
    run.task.max_source_tokens, run.task.max_target_tokens = 16, 16
    if kind is TaskKind.denoising:
        model, task = pregated_model(lookahead=0, **SHALLOW), corpus_task(root)
    else:
        settings = [f"data.root={root}", "task=language_modelling", "task.max_source_tokens=16"]
        model, task = olmoe(lookahead=0), LanguageModelling(compose_run(settings))
    tracker = tracker or Recorder()
    session = prepare(
        model,
        sentinel_tokenizer(),
        task,
        recipe(**changes),
        run=run,
        out_dir=out_dir,
        tracker=tracker,  # type: ignore[arg-type]
        stage="tiny",
    )
    return model, tracker, fine_tune(session)


@pytest.mark.parametrize("kind", sorted(PRE_TRAINING))
def test_a_resumed_run_sees_the_batches_of_one_that_never_stopped(tmp_path: Path, root: Path, kind: TaskKind) -> None:
    settings = {"kind": kind, "steps": 24, "dropout": 0.1, "eval_every": 8, "save_every": 100}
    straight, logged, summary = pre_train(tmp_path / "straight", root, **settings)
    assert summary.metrics["tiny/epoch"] >= 1
    with pytest.raises(KeyboardInterrupt):
        pre_train(tmp_path / "halves", root, tracker=Recorder(interrupt_at=11), **settings)
    kept = json.loads((tmp_path / "halves" / "last" / "train_state.json").read_text())["state"]
    assert kept["step"] == 11
    assert kept["position"][2] > 0
    resumed, second, again = pre_train(tmp_path / "halves", root, resume=True, **settings)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert {step for name, step in second.at if name == "tiny/loss"} == set(range(12, 25))
    for key, value in second.at.items():
        assert "tokens_per_s" in key[0] or logged.at[key] == value, (key, logged.at[key], value)
    assert (again.best_score, again.best_step) == (summary.best_score, summary.best_step)


def test_the_best_state_is_that_of_the_lowest_loss(tmp_path: Path, root: Path) -> None:
    _, logged, summary = pre_train(tmp_path, root, steps=40, eval_every=10, learning_rate=2e-2, batch_sequences=16)
    losses = {step: value for (key, step), value in logged.at.items() if key == "tiny/eval/loss"}
    assert set(losses) == {10, 20, 30, 40}
    assert summary.best_score == min(losses.values())
    assert losses[summary.best_step or 0] == summary.best_score
    assert losses[40] < 0.9 * losses[10], losses
    assert not any("accuracy" in key for key, _ in logged.at)


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["pregate.train", *arguments])
    GlobalHydra.instance().clear()
    try:
        entry_point(importlib.import_module("pregate.train").main)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.usefixtures("in_process_hydra")
def test_the_command_leaves_a_conventional_checkpoint_that_training_goes_on_from(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sentinel_tokenizer().save_pretrained(tmp_path / "tokenizer")
    scratch = [
        *("tracking=jsonl", "pregate=conventional", f"data.root={root}", "model.tokenizer=tokenizer", *SETTINGS),
        *("train.steps=3", "train.batch_sequences=4", "train.eval_examples=4", "model=study_nano"),
    ]
    assert command([*scratch, f"model.geometry={GEOMETRY}", "run_dir=run"], monkeypatch) == 0, capfd.readouterr().err
    run_dir = tmp_path / "run"
    assert {path.name for path in run_dir.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "summary.json", "checkpoint", "last"),
    }
    model = AutoModelForSeq2SeqLM.from_pretrained(run_dir / "checkpoint")
    assert type(model) is SwitchTransformersForConditionalGeneration
    assert len(AutoTokenizer.from_pretrained(run_dir / "checkpoint")) == len(sentinel_tokenizer())
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["source"] is None
    assert summary["train"]["best_score"] == pytest.approx(summary["train"]["metrics"]["train/eval/loss"])
    assert "tokens_per_s" in (run_dir / "metrics.jsonl").read_text()
    resumed = [*scratch, f"model.geometry={GEOMETRY}", "run_dir=run", "resume=true", "train.steps=5"]
    assert command(resumed, monkeypatch) == 0, capfd.readouterr().err
    assert json.loads((run_dir / "summary.json").read_text())["train"]["steps"] == 5
    onward = [*scratch, f"model.source={run_dir}/checkpoint", "run_dir=onward"]
    assert command(onward, monkeypatch) == 0, capfd.readouterr().err
    assert json.loads((tmp_path / "onward" / "summary.json").read_text())["source"] == f"{run_dir}/checkpoint"


@pytest.mark.usefixtures("in_process_hydra")
def test_a_model_without_a_source_still_needs_one_elsewhere(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["task=sst2", "model=study_nano", f"data.root={root}"], monkeypatch) == 2
    assert "names no source" in capfd.readouterr().err


@pytest.mark.usefixtures("in_process_hydra")
def test_an_evaluation_of_it_is_refused_before_any_work(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["+experiment=pretrain_nano", f"data.root={root}", "then_eval=true"], monkeypatch) == 2
    assert "set then_eval=false" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
