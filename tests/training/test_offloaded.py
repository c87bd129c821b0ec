"""Training with the experts in the engine's store: the run of the resident model with the same frozen experts."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pregate.cli import compose_run
from pregate.config import (
    ExpertPath,
    Experts,
    Learn,
    Optimizer,
    PreGateConfig,
    Run,
    TaskConfig,
    Trainable,
    TrainConfig,
    UsageError,
    Weights,
)
from pregate.engine.training_engine import TrainingEngine
from pregate.models.checkpoint import open_checkpoint, read_config
from pregate.models.family import config_of, experts_of
from pregate.models.loading import load_resident
from pregate.training import offloaded
from pregate.training.loop import TrainSummary
from pregate.training.memory_needs import needs_of
from pregate.training.offloaded import check_offloaded
from pregate.training.optimizer_and_schedule import build_optimizer, optimizer_bytes
from pregate.training.run_dir_lock import CHECKPOINT, CONVERTED, KEPT, LAST
from pregate.training.session import configure
from pregate.training.stages import get_converted, train_converted
from tests.tiny import upstream_model
from tests.training.copying import SHALLOW, FirstWords, Recorder, recipe, short_run, word_tokenizer

OFFLOADED = {"experts": Experts.offloaded, "trainable": Trainable.all_but_experts}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A conventional checkpoint in bfloat16, in several files."""
    directory = tmp_path_factory.mktemp("source") / "model"
    upstream_model(0, **SHALLOW).to(torch.bfloat16).save_pretrained(directory, max_shard_size="20KB")
    return str(directory)


def run_of(
    source: str, resume: bool = False, lookahead: int = 1, weights: Weights = Weights.early, **changes: Any
) -> Run:
    run = short_run(resume)
    run.model.source, run.pregate = source, PreGateConfig(lookahead=lookahead, weights=weights)
    run.engine.device_budget = "30%"
    run.train = recipe(**{"eval_every": 2, "save_every": 2, **changes})
    return run


def trained(run: Run, run_dir: Path, tracker: Recorder | None = None) -> tuple[Recorder, TrainSummary]:
    task, tokenizer, tracker = FirstWords(), word_tokenizer(), tracker or Recorder()
    converted = get_converted(run, run_dir, run.model.source, task, tokenizer)  # type: ignore[arg-type]
    return tracker, train_converted(run, run_dir, converted, task, tokenizer, tracker)  # type: ignore[arg-type]


def curves(recorder: Recorder, from_step: int = 0) -> dict[tuple[str, int], float]:
    timed = ("tokens_per_s", "waited_ms", "bytes_moved")
    return {at: value for at, value in recorder.at.items() if not at[0].endswith(timed) and at[1] >= from_step}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    opened = open_checkpoint(str(directory))
    return opened.read(opened.names())


@pytest.mark.parametrize(
    ("lookahead", "weights", "trainable"),
    [
        (0, Weights.early, Trainable.all_but_experts),
        (1, Weights.early, Trainable.all_but_experts),
        (1, Weights.early, Trainable.gates),
        (1, Weights.late, Trainable.gates),
    ],
)
def test_a_run_is_that_of_the_resident_model_and_leaves_a_whole_checkpoint(
    source: str, tmp_path: Path, lookahead: int, weights: Weights, trainable: Trainable
) -> None:
    """Losses, gradient norms and validation scores of several micro batches a step, and the weights at the end."""
    settings = {"lookahead": lookahead, "trainable": trainable, "z_loss": 0.0, "balance_loss": 0.0, "weights": weights}
    # one expert after the other: all together round otherwise, which may move a hidden unit across zero
    one_by_one = run_of(source, experts=Experts.resident, expert_path=ExpertPath.reference, **settings)
    expected, _ = trained(one_by_one, tmp_path / "resident")
    run = run_of(source, experts=Experts.offloaded, **settings)
    got, summary = trained(run, tmp_path / "offloaded")
    assert curves(got) == pytest.approx(curves(expected), rel=1e-5)
    assert all(map(math.isfinite, got.at.values())) and got.at["train/grad_norm", 1] > 0
    assert all(got.at["train/bytes_moved", step] > 0 for step in range(1, 5))

    whole = tensors_of(Path(summary.checkpoint))
    stored = tensors_of(tmp_path / "offloaded" / CONVERTED if lookahead else Path(source))
    assert not (tmp_path / "offloaded" / KEPT).exists()
    assert {name: (t.shape, t.dtype) for name, t in whole.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}
    learnt = tensors_of(tmp_path / "resident" / CHECKPOINT)
    family = experts_of(load_resident(source).config)
    experts = {name for key in family.keys() for name in family.tensor_names(key)}  # noqa: SIM118
    changed = {name for name, tensor in whole.items() if not torch.equal(tensor, stored[name])}
    assert changed and not changed & experts
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, learnt[name].to(torch.bfloat16), rtol=1e-2, atol=1e-4, msg=name)
    if trainable is Trainable.gates:
        assert all("router" in name or "pre_gate" in name for name in changed)
    if weights is Weights.late:
        weighing = [name for name in whole if "router" in name and "pre_gate" not in name]
        assert len(weighing) == 4 and set(weighing) <= changed
        assert any("pre_gate" in name for name in changed)
    assert ("pregate" in read_config(summary.checkpoint)) == (lookahead > 0)
    assert load_resident(summary.checkpoint).has_experts


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_run_that_ends_early_goes_on_as_if_it_had_not(source: str, tmp_path: Path, how: str) -> None:
    """With dropout, in the experts too, whose results come in another order each time."""
    settings = {**OFFLOADED, "dropout": 0.2, "gradient_checkpointing": True}
    expected, straight = trained(run_of(source, **settings), tmp_path / "straight")
    cut: Recorder = Killed(at=3) if how == "killed" else Recorder(interrupt_at=3)
    with pytest.raises(KeyboardInterrupt if how == "interrupted" else OSError):
        trained(run_of(source, **settings), tmp_path / "cut", cut)
    last = {path.name: path.stat().st_size for path in (tmp_path / "cut" / LAST).iterdir()}
    assert "learnt.safetensors" in last and not any(name.startswith("model") for name in last)
    got, summary = trained(run_of(source, resume=True, **settings), tmp_path / "cut")
    first = 3 if how == "killed" else 4
    assert curves(got) == curves(expected, from_step=first) != {}
    assert summary.best_score == straight.best_score
    whole = tensors_of(tmp_path / "cut" / CHECKPOINT)
    assert all(torch.equal(t, whole[name]) for name, t in tensors_of(tmp_path / "straight" / CHECKPOINT).items())
    again, _ = trained(run_of(source, resume=True, **settings), tmp_path / "cut")
    assert again.at == {}, "a finished run has nothing left to do"


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_state_is_not_gone_on_with_on_other_experts(source: str, tmp_path: Path, lookahead: int) -> None:
    shutil.copytree(source, moved := tmp_path / "source")
    settings = {**OFFLOADED, "lookahead": lookahead}
    with pytest.raises(OSError, match="killed"):
        trained(run_of(str(moved), **settings), tmp_path / "run", Killed(at=3))
    resumed = run_of(str(moved), resume=True, **settings)
    kept = {path: path.read_bytes() for path in moved.glob("*.safetensors")}
    for path, content in kept.items():
        other = load_file(path)
        save_file({name: -tensor for name, tensor in other.items()}, path, {"format": "pt"})
        assert path.stat().st_size == len(content)
    with pytest.raises(UsageError, match=r"experts of other weights than .*source has now.*allow_changes=\[source\]"):
        trained(resumed, tmp_path / "run")
    for path, content in kept.items():
        path.write_bytes(content)
    assert trained(resumed, tmp_path / "run")[1].steps == 4


class Killed(Recorder):
    """Ends the run without a word, as a killed process does: nothing of the step is saved."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._step = at

    def log(self, metrics: dict[str, float], step: int) -> None:
        super().log(metrics, step)
        if step == self._step:
            raise OSError("killed")


def test_a_teacher_with_the_same_experts_shares_their_slots(source: str, tmp_path: Path) -> None:
    lessons = {"teacher": source, "distill_logits": 0.5, "distill_routing": 0.5, "trainable": Trainable.gates}
    expected, _ = trained(run_of(source, **lessons), tmp_path / "resident")
    got, _ = trained(run_of(source, **lessons, experts=Experts.offloaded), tmp_path / "offloaded")
    assert curves(got) == pytest.approx(curves(expected), rel=1e-5)
    assert got.at["train/kl", 1] > 0 and got.at["train/routing", 1] > 0


def test_a_teacher_with_other_experts_has_slots_of_its_own(source: str, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other"
    upstream_model(1, **SHALLOW).save_pretrained(other)
    lessons = {"teacher": str(other), "distill_logits": 0.5, "trainable": Trainable.gates, "steps": 2}
    expected, _ = trained(run_of(source, **lessons), tmp_path / "resident")
    run = run_of(source, **lessons, experts=Experts.offloaded)
    run.engine.pack_dir = str(tmp_path / "packs")
    got, _ = trained(run, tmp_path / "offloaded")
    assert "has other experts than the model" in capsys.readouterr().err
    assert curves(got) == pytest.approx(curves(expected), rel=1e-5)
    assert {path.name for path in (tmp_path / "packs").iterdir()} == {"checkpoint", "reference"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["train.trainable=all"],
            r"train.experts=offloaded leaves the experts as they are and has no adapters",
        ),
        (["train.expert_path=reference"], r"train.expert_path=reference needs the experts in memory"),
        (["engine.drive=device"], r"driven by the host: set engine.drive=host"),
        (["engine.device_budget=1kB"], r"engine.device_budget=1kB is 1.00 kB, less than one expert"),
        (["model.source=null"], r"takes the experts of a checkpoint: set model.source=DIR_OR_ID"),
        (
            ["+experiment=quickstart", "source_train.experts=offloaded", "source_train.trainable=gates"],
            r"source_train.experts=offloaded leaves experts as they are",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(source: str, changes: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        given = ["train.experts=offloaded", "train.trainable=all_but_experts", f"model.source={source}", *changes]
        run = compose_run(sorted(given, key=lambda setting: not setting.startswith("+")))
        check_offloaded(run, config_of(read_config(source)), torch.bfloat16)


def test_several_processes_are_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloaded, "join", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(UsageError, match=r"train\.experts=offloaded trains in one process"):
        check_offloaded(run_of(source, **OFFLOADED), config_of(read_config(source)), torch.bfloat16)


@pytest.mark.parametrize(
    ("trainable", "optimizer"),
    [*((Trainable.all_but_experts, optimizer) for optimizer in Optimizer), (Trainable.gates, Optimizer.adamw)],
)
def test_what_a_run_needs_is_what_its_parts_take(source: str, trainable: Trainable, optimizer: Optimizer) -> None:
    """Weights, gradients, optimizer and slots, of both forms; the experts count where they are in memory."""
    config, cpu = config_of(read_config(source)), torch.device("cpu")
    found = {}
    for form in Experts:
        run = run_of(source, lookahead=0, experts=form, trainable=trainable, optimizer=optimizer)
        found[form] = needs = needs_of(run, config, torch.bfloat16, cpu)
        assert re.fullmatch(
            r"This run needs about .* of memory \(weights .*\); .* of disk \(.*\)\. .* free\.", needs.line(cpu)
        )
    with TrainingEngine.open(source, device_budget="30%") as engine:
        for form, model in ((Experts.offloaded, engine.model), (Experts.resident, load_resident(source).float())):
            configure(model, TrainConfig(trainable=trainable))
            learning = [p for p in model.parameters() if p.requires_grad]
            assert found[form].device["weights"] == sum(p.nbytes for p in model.parameters())
            assert found[form].device["gradients"] == sum(p.nbytes for p in learning) > 0
            built = build_optimizer(model, TrainConfig(optimizer=optimizer))
            assert found[form].device["optimizer"] == optimizer_bytes(built)
        assert found[Experts.offloaded].device["slots"] == engine.expected_bytes()["slots"]
    assert found[Experts.offloaded].disk["packed experts"] == 20 * engine.slab_bytes
    assert found[Experts.offloaded].device["activations"] > 0


@pytest.mark.parametrize(("learn", "learnt"), [(Learn.answers, 4), (Learn.everything, 14)])
def test_a_teachers_logits_are_those_of_all_learnt_tokens(source: str, learn: Learn, learnt: int) -> None:
    config = config_of(read_config(source))
    run = run_of(source, teacher=source, distill_logits=1.0)
    run.task = TaskConfig(max_source_tokens=10, max_target_tokens=4, learn=learn)
    run.train.batch_sequences, run.train.micro_batch_tokens = 3, 1000
    needs = needs_of(run, config, torch.bfloat16, torch.device("cpu"))
    assert needs.device["teacher's logits"] == 3 * learnt * config.vocab_size * 4
