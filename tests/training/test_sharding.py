"""A sharded training (FSDP2) is the training of one process, and its states open everywhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pregate.config import Optimizer, Run, Sharding, TrainConfig, UsageError
from pregate.models.loading import load_resident
from pregate.training import sharded_saved_state
from pregate.training.feeds import ExampleFeed
from pregate.training.saved_state import damage, steps_done
from pregate.training.sharding import local
from pregate.training.state_values import optimizer_state
from tests.models.test_distributed import model_of
from tests.tiny import pregated_model, upstream_model
from tests.training.copying import SHALLOW, FirstWords, Recorder, recipe, train_tiny, word_tokenizer
from tests.training.test_loop import assert_same_parameters, in_two_processes

MANY_EXPERTS = {**SHALLOW, "num_experts": 16}
"""More than a step has tokens for: some learn nothing in it."""
COMMON: dict[str, Any] = {
    # uneven: one process has a micro batch less, and in validation a batch less
    "batch_sequences": 5,
    "micro_batch_tokens": 10,
    "balance_loss": 0.0,
    "z_loss": 0.1,
    "eval_every": 1,
    "save_every": 1,
}


@pytest.fixture(autouse=True)
def predicting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExampleFeed, "predicts", True)  # as before, afterwards


def train(family: str, out_dir: Path, steps: int, **changes: Any) -> tuple[Any, Recorder]:
    # without answers, validation is forward passes alone
    ExampleFeed.predicts = changes.pop("predicts", True)
    task = FirstWords()
    task.primary_metric = "accuracy" if ExampleFeed.predicts else "loss"
    model = pregated_model(**MANY_EXPERTS) if family == "switch_transformers" else model_of(family)
    trained, logged, _ = train_tiny(out_dir, steps=steps, model=model, task=task, **{**COMMON, **changes})
    return trained, logged


@pytest.fixture
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_a_save_copies_no_moment_of_a_sharded_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    book = torch.arange(4.0)
    for parameter in model.parameters():
        optimizer.state[parameter] |= {"book": book, "none": torch.empty(0)}
    tensors, _ = optimizer_state(optimizer, model)
    places = {name: local(tensor).data_ptr() for name, tensor in tensors.items()}
    assert len(places) == 4 * 5
    for index, (name, parameter) in enumerate(model.named_parameters()):
        for key, value in optimizer.state[parameter].items():
            is_copy = key == "book" and index > 0  # files hold no tensor twice
            assert (places[f"{name}/{key}"] != local(value).data_ptr()) == is_copy, (name, key)
            assert torch.equal(local(tensors[f"{name}/{key}"]), local(value))
        assert local(tensors[f"{name}/exp_avg"]).abs().sum() > 0


JOBS = """
import json, os, shutil, sys
from pathlib import Path
import torch
from pregate.system.process_group import main_only
from tests.training.test_sharding import train
torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    name, begun = Path(job.pop("out_dir")), job.pop("begun", None)
    if begun:
        main_only(lambda: shutil.copytree(begun, name), "copying")
    _, logged = train(out_dir=name, resume=begun is not None, **job)
    if os.environ["RANK"] == "0":
        values = [[*key, value] for key, value in logged.at.items()]
        (name / "logged.json").write_text(json.dumps(values))
"""


def of_two_processes(tmp_path: Path, family: str, jobs: dict[str, dict[str, Any]]) -> dict[str, Recorder]:
    """Train as two processes, one job after the other; what each logged."""
    listed = [{"family": family, "out_dir": str(tmp_path / name), **job} for name, job in jobs.items()]
    in_two_processes(tmp_path, JOBS, [json.dumps(listed)], 0)
    logged = {name: Recorder() for name in jobs}
    for name, recorder in logged.items():
        values = json.loads((tmp_path / name / "logged.json").read_text())
        recorder.at = {(key, step): value for key, step, value in values}
    return logged


def assert_same_curve(one: Recorder, other: Recorder, steps: range) -> None:
    """Sums in another order differ by some 1e-7 of their size, and each update carries that on."""
    for step in steps:
        for term in ("loss", "z", "grad_norm", "eval/loss", "eval/accuracy"):
            assert other.at[f"tiny/{term}", step] == pytest.approx(one.at[f"tiny/{term}", step], rel=1e-4), (term, step)
    assert len({one.at["tiny/loss", step] for step in steps}) == len(steps)


def assert_same_checkpoints(one: Path, other: Path) -> None:
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert {name: tensor.shape for name, tensor in mine.items()} == {n: t.shape for n, t in theirs.items()}
    config = json.loads((one / "config.json").read_text())
    assert config == json.loads((other / "config.json").read_text())
    # AdamW divides each gradient by its own size, so rounding in small ones shows: allow 1 % of one update
    assert_same_parameters(load_resident(one), load_resident(other), atol=0.01 * recipe().learning_rate)


def optimizer_steps(state: Path) -> dict[str, float]:
    with safe_open(state / "optimizer.safetensors", "pt") as stored:
        return {name: stored.get_tensor(name).item() for name in stored.keys() if name.endswith("/step")}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("family", ["switch_transformers", "qwen2_moe"])
def test_two_processes_train_like_one_and_open_each_others_states(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, one = train(family, tmp_path / "one", 4, keep="last")
    train(family, tmp_path / "begun", 2)
    begun, full = str(tmp_path / "begun"), {"sharding": "full"}
    two = of_two_processes(
        tmp_path,
        family,
        {
            "ddp": {"steps": 4, "keep": "last"},
            "full": {"steps": 4, "keep": "last", **full},
            # one process, two that are sharded, two that are not
            "one_full": {"steps": 3, "begun": begun, **full},
            "one_full_ddp": {"steps": 4, "begun": str(tmp_path / "one_full")},
            # one process, two that are not sharded, two that are
            "one_ddp": {"steps": 3, "begun": begun},
            "one_ddp_full": {"steps": 4, "begun": str(tmp_path / "one_ddp"), **full},
            # two that are sharded, and the same again
            "one_full_full": {"steps": 4, "begun": str(tmp_path / "one_full"), **full},
        },
    )
    shutil.copytree(tmp_path / "one_full", tmp_path / "one_full_one")
    _, back = train(family, tmp_path / "one_full_one", 4, resume=True)
    for name in ("ddp", "full"):
        assert_same_curve(one, two[name], range(1, 5))
        assert_same_checkpoints(tmp_path / "one" / "checkpoint", tmp_path / name / "checkpoint")
    for name in ("one_full", "one_ddp"):
        assert_same_curve(one, two[name], range(3, 4))
    for recorder in (two["one_full_ddp"], two["one_ddp_full"], two["one_full_full"], back):
        assert_same_curve(one, recorder, range(4, 5))
    states = [
        json.loads((tmp_path / n / "last" / "train_state.json").read_text()) for n in ("one", "full", "one_full_one")
    ]
    assert [state.get("parts") for state in states] == [None, 2, None]
    assert len({state["state"]["target_tokens"] for state in states}) == 1
    steps = optimizer_steps(tmp_path / "one" / "last")
    assert steps == optimizer_steps(tmp_path / "one_full_one" / "last")
    assert steps == {name: value for name, value in states[1]["optimizer"].items() if name in steps}
    if family == "switch_transformers":
        assert min(steps.values()) < max(steps.values()) == 4, "every expert had tokens in every step"
    # a part that is not as it was saved: the state before it is whole
    part = tmp_path / "full" / "last" / "shard-00002-model-00001-of-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    _, again = train(family, tmp_path / "full", 4, resume=True, keep="last")
    assert (
        f"{part} is not as it was saved: going on from the state before it, that of step 3" in capsys.readouterr().err
    )
    assert_same_curve(one, again, range(4, 5))


@pytest.mark.slow
def test_what_a_sharded_training_may_also_use(tmp_path: Path) -> None:
    """A teacher, gates alone (also of a model that is whole in each process), recomputed layers, bf16, the other
    optimizer: each as in one process."""
    upstream_model(seed=7, **MANY_EXPERTS).save_pretrained(tmp_path / "teacher")
    lessons = {"teacher": str(tmp_path / "teacher"), "distill_logits": 0.5, "distill_routing": 0.5}
    jobs: dict[str, dict[str, Any]] = {
        "gates": {"trainable": "gates", "precision": "bf16", **lessons},
        "whole": {"trainable": "gates", "sharding": "none", **lessons},
        "recomputed": {"gradient_checkpointing": True, "precision": "bf16", "dropout": 0.0},
        "scaled": {"optimizer": "adamw_scaled", "weight_decay": 0.1, "predicts": False, **lessons},
    }
    one = {name: train("switch_transformers", tmp_path / "one" / name, 2, **job)[1] for name, job in jobs.items()}
    all_jobs = {name: {"steps": 2, "sharding": "full", **job} for name, job in jobs.items()}
    two = of_two_processes(tmp_path, "switch_transformers", all_jobs)
    for name, job in jobs.items():
        # in bf16 a sum over other parts of a batch is rounded at other places, to 8 bits
        rel = 1e-2 if job.get("precision") == "bf16" else 1e-4
        for key in [key for key in one[name].at if key[0].split("/")[-1] not in ("tokens_per_s", "accuracy")]:
            assert two[name].at[key] == pytest.approx(one[name].at[key], rel=rel), (name, key)
        assert one[name].at["tiny/loss", 1] != one[name].at["tiny/loss", 2]
    assert {"tiny/kl", "tiny/routing"} <= {key for key, _ in two["gates"].at}
    gates = json.loads((tmp_path / "gates" / "last" / "train_state.json").read_text())["optimizer"]
    assert gates and all("classifier" in name for name in gates)
    # all that learns has a state, what every call begins with included
    scaled = json.loads((tmp_path / "scaled" / "last" / "train_state.json").read_text())["optimizer"]
    expected = optimizer_steps(tmp_path / "one" / "scaled" / "last")
    assert scaled == expected and "shared.weight/step" in scaled


FULL_DISK = """
import errno, os, sys
from pathlib import Path
from tests.training import test_sharding
from pregate.training import sharded_saved_state

def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

out_dir = Path(sys.argv[1])
test_sharding.train("switch_transformers", out_dir, 1, sharding="full")
if os.environ["RANK"] == "1":
    sharded_saved_state.checksum = full
test_sharding.train("switch_transformers", out_dir, 2, sharding="full", resume=True)
"""


@pytest.mark.slow
def test_a_state_that_one_process_cannot_write_leaves_the_last_one_whole(tmp_path: Path) -> None:
    said = in_two_processes(tmp_path, FULL_DISK, [str(tmp_path / "run")], 1)
    assert "No space left on device), and what lay there is kept" in said[0] and "PeerFailedError" in said[1]
    assert damage(tmp_path / "run" / "last") is None and steps_done(tmp_path / "run" / "last") == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"last", "checkpoint"}


def test_several_weight_files_are_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_saved_state, "FILE_BYTES", 20_000)
    model = pregated_model(**SHALLOW)
    layers = [layer for stack in ("encoder", "decoder") for layer in model.stack_layers(stack)]
    sharded_saved_state.save_checkpoint(tmp_path / "checkpoint", model, layers, word_tokenizer())
    files = sorted(path.name for path in (tmp_path / "checkpoint").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_same_parameters(model, load_resident(tmp_path / "checkpoint"))


def test_what_needs_whole_matrices_is_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.optimizer=adafactor needs whole matrices, and train\.sharding=full"):
        Run(train=TrainConfig(optimizer=Optimizer.adafactor, sharding=Sharding.full))
