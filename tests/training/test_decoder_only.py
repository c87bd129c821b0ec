"""Decoder-only models through whole commands at tiny scale: tasks, arms, packing, conversations, plain text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch

from pregate.cli import compose_run
from pregate.config import GeneratedConfig, UsageError
from pregate.conversion.manifest import MANIFEST
from pregate.models.families.olmoe import FAMILY
from pregate.models.loading import load_resident
from pregate.models.objectives import Causal
from pregate.models.packing_and_padding import Row
from pregate.models.vocabulary_losses import kl_sum
from pregate.tasks.generated import generated_tokenizer
from pregate.train import main as train
from pregate.training.checks import check_objective
from pregate.training.distill import routing_share
from tests.models.test_objectives import CAUSAL, ROWS
from tests.tasks.corpora import sentinel_tokenizer, write_corpus
from tests.tasks.test_chat import CHATML, GOOD, NOT_CUT, chat_tokenizer
from tests.test_made_up_family import model
from tests.training.copying import write_olmoe

FEW_STEPS = {
    "steps": 3,
    "batch_sequences": 6,
    "micro_batch_tokens": 96,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "log_every": 1,
    "eval_every": 3,
    "save_every": 3,
    "eval_examples": 4,
    "warmup_steps": 0,
}
SHORT = [
    *("tracking=jsonl", "task.max_source_tokens=40", "task.max_target_tokens=8", "engine.bench_new_tokens=3"),
    *("engine.bench_repeats=1", "engine.bench_prompts=1", "engine.policies=[pre_gated]", "eval.report=false"),
    *("eval.examples=6", "eval.bootstrap_samples=20"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("olmoe") / "source"
    write_olmoe(directory, generated_tokenizer(GeneratedConfig(train=200, validation=20)), 640)
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every task's columns, in a directory of parquet files."""
    directory = tmp_path_factory.mktemp("data")
    names = ["Ada", "Lind", "Bo", "Holm", "Ida", "Berg", "Ole", "Dahl"]
    texts = [f"the captain is {name}" for name in names]
    columns: dict[str, dict[str, Any]] = {
        "squad": {
            "question": ["who is it?"] * 8,
            "context": texts,
            "answers": [{"text": [name], "answer_start": [15]} for name in names],
        },
        "sst2": {"idx": range(8), "sentence": texts, "label": [0, 1] * 4},
        "dialogsum": {"dialogue": texts, "summary": names},
    }
    for task, frame in columns.items():
        (directory / task).mkdir()
        for split in ("train", "validation", "test"):
            ids = {} if task == "sst2" else {"id": [str(i) for i in range(8)]}
            pandas.DataFrame({**ids, **frame}).to_parquet(directory / task / f"{split}.parquet")
    return directory


def command(run_dir: Path, *arguments: str, **changes: Any) -> dict[str, list[float]]:
    """Runs `pregate.train`; what it logged at its steps, by name."""
    settings = [f"train.{key}={value}" for key, value in {**FEW_STEPS, **changes}.items()]
    train(compose_run([*SHORT, *settings, f"run_dir={run_dir}", *arguments]))
    found: dict[str, list[float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(value)
    return found


def evaluation(run_dir: Path) -> dict[str, Any]:
    """The evaluation of a run, whose engine gave the whole model's tokens and moved experts."""
    found = json.loads((run_dir / "eval.json").read_text())
    for record in found["engine"].values():
        assert record["tokens_equal_resident"] and record["logits_equal_resident"] and record["bytes_moved"] > 0
    return found


METRICS = {"squad": "em", "sst2": "accuracy", "dialogsum": "rougeL"}
"""One task of each kind."""


@pytest.mark.parametrize("task", METRICS)
def test_every_kind_of_task_is_a_prompt(task: str, source: Path, root: Path, tmp_path: Path) -> None:
    packing = task in ("sst2", "dialogsum")
    logged = command(tmp_path, f"task={task}", f"data.root={root}", f"model.source={source}", packing=packing)
    losses = logged["train/loss"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert all(0 < value < float("inf") for name in ("loss", "balance", "z") for value in logged[f"train/{name}"])
    found = evaluation(tmp_path)
    assert found["num_examples"] == 6 and METRICS[task] in found["scores"]["pre_gated"]


def test_every_arm(source: Path, root: Path, tmp_path: Path) -> None:
    """The arms of the accuracy study with two experts a token, from the conventional model on."""
    common = ["task=sst2", f"data.root={root}", f"reference={source}"]
    calibrated = tmp_path / "calibrated"
    train(compose_run([*SHORT, *common, "+arm=calibrated", f"run_dir={calibrated}"]))
    manifest = json.loads((calibrated / "checkpoint" / MANIFEST).read_text())["calibration"]
    before, after = (manifest["agreement"][when]["decoder"] for when in ("before", "after"))
    assert sum(before) < sum(after) <= 3.0 and any(gate["chosen"] != "copy" for gate in manifest["gates"])
    agreement = evaluation(calibrated)["routing"]["agreement"]["decoder"]
    assert agreement[0] == 1.0 and all(0 < share <= 1 for share in agreement)

    logged = command(tmp_path / "distilled", *common, "+arm=distilled", f"model.source={source}", packing=True)
    assert all(0 < value < float("inf") for name in ("kl", "routing") for value in logged[f"train/{name}"])
    evaluation(tmp_path / "distilled")

    command(tmp_path / "gates", *common, "+arm=gates_only")
    trained, began = (load_resident(tmp_path / run / "checkpoint").state_dict() for run in ("gates", "calibrated"))
    moved = {name for name in trained if not torch.equal(trained[name], began[name])}
    assert moved and all(".mlp.gate." in name for name in moved)


def test_the_routing_lesson_is_that_of_a_loop_over_tokens() -> None:
    """Also where examples are packed: padding and the boundaries of examples change nothing."""
    student, teacher = model(lookahead=1), model(lookahead=0)
    apart, packed = CAUSAL.batch(ROWS, 0), CAUSAL.packed(ROWS, 0, row_tokens=12)
    found = []
    for batch in (apart, packed):
        asked = {**CAUSAL.inputs(batch), "output_router_logits": True, "use_cache": False}
        with torch.no_grad():
            outputs = [SimpleNamespace(router_logits=one(**asked).router_logits) for one in (student, teacher)]
        found.append(routing_share(*outputs, batch, CAUSAL.count(batch), CAUSAL).item())
    terms = []
    for row in ROWS:
        alone = CAUSAL.batch([Row(row.source, row.target)], 0)["input_ids"]
        with torch.no_grad():
            pairs = [one(input_ids=alone, output_router_logits=True).router_logits for one in (student, teacher)]
        for mine, theirs in zip(*pairs, strict=True):
            terms += [kl_sum(a[None], b[None]) for a, b in zip(mine[0], theirs[0], strict=True)]
    expected = (sum(terms) / len(terms)).item()  # type: ignore[union-attr]
    assert expected > 0.01 and found == [pytest.approx(expected, rel=1e-4)] * 2


def test_conversations_are_trained_and_scored(tmp_path: Path) -> None:
    tokenizer, directory = chat_tokenizer(CHATML), tmp_path / "source"
    write_olmoe(directory, tokenizer, len(tokenizer))
    rows = [json.dumps({"id": f"c{i}", "messages": GOOD if i % 2 else GOOD[1:3]}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    files = [f"task.files.{split}={tmp_path}/rows.jsonl" for split in ("train", "validation")]
    sizes = ["task.max_source_tokens=90", "task.max_target_tokens=24", "task.columns.id=id"]
    run_dir = tmp_path / "run"
    logged = command(run_dir, "task=chat", *files, f"model.source={directory}", *sizes, packing=True)
    assert logged["train/loss"][-1] < logged["train/loss"][0]
    assert {"rougeL", "em"} <= evaluation(run_dir)["scores"]["pre_gated"].keys()
    predictions = (run_dir / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in predictions} == {f"c{i}" for i in range(6)}


def test_plain_text_is_learnt_from_scratch(tmp_path: Path) -> None:
    sentinel_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_corpus(tmp_path / "data")
    arguments = [
        *("task=language_modelling", "pregate=conventional", "then_eval=false", "task.max_source_tokens=16"),
        *("model=nano_olmoe", "model.geometry.num_hidden_layers=1", f"model.tokenizer={tmp_path}/tokenizer"),
        f"data.root={tmp_path}/data",
    ]
    logged = command(tmp_path / "run", *arguments, steps=4, eval_every=4, save_every=4)
    assert logged["train/loss"][-1] < logged["train/loss"][0] and logged["train/eval/loss"][0] > 0
    assert json.loads((tmp_path / "run/checkpoint/config.json").read_text())["model_type"] == "olmoe"
    summary = json.loads((tmp_path / "run/summary.json").read_text())["train"]
    # a row's first token, and that of each document in it, is no target
    assert 0 < summary["target_tokens"] < 4 * 6 * 15


def test_a_model_that_names_no_padding_is_trained(source: Path, root: Path, tmp_path: Path) -> None:
    """As published Mixtral and Qwen3-MoE: neither the config nor, with Mixtral, the tokenizer."""
    directory = tmp_path / "source"
    shutil.copytree(source, directory)
    for name, keys in {"config.json": ("pad_token_id",), "tokenizer_config.json": ("pad_token",)}.items():
        held = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**held, **dict.fromkeys(keys)}))
    (directory / "generation_config.json").unlink()
    calibrated = ["pregate.init=calibrated", "calibration.examples=20"]
    command(tmp_path / "run", "task=sst2", f"data.root={root}", f"model.source={directory}", *calibrated)
    evaluation(tmp_path / "run")


REFUSED = {
    ("switch_transformers", "train.packing=true"): "train.packing=true is for decoder-only models",
    ("switch_transformers", "task.learn=everything"): "task.learn=everything is for decoder-only models",
    ("switch_transformers", "task.chat_template=file"): "task.chat_template=file is for decoder-only models",
    ("switch_transformers", "task=chat"): "task.kind=chat is for decoder-only models",
    ("switch_transformers", "task=language_modelling"): "task.kind=language_modelling is for decoder-only models",
    ("olmoe", "task=span_corruption"): "olmoe model is decoder-only: choose task=language_modelling",
}


@pytest.mark.parametrize(("family", "setting"), REFUSED)
def test_what_a_model_cannot_learn_is_refused(family: str, setting: str) -> None:
    from pregate.models.family import family_named

    with pytest.raises(UsageError, match=REFUSED[family, setting]):
        check_objective(compose_run([setting]), family_named(family))


def test_a_template_is_refused_before_any_work(source: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "template").write_text(NOT_CUT)
    arguments = ["task=sst2", f"data.root={root}", f"model.source={source}", f"task.chat_template={tmp_path}/template"]
    with pytest.raises(UsageError, match="cannot be cut where the assistant's turn begins"):
        command(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["train.packing=true", "task=language_modelling"])
def test_layers_that_carry_a_state_are_not_given_packed_rows(setting: str) -> None:
    class Carrying(type(FAMILY)):  # type: ignore[misc]
        source_type, objective = "carrying", Causal("decoder", packs=False)

    with pytest.raises(UsageError, match=r"layers of a carrying model would carry a state from one to the next"):
        check_objective(compose_run([setting]), Carrying())
    check_objective(compose_run([setting]), FAMILY)
