"""The command, and every refusal: one sentence that says what to do, before anything is written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pregate.cli import compose_run
from pregate.config import (
    CalibrationConfig,
    Entry,
    Init,
    ModelConfig,
    PreGateConfig,
    Run,
    TaskConfig,
    UsageError,
)
from pregate.conversion import shards
from pregate.conversion import write as conversion
from pregate.conversion.write import convert
from pregate.convert import work
from pregate.system.stopping import Terminated
from tests.make_switch_base import SWITCH_BASE_8, TINY, make, shapes, sparse_steps
from tests.tiny import upstream_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make(directory, "bin", **TINY)
    return directory


def edit_config(directory: Path, drop: tuple[str, ...] = (), **changes) -> None:
    path = directory / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **changes}))


def edit_tensors(directory: Path, drop: tuple[str, ...] = (), **changes) -> None:
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    left = {name: tensor for name, tensor in tensors.items() if name not in drop}
    torch.save({**left, **changes}, directory / "pytorch_model.bin")


EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight"
REFUSALS = {
    "dense": (lambda d: edit_config(d, tuple(k for k in SWITCH_BASE_8 if "expert" in k), model_type="t5"), "dense t5"),
    "no sparse layer": (
        lambda d: edit_config(
            d,
            num_sparse_encoder_layers=0,
            num_sparse_decoder_layers=0,
            num_layers=1,
            num_decoder_layers=1,
            encoder_sparse_step=0,
            decoder_sparse_step=0,
        ),
        "dense model",
    ),
    "other family": (
        lambda d: edit_config(d, model_type="llama"),
        "is a llama model, which cannot be converted",
    ),
    "no family": (lambda d: edit_config(d, ("model_type",)), "names no model_type"),
    "bad config": (
        lambda d: edit_config(d, d_model="wide"),
        "describes no model that can be built",
    ),
    "few blocks": (
        lambda d: edit_config(d, num_sparse_decoder_layers=1, decoder_sparse_step=8),
        "needs at least 2 MoE blocks in the decoder, which has",
    ),
    "missing tensors": (lambda d: edit_tensors(d, (EXPERT,)), f"lacks {EXPERT}"),
    "missing embeddings": (
        lambda d: edit_tensors(
            d, tuple(n for n in shapes(sparse_steps({**SWITCH_BASE_8, **TINY})) if "block" not in n)
        ),
        "lacks",
    ),
    "missing head": (
        lambda d: (edit_config(d, tie_word_embeddings=False), edit_tensors(d, ("lm_head.weight",))),
        "lacks lm_head.weight",
    ),
    "unknown tensors": (lambda d: edit_tensors(d, **{"a.b": torch.ones(1)}), "unknown tensors, namely a.b"),
    "other shape": (lambda d: edit_tensors(d, **{EXPERT: torch.ones(2, 3)}), "of shape (2, 3)"),
    "truncated": (
        lambda d: (d / "pytorch_model.bin").write_bytes((d / "pytorch_model.bin").read_bytes()[:9999]),
        "pytorch_model.bin is truncated",
    ),
}


def refused(directory: Path, output: Path, **options) -> str:
    """The one sentence that a conversion ends in; checks that it leaves its surroundings as they were."""
    before = {path: path.stat().st_mtime_ns for path in sorted(output.parent.rglob("*"))}
    with pytest.raises(UsageError) as error:
        convert(str(directory), output, options.pop("pregate", PreGateConfig()), **options)
    after = {path: path.stat().st_mtime_ns for path in sorted(output.parent.rglob("*"))}
    assert before == after
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text, text
    return text


@pytest.mark.parametrize("kind", REFUSALS)
def test_unfit_sources_are_refused(tmp_path, kind):
    make(tmp_path / "source", "bin", **TINY)
    spoil, words = REFUSALS[kind]
    spoil(tmp_path / "source")
    assert words in refused(tmp_path / "source", tmp_path / "out")


def test_every_shard_is_checked_before_anything_is_written(tmp_path):
    make(tmp_path / "source", "safetensors", 3, **TINY)
    last = tmp_path / "source" / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-8])
    assert last.name in refused(tmp_path / "source", tmp_path / "out")


def test_pregated_sources_are_refused(tiny, tmp_path):
    convert(str(tiny), tmp_path / "first", PreGateConfig(2))
    assert "already pre-gated (lookahead 2)" in refused(tmp_path / "first", tmp_path / "second")


def test_lookahead_beyond_the_blocks_of_a_chosen_stack_only(tmp_path):
    geometry = {**TINY, "num_layers": 4, "num_sparse_encoder_layers": 2}
    make(tmp_path / "source", "bin", **geometry)
    text = refused(tmp_path / "source", tmp_path / "out", pregate=PreGateConfig(2))
    assert "lookahead=2 needs at least 3 MoE blocks in the encoder" in text and "has 2" in text
    convert(str(tmp_path / "source"), tmp_path / "decoder", PreGateConfig(2, ["decoder"]))
    convert(str(tmp_path / "source"), tmp_path / "one", PreGateConfig(1))


def test_occupied_outputs_are_refused(tiny, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    assert "exists already" in refused(tiny, tmp_path / "full")
    assert "exists already" in refused(tiny, tmp_path / "full" / "precious")
    (tmp_path / "empty").mkdir()
    convert(str(tiny), tmp_path / "empty", PreGateConfig())
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_other_refusals(tiny, tmp_path, monkeypatch):
    (tmp_path / "tokenizer").mkdir()
    text = refused(tiny, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert "holds no tokenizer" in text
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "1.00 kB free" in refused(tiny, tmp_path / "deep" / "out")


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), Terminated(), RuntimeError("bug"), OSError(28, "No space left on device")]
)
def test_a_failure_in_the_first_file_leaves_nothing_behind(tiny, tmp_path, monkeypatch, failure):
    """`tests/system/test_unfinished.py` has what later ones leave."""
    places = []

    def failing(path, *_):
        places.append(path.parent.name)
        path.write_text("half")
        raise failure

    monkeypatch.setattr(shards, "write_shard", failing)
    expected = UsageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as error:
        convert(str(tiny), tmp_path / "deep" / "deeper" / "out", PreGateConfig(), max_shard_bytes=50_000)
    assert len(places) == 1 and places[0].startswith(f"out.partial-{os.getpid()}-")
    assert list(tmp_path.iterdir()) == []
    assert "No space" in str(error.value) or not isinstance(failure, OSError)


def command(cwd: Path, *overrides: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-m", "pregate.convert", *overrides]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)


def test_command_line(tiny, tmp_path):
    done = command(tmp_path, f"source={tiny}", "output=out", "pregate.entry=embedding", "pregate.lookahead=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "progress belongs on a terminal"
    assert "encoder: 4 MoE blocks, 2 gates moved 2 ahead" in done.stdout and "checkpoint=out" in done.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pregate"]["lookahead"] == 2


def test_command_line_refusal(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    done = command(tmp_path, f"source={tiny}", "output=out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("pregate: out exists already") and done.stderr.count("\n") == 1, done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["precious"]
    assert not list(tmp_path.glob("*.partial*"))


def test_both_places_are_required(tiny):
    for run in (Run(), Run(source=str(tiny)), Run(output="out")):
        with pytest.raises(UsageError, match="source=DIRECTORY_OR_HUB_ID output=NEW_DIRECTORY"):
            work(run)


def test_summary_counts_what_moved(tiny, tmp_path, capsys):
    pregate = PreGateConfig(3, ["decoder"], Entry.embedding, Init.random)
    work(Run(source=str(tiny), output=str(tmp_path / "out"), pregate=pregate))
    text = capsys.readouterr().out
    assert "encoder: 4 MoE blocks, gates stay in place" in text
    assert "decoder: 4 MoE blocks, 1 gates moved 3 ahead, 3 entry gates read the input embeddings" in text
    assert "at random" in text and "no tokenizer" in text and text.count("\n") == 7, text


def test_gates_are_calibrated_on_a_task(tmp_path, capsys):
    upstream_model(0, vocab_size=512).save_pretrained(tmp_path / "source")
    task = compose_run(["task=generated", "task.generated.train=30"]).task
    fit = CalibrationConfig(examples=20, steps=3, batch_size=8)
    pregate = PreGateConfig(init=Init.calibrated)
    run = Run(str(tmp_path), source=str(tmp_path / "source"), pregate=pregate, task=task, calibration=fit)
    work(replace(run, output=str(tmp_path / "out")))
    text = capsys.readouterr().out
    assert "calibrated on 20 examples" in text and "moved gates start as fitted" in text
    assert "decoder block 0: " in text and " -> " in text
    manifest = json.loads((tmp_path / "out" / "pregate_manifest.json").read_text())
    assert manifest["calibration"]["task"] == "generated" and manifest["init"] == "calibrated"

    work(replace(run, output=str(tmp_path / "still"), pregate=PreGateConfig(0, init=Init.calibrated)))
    assert "routing agreement" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": TaskConfig(name="mine")}, "task"),
        ({"task": TaskConfig(hub="some/where")}, "holds no tokenizer to calibrate with: set model.tokenizer="),
        ({"model": ModelConfig(tokenizer="no/such/place"), "task": TaskConfig(hub="some/where")}, "is not a directory"),
    ],
)
def test_calibration_says_what_it_lacks(settings, said, tiny, tmp_path):
    run = Run(source=str(tiny), output=str(tmp_path / "out"), pregate=PreGateConfig(init=Init.calibrated), **settings)
    with pytest.raises(UsageError, match=said):
        work(run)
    assert list(tmp_path.iterdir()) == []
