"""The whole loop on a toy task: resume, interruption, checkpoints, and the same run on one process and on two."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import AutoModelForSeq2SeqLM

from pregate.config import UsageError
from pregate.models.families.switch_router import SwitchGate
from pregate.models.objectives import TokenCounts
from pregate.system.stopping import Terminated
from pregate.training.batch_order import Lengths, derive_batching, micro_batch_plan
from pregate.training.loop import next_step
from pregate.training.saved_state import steps_done
from pregate.training.stop_after_step import Interrupts
from tests.tiny import layer_passes, pregated_model, upstream_model
from tests.training.copying import SHALLOW, FirstWords, Recorder, recipe, train_tiny

ROOT = Path(__file__).resolve().parents[2]


def assert_same_parameters(one: torch.nn.Module, other: torch.nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=tolerance.get("atol", 0.0), msg=lambda m, n=name: f"{n}: {m}")


def sources() -> Lengths:
    """The lengths of the toy task's training examples: their words and the token that ends them."""
    lengths = [len(example.source.split()) + 1 for example in FirstWords().examples("train")]
    return Lengths(len(lengths), lambda indices: [lengths[index] for index in indices])


def timeless(recorder: Recorder, from_step: int = 0) -> dict[tuple[str, int], float]:
    return {k: v for k, v in recorder.at.items() if "tokens_per_s" not in k[0] and k[1] >= from_step}


@pytest.mark.parametrize(
    ("optimizer", "packing"), [("adamw", False), ("adamw_scaled", False), ("adafactor", False), ("adamw", True)]
)
def test_two_steps_and_two_resumed_equal_four(tmp_path: Path, optimizer: str, packing: bool) -> None:
    settings = {"optimizer": optimizer, "dropout": 0.1, "schedule": "cosine", "warmup_steps": 1, "eval_every": 2}
    settings["packing"] = packing
    straight, logged, summary = train_tiny(tmp_path / "straight", steps=4, **settings)
    interrupted = Recorder(interrupt_at=2)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "halves", tracker=interrupted, steps=4, **settings)
    assert max(step for _, step in interrupted.at) == 2
    resumed, second, resumed_summary = train_tiny(tmp_path / "halves", resume=True, steps=4, **settings)
    assert_same_parameters(straight, resumed)
    assert timeless(second) == timeless(logged, from_step=3) and {("tiny/loss", 3), ("tiny/loss", 4)} < second.at.keys()
    assert (resumed_summary.best_score, resumed_summary.best_step) == (summary.best_score, summary.best_step)
    assert resumed_summary.target_tokens == summary.target_tokens


def test_a_finished_run_that_lost_its_checkpoint_says_so(tmp_path: Path) -> None:
    train_tiny(tmp_path, steps=2)
    shutil.rmtree(tmp_path / "checkpoint")
    with pytest.raises(UsageError, match=r"checkpoint is gone, and no step is left .* put it back, or train"):
        train_tiny(tmp_path, resume=True, steps=2)
    _, logged, _ = train_tiny(tmp_path, resume=True, steps=3)
    assert (tmp_path / "checkpoint" / "model.safetensors").is_file() and logged, "one step more makes it again"


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_sigterm_saves_the_step_and_resuming_equals_an_unbroken_run(tmp_path: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "dropout": 0.1, "eval_every": 2, "steps": 4}
    straight, logged, _ = train_tiny(tmp_path / "straight", **settings)
    with pytest.raises(Terminated):
        train_tiny(tmp_path / "halves", tracker=Recorder(interrupt_at=3, signal_number=signal.SIGTERM), **settings)
    assert steps_done(tmp_path / "halves" / "last") == 3
    resumed, second, _ = train_tiny(tmp_path / "halves", resume=True, **settings)
    assert_same_parameters(straight, resumed)
    assert timeless(second) == timeless(logged, from_step=4) != {}


def test_a_signal_in_the_last_step_ends_as_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(Terminated):
        train_tiny(tmp_path, steps=2, tracker=Recorder(interrupt_at=2, signal_number=signal.SIGTERM))
    assert steps_done(tmp_path / "last") == 2


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_the_loaders_workers_and_saves_all_the_same(
    tmp_path: Path, signal_number: int
) -> None:
    """The workers die first, so that the loop is waiting for a batch, or about to, when its own signal comes."""

    class ToAll(Recorder):
        def log(self, metrics: dict[str, float], step: int) -> None:
            if step == self.interrupt_at:
                workers = multiprocessing.active_children()
                assert workers
                for worker in workers:
                    os.kill(worker.pid, signal.SIGKILL)
                    worker.join()
            super().log(metrics, step)

    straight, _, _ = train_tiny(tmp_path / "straight", steps=9)
    tracker = ToAll(interrupt_at=2, signal_number=signal_number)
    with pytest.raises(Terminated if signal_number == signal.SIGTERM else KeyboardInterrupt):
        train_tiny(tmp_path / "halves", steps=9, workers=1, tracker=tracker)
    assert steps_done(tmp_path / "halves" / "last") == 2
    resumed, _, _ = train_tiny(tmp_path / "halves", steps=9, resume=True)
    assert_same_parameters(straight, resumed)


def test_a_loader_that_fails_is_excused_by_a_signal_alone() -> None:
    interrupts = Interrupts()

    def batches(told: int | None) -> Iterator[dict[str, torch.Tensor]]:
        interrupts.first = told
        raise RuntimeError("DataLoader worker exited unexpectedly")
        yield

    def session(told: int | None) -> Any:
        return SimpleNamespace(
            batching=derive_batching(recipe(), 10, 1),
            rank=0,
            micro_batches=batches(told),
            accelerator=SimpleNamespace(device="cpu", reduce=lambda tensor, how: tensor),
        )

    assert next_step(session(signal.SIGTERM), interrupts) == ([], TokenCounts(0, 0), Terminated)
    interrupts.first = None
    assert next_step(session(signal.SIGINT), interrupts)[2] is KeyboardInterrupt
    interrupts.first = None
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next_step(session(None), interrupts)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "train_state.json"])
def test_a_run_goes_on_from_the_state_before_a_damaged_one(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, logged, _ = train_tiny(tmp_path / "straight", steps=5, dropout=0.1, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "cut", steps=5, dropout=0.1, save_every=2, tracker=Recorder(interrupt_at=3))
    data = bytearray((tmp_path / "cut" / "last" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "cut" / "last" / name).write_bytes(data)
    capsys.readouterr()
    resumed, again, _ = train_tiny(tmp_path / "cut", steps=5, dropout=0.1, save_every=2, resume=True)
    assert f"{name} " in capsys.readouterr().err.splitlines()[0]
    assert_same_parameters(straight, resumed)
    assert timeless(again) == timeless(logged, from_step=3) != {}


def test_a_run_without_a_whole_state_does_not_begin_again(tmp_path: Path) -> None:
    train_tiny(tmp_path, steps=1)
    (tmp_path / "last" / "train_state.json").unlink()
    with pytest.raises(UsageError, match=r"last/train_state\.json is missing and there is no whole state"):
        train_tiny(tmp_path, steps=2, resume=True)


def test_a_disk_too_small_for_the_run_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pregate.training import disk_space

    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 100_000)
    tracker = Recorder()
    with pytest.raises(UsageError, match=r"^Training writes .* which has 100 kB free: make room"):
        train_tiny(tmp_path, steps=2, tracker=tracker)
    assert not tracker.at and list(tmp_path.iterdir()) == []


def test_resume_without_a_previous_run_starts_afresh(tmp_path: Path) -> None:
    fresh, _, _ = train_tiny(tmp_path / "a", steps=2)
    resumed, _, summary = train_tiny(tmp_path / "b", steps=2, resume=True)
    assert summary.steps == 2
    assert_same_parameters(fresh, resumed)


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    done, _, first = train_tiny(tmp_path, steps=2)
    again, tracker, second = train_tiny(tmp_path, steps=2, resume=True)
    assert not tracker.at
    assert second == first
    assert_same_parameters(done, again)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"optimizer": "adafactor"}, "AdamW|Adafactor"), ({"model_changes": {"d_ff": 12}}, "different model")],
)
def test_resume_refuses_another_model_or_optimizer(tmp_path: Path, changes: dict, sentence: str) -> None:
    train_tiny(tmp_path, steps=1)
    with pytest.raises(UsageError, match=sentence):
        train_tiny(tmp_path, steps=2, resume=True, **changes)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_toy_task_is_learned(tmp_path: Path, optimizer: str) -> None:
    _, tracker, summary = train_tiny(
        tmp_path, steps=30, batch_sequences=16, micro_batch_tokens=160, optimizer=optimizer, learning_rate=2e-2
    )
    first, last = tracker.at["tiny/loss", 1], tracker.at["tiny/loss", 30]
    assert last < 0.5 * first, (first, last)
    assert summary.metrics["tiny/loss"] == last


def test_the_best_checkpoint_is_kept_and_carries_files(tmp_path: Path) -> None:
    manifest = tmp_path / "pregate_manifest.json"
    manifest.write_text('{"source": "somewhere"}')
    task = FirstWords(scripted=[10.0, 30.0, 20.0])
    model, tracker, summary = train_tiny(
        tmp_path / "run", steps=3, eval_every=1, save_every=1, task=task, carry=[manifest]
    )
    assert (summary.best_score, summary.best_step) == (30.0, 2)
    assert [tracker.at["tiny/eval/accuracy", step] for step in (1, 2, 3)] == [10.0, 30.0, 20.0]
    best = AutoModelForSeq2SeqLM.from_pretrained(summary.checkpoint)
    last = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "last")
    assert_same_parameters(last, model)
    assert not torch.equal(best.shared.weight, last.shared.weight)
    second, _, _ = train_tiny(tmp_path / "two", steps=2)
    assert_same_parameters(best, second)
    for directory in (Path(summary.checkpoint), tmp_path / "run" / "last"):
        assert (directory / "pregate_manifest.json").read_text() == manifest.read_text()
        assert (directory / "tokenizer.json").is_file()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint", "last", "previous"}
    assert [steps_done(tmp_path / "run" / name) for name in ("last", "previous")] == [3, 2]
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]


def test_the_best_of_a_discarded_attempt_does_not_stay(tmp_path: Path) -> None:
    """A resume that takes other steps than the attempt whose checkpoint is newer than its state."""
    settings, run = {"eval_every": 1, "save_every": 1}, tmp_path / "run"
    train_tiny(run, steps=2, task=FirstWords(scripted=[10.0, 30.0]), **settings)
    shutil.rmtree(run / "last")
    (run / "previous").rename(run / "last")
    discarded = AutoModelForSeq2SeqLM.from_pretrained(run / "checkpoint")
    task, settings = FirstWords(scripted=[7.0, 5.0]), {**settings, "learning_rate": 3e-3}
    _, _, summary = train_tiny(run, steps=3, task=task, resume=True, **settings)
    assert (summary.best_score, summary.best_step) == (7.0, 2)
    kept = AutoModelForSeq2SeqLM.from_pretrained(run / "checkpoint")
    assert steps_done(run / "previous") == 2
    assert_same_parameters(kept, AutoModelForSeq2SeqLM.from_pretrained(run / "previous"))
    assert not torch.equal(kept.shared.weight, discarded.shared.weight)
    # one that is no newer stays
    _, _, summary = train_tiny(run, steps=4, task=FirstWords(scripted=[6.0]), resume=True, **settings)
    assert (summary.best_score, summary.best_step) == (7.0, 2)
    assert_same_parameters(kept, AutoModelForSeq2SeqLM.from_pretrained(run / "checkpoint"))


def test_the_last_checkpoint_is_kept_where_validation_must_not_choose(tmp_path: Path) -> None:
    settings = {"keep": "last", "eval_every": 1, "save_every": 1, "steps": 3}
    scores = [30.0, 10.0, 20.0]
    model, tracker, summary = train_tiny(tmp_path / "run", task=FirstWords(scripted=scores), **settings)
    assert [tracker.at["tiny/eval/accuracy", step] for step in (1, 2, 3)] == scores
    assert (summary.best_score, summary.best_step, summary.checkpoint_step) == (30.0, 1, 3)
    assert_same_parameters(AutoModelForSeq2SeqLM.from_pretrained(summary.checkpoint), model)

    interrupted = Recorder(interrupt_at=2)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "halves", task=FirstWords(scripted=scores[:2]), tracker=interrupted, **settings)
    assert not (tmp_path / "halves" / "checkpoint").exists()
    resumed, _, second = train_tiny(tmp_path / "halves", task=FirstWords(scripted=scores[2:]), resume=True, **settings)
    assert (second.best_score, second.best_step, second.checkpoint_step) == (30.0, 1, 3)
    assert_same_parameters(AutoModelForSeq2SeqLM.from_pretrained(second.checkpoint), model)
    assert_same_parameters(resumed, model)


@pytest.mark.parametrize(
    ("entry", "weights", "gate", "optimizer"),
    [
        # each pair of choices once
        *(("own", "early", "linear", "adamw"), ("embedding", "early", "mlp", "adafactor")),
        *(("own", "late", "mlp", "adamw"), ("embedding", "late", "linear", "adafactor")),
    ],
)
def test_training_the_gates_leaves_every_other_bit_alone(
    tmp_path: Path, entry: str, weights: str, gate: str, optimizer: str
) -> None:
    changes: dict[str, Any] = {"entry": entry, "weights": weights, "gate": gate}
    before = pregated_model(**changes, **SHALLOW).state_dict()
    model, _, summary = train_tiny(
        tmp_path, steps=3, trainable="gates", optimizer=optimizer, model_changes=changes, weight_decay=0.1
    )
    gates = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, SwitchGate)
        for part, _ in module.named_parameters()
    }
    # an own router or an embedding gate with its norm, a pre-gate, and late the routers that weigh, in each stack
    assert sum(".nonlinear." not in name for name in gates) == {"own": 4, "embedding": 6}[entry] + (
        0 if weights == "early" else {"own": 2, "embedding": 4}[entry]
    )
    # two matrices beside each gate that decides for another block
    assert sum(".nonlinear." in name for name in gates) == (
        0 if gate == "linear" else {"own": 4, "embedding": 8}[entry]
    )
    saved = AutoModelForSeq2SeqLM.from_pretrained(summary.checkpoint).state_dict()
    assert saved.keys() == before.keys()
    for name, value in saved.items():
        assert torch.equal(value, before[name]) == (name not in gates), name
    record = json.loads((tmp_path / "last" / "train_state.json").read_text())
    with safe_open(tmp_path / "last" / "optimizer.safetensors", "pt") as stored:
        named = {key.rpartition("/")[0] for key in [*stored.keys(), *record["optimizer"]]}
    assert named == gates
    assert all((p.grad is None and p.requires_grad) == (name in gates) for name, p in model.named_parameters())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pregate.training import loop

    honest, calls = loop.loss_share, []

    def poisoned(*args: object, **kwargs: object) -> object:
        share = honest(*args, **kwargs)  # type: ignore[arg-type]
        calls.append(1)
        factor = math.nan if len(calls) == 2 else 1.0
        return type(share)(*(getattr(share, f) * factor for f in ("total", "cross_entropy", "balance", "z")))

    train_tiny(tmp_path, steps=1)
    kept = (tmp_path / "last" / "model.safetensors").read_bytes()
    monkeypatch.setattr(loop, "loss_share", poisoned)
    plan = micro_batch_plan(sources(), derive_batching(recipe(), 10, 1), seed=0, first_step=1, last_step=2, rank=0)
    second = ", ".join(f"example '{index}'" for index in list(plan)[1])
    with pytest.raises(
        UsageError,
        match=rf"loss of tiny became nan at step 2, in a micro batch of {second}: lower .* \(the last good state is "
        rf"that of step 1 in {tmp_path}/last; the best model so far, of step 1, lies in {tmp_path}/checkpoint\)\.",
    ):
        train_tiny(tmp_path, steps=3, save_every=1, resume=True)
    assert calls
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == kept


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    train_tiny(tmp_path, steps=1, save_every=1)
    with pytest.raises(
        UsageError, match=r"Weights of tiny became NaN or infinite by step 2 .*last good state is that of"
    ):
        train_tiny(tmp_path, steps=3, save_every=1, resume=True, learning_rate=1e39)
    assert steps_done(tmp_path / "last") == 1


def test_gradient_checkpointing_does_not_change_training(tmp_path: Path) -> None:
    before, plain, saving = (pregated_model(**SHALLOW) for _ in range(3))
    once, twice = layer_passes(plain), layer_passes(saving)
    train_tiny(tmp_path / "plain", steps=2, model=plain)
    train_tiny(tmp_path / "saving", steps=2, model=saving, gradient_checkpointing=True)
    assert_same_parameters(plain, saving, atol=1e-6)
    assert (plain.shared.weight - before.shared.weight).abs().max() > 1e-4
    assert len(once) == 8 and min(once.values()) > 0
    assert twice == {layer: 2 * count for layer, count in once.items()}


def test_loader_workers_do_not_change_training(tmp_path: Path) -> None:
    plain, _, _ = train_tiny(tmp_path / "plain", steps=2, dropout=0.1)
    workers, _, _ = train_tiny(tmp_path / "workers", steps=2, dropout=0.1, workers=1)
    assert_same_parameters(plain, workers)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
from tests.training.copying import train_tiny
for sharding in ("none", "full"):
    train_tiny(Path(sys.argv[1]) / sharding, sharding=sharding, **json.loads(sys.argv[2]))
"""


def in_two_processes(tmp_path: Path, text: str, arguments: list[str], status: int) -> list[str]:
    """Run the Python program `text` as two processes of one training; both end with `status`. Returns what they told
    as errors."""
    script = tmp_path / "script.py"
    script.write_text(text)
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
        "OMP_NUM_THREADS": "1",
    }
    common |= {
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=280)[1] for process in processes]
    for process, errors in zip(processes, told, strict=True):
        assert process.returncode == status, errors
    return told


ONE_IS_ASKED_TO_END = """
import os, signal, sys
from pathlib import Path
from pregate.system.stopping import stoppable
from tests.training.copying import Recorder, train_tiny
asked = {"0": None, "1": 3}[os.environ["RANK"]]
with stoppable():
    train_tiny(Path(sys.argv[1]), steps=50, tracker=Recorder(interrupt_at=asked, signal_number=signal.SIGTERM))
"""


@pytest.mark.slow
def test_all_processes_end_after_the_same_step_when_one_gets_sigterm(tmp_path: Path) -> None:
    in_two_processes(tmp_path, ONE_IS_ASKED_TO_END, [str(tmp_path / "run")], 143)
    assert steps_done(tmp_path / "run" / "last") == 3
    state = json.loads((tmp_path / "run" / "last" / "train_state.json").read_text())
    assert len(state["random"]) == 2


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """With a teacher: each with the whole model (DDP), and each with a part of it (FSDP2)."""
    upstream_model(seed=7, **SHALLOW).save_pretrained(tmp_path / "teacher")
    settings: dict[str, Any] = {"steps": 2, "batch_sequences": 5, "micro_batch_tokens": 10, "eval_every": 1}
    settings |= {"balance_loss": 0.0, "z_loss": 0.1, "keep": "last"}
    settings |= {"teacher": str(tmp_path / "teacher"), "distill_logits": 0.5, "distill_routing": 0.5}
    one, logged, summary = train_tiny(tmp_path / "one", **settings)
    in_two_processes(tmp_path, TWO_PROCESSES, [str(tmp_path / "two"), json.dumps(settings)], 0)
    for sharding in ("none", "full"):
        run = tmp_path / "two" / sharding
        # AdamW divides each gradient by its own size, so rounding in small ones shows: allow 1 % of one update
        two = type(one).from_pretrained(run / "checkpoint")
        assert_same_parameters(one, two, atol=0.01 * recipe().learning_rate)
        state = json.loads((run / "last" / "train_state.json").read_text())
        assert len(state["random"]) == 2 and state.get("parts") == {"none": None, "full": 2}[sharding]
        assert state["state"]["target_tokens"] == summary.target_tokens
        for term in ("loss", "z", "kl", "routing", "grad_norm", "eval/loss", "eval/accuracy"):
            value = state["state"]["metrics"][f"tiny/{term}"]
            assert value == pytest.approx(logged.at[f"tiny/{term}", 2], rel=1e-4), (sharding, term)
