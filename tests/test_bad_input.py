"""Bad input ends in one sentence that says what to do, with status 2, and leaves nothing behind."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file, save_file

from pregate.cli import entry_point
from tests.tiny import pregated_model, upstream_model

pytestmark = pytest.mark.usefixtures("in_process_hydra")

ROWS = [
    {"question": f"who is {i}?", "context": f"it is number {i}", "answers": [f"number {i}"], "id": str(i)}
    for i in range(8)
]
TRAIN_SETTINGS = [
    "tracking=jsonl",
    "train.steps=1",
    "train.batch_sequences=2",
    "train.eval_examples=2",
    "eval.examples=2",
    "task.max_target_tokens=4",
    "engine.bench_prompts=1",
    "engine.bench_repeats=1",
    "engine.bench_new_tokens=2",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good and bad checkpoints and data."""
    from transformers import OlmoeConfig, OlmoeForCausalLM, T5Config, T5ForConditionalGeneration

    from pregate.config import GeneratedConfig
    from pregate.tasks.generated import generated_tokenizer

    root = tmp_path_factory.mktemp("inputs")
    tokenizer = generated_tokenizer(GeneratedConfig(train=200, validation=20))
    for name, model in {
        "conventional": upstream_model(0, vocab_size=512),
        "pregated": pregated_model(0, 2, vocab_size=512),
        "truncated": upstream_model(0, vocab_size=512),
        "small": upstream_model(0, vocab_size=67),
    }.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    ahead = pregated_model(0, 2, entry="embedding", stacks=("decoder",), vocab_size=512)
    ahead.save_pretrained(root / "ahead_in_the_decoder")
    tokenizer.save_pretrained(root / "ahead_in_the_decoder")
    pregated_model(0, 1, vocab_size=512).save_pretrained(root / "pregated_once")
    for name, origin, lost in (
        ("lacks_an_expert", "conventional", "decoder.block.3.layer.2.mlp.experts.expert_1.wo.weight"),
        ("lacks_a_gate", "pregated", "encoder.block.1.layer.1.mlp.pre_gate.classifier.weight"),
    ):
        shutil.copytree(root / origin, root / name)
        tensors = load_file(root / name / "model.safetensors")
        del tensors[lost]
        save_file(tensors, root / name / "model.safetensors", metadata={"format": "pt"})
    for name, changes in (
        ("no_start", {"decoder_start_token_id": None, "pad_token_id": None}),
        ("no_padding", {"pad_token_id": None}),
        ("fewer_experts", {"num_experts": 3}),
    ):
        shutil.copytree(root / "conventional", root / name)
        config = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps({**config, **changes}))
        (root / name / "generation_config.json").unlink()
    sizes = {"vocab_size": 512, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    olmoe = OlmoeConfig(**sizes, num_attention_heads=2, num_experts=4, num_experts_per_tok=2)
    OlmoeForCausalLM(olmoe).save_pretrained(root / "decoder_only")
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4096])
    T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(root / "dense")
    (root / "good.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (root / "empty_references.jsonl").write_text("\n".join(json.dumps({**row, "answers": []}) for row in ROWS))
    (root / "no_context.jsonl").write_text("\n".join(json.dumps({"question": "?", "answers": ["x"]}) for _ in ROWS))
    late = [*ROWS, {**ROWS[0], "answers": [["x"]]}, {**ROWS[0], "context": "half \ud83d"}]
    for name, rows in {"late_list": late[:-1], "late_half": [*ROWS, late[-1]]}.items():
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pandas.DataFrame({k: [] for k in ROWS[0]}).to_parquet(root / "empty.parquet")
    (root / "used").mkdir()
    (root / "used" / "thesis.tex").write_text("precious")
    return root


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def run(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `python -m pregate.<command>` in this process; its exit status."""
    module = importlib.import_module(f"pregate.{command}")
    monkeypatch.setattr(sys, "argv", [f"pregate.{command}", *arguments])
    GlobalHydra.instance().clear()
    try:
        entry_point(getattr(module, "main", None) or module.work)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def qa(root: Path, train: str = "good.jsonl", validation: str = "good.jsonl") -> list[str]:
    return ["task=qa", f"task.files.train={root / train}", f"task.files.validation={root / validation}"]


CASES: dict[str, tuple[str, list[str], str]] = {
    "misspelt override": ("train", ["train.lerning_rate=1"], "did you mean train.learning_rate?"),
    "wrong type": ("train", ["train.steps=soon"], "train.steps: Value 'soon'"),
    "unknown experiment": ("train", ["+experiment=switch_bass"], "no experiment named 'switch_bass': choose one of"),
    "a network for gates that decide for no other block": (
        "convert",
        ["pregate.lookahead=0", "pregate.gate=mlp"],
        "pregate.gate=mlp needs a gate that decides ahead, and pregate.lookahead=0 has none: set pregate.lookahead=1",
    ),
    "impossible value": ("convert", ["pregate.lookahead=9"], "outside 0 to 3"),
    "missing data directory": (
        "train",
        ["model.source={root}/conventional", "data.root={root}/nowhere", "task=squad"],
        "nowhere",
    ),
    "missing data file": (
        "train",
        ["model.source={root}/conventional", "task=qa", "task.files.train={root}/none.jsonl"],
        "none.jsonl",
    ),
    "missing column": ("train", ["model.source={root}/conventional", "QA:no_context.jsonl"], "'context'"),
    "empty split": ("train", ["model.source={root}/conventional", "QA:empty.parquet"], "is empty"),
    "empty references": (
        "eval",
        ["checkpoint={root}/pregated", "QA:empty_references.jsonl"],
        "without an answer|no answer|has no|have no",
    ),
    "cell that is no text": (
        "train",
        ["model.source={root}/conventional", "QA:late_list.jsonl", "eval.examples=null", "run_dir={out}/run"],
        "late_list.jsonl holds a list inside a list in column 'answers'",
    ),
    "lone surrogate": (
        "train",
        ["model.source={root}/conventional", "QA:late_half.jsonl", "run_dir={out}/run"],
        "holds a text with the lone surrogate '\\ud83d' in column 'context'",
    ),
    "dense checkpoint": ("convert", ["source={root}/dense", "output={out}/converted"], "t5"),
    "dense checkpoint for evaluation": ("eval", ["checkpoint={root}/dense", "QA:good.jsonl"], "'t5' model"),
    "truncated shard": ("convert", ["source={root}/truncated", "output={out}/converted"], "model.safetensors"),
    "lookahead too large": (
        "convert",
        ["source={root}/conventional", "output={out}/converted", "pregate.lookahead=3"],
        "needs at least 4 MoE blocks in the encoder",
    ),
    "output in use": ("convert", ["source={root}/conventional", "output={root}/used"], "used"),
    "run directory in use": (
        "train",
        ["model.source={root}/conventional", "QA:good.jsonl", "run_dir={root}/used"],
        "holds files but no run: choose another run_dir",
    ),
    "setting of another command": (
        "train",
        ["source={root}/conventional", "QA:good.jsonl", "run_dir={out}/run"],
        "pregate.train does not read source=|the model is model.source=DIR_OR_ID",
    ),
    "plan of a training": (
        "train",
        ["plan=true", "model.source={root}/conventional", "QA:good.jsonl", "run_dir={out}/run"],
        "only pregate.bench makes plans",
    ),
    "source of a benchmark": (
        "bench",
        ["model.source={root}/conventional", "run_dir={out}/bench"],
        "the model is checkpoint=DIR_OR_ID",
    ),
    "reference of another vocabulary": (
        "eval",
        ["checkpoint={root}/pregated", "reference={root}/small", "QA:good.jsonl", "output={out}/eval"],
        "has 67 embeddings, and the tokenizer 511 ids: name a reference",
    ),
    "reference of a training with another vocabulary": (
        "train",
        ["model.source={root}/conventional", "reference={root}/small", "QA:good.jsonl", "run_dir={out}/run"],
        "has 67 embeddings, and the tokenizer 511 ids: name a reference",
    ),
    "reference of another family": (
        "eval",
        ["checkpoint={root}/pregated", "reference={root}/decoder_only", "QA:good.jsonl", "output={out}/eval"],
        "is a model of type olmoe",
    ),
    "budget smaller than one expert": (
        "train",
        ["model.source={root}/conventional", "QA:good.jsonl", "engine.device_budget=1KB", "run_dir={out}/run"],
        "less than one expert",
    ),
    "budget smaller than one expert for evaluation": (
        "eval",
        ["checkpoint={root}/pregated", "QA:good.jsonl", "engine.device_budget=1KB", "output={out}/eval"],
        "less than one expert",
    ),
    "lookahead that contradicts the checkpoint": (
        "eval",
        ["checkpoint={root}/pregated", "QA:good.jsonl", "pregate.lookahead=1", "output={out}/eval"],
        "has lookahead 2, but pregate.lookahead=1",
    ),
    "entry gates that contradict the checkpoint": (
        "eval",
        ["checkpoint={root}/pregated", "QA:good.jsonl", "pregate.entry=embedding", "output={out}/eval"],
        "has entry own, but pregate.entry=embedding",
    ),
    "tokenizer too large for the model": (
        "train",
        ["model.source={root}/small", "QA:good.jsonl", "run_dir={out}/run"],
        "ids but",
    ),
    "source that is pre-gated otherwise": (
        "train",
        ["model.source={root}/pregated", "QA:good.jsonl", "pregate.lookahead=1", "run_dir={out}/run"],
        "has lookahead 2, but pregate.lookahead=1",
    ),
    "source whose gates enter otherwise": (
        "train",
        ["model.source={root}/pregated", "QA:good.jsonl", "pregate.lookahead=2", "pregate.entry=embedding"],
        "has entry own, but pregate.entry=embedding was asked for: set pregate.entry=own, or start from the conv",
    ),
    "source that is pre-gated in one stack, named": (
        "train",
        [
            "model.source={root}/ahead_in_the_decoder",
            "QA:good.jsonl",
            "pregate.lookahead=2",
            "pregate.stacks=[encoder]",
        ],
        "has stacks [decoder], but pregate.stacks=[encoder] was asked for: set pregate.stacks=[decoder], or",
    ),
    "source that is pre-gated in one stack, all stacks asked for by a group": (
        "train",
        ["model.source={root}/ahead_in_the_decoder", "QA:good.jsonl", "pregate=lookahead_2"],
        "has stacks [decoder], but pregate.stacks=[encoder,decoder] was asked for: set pregate.stacks=[decoder], or",
    ),
    "source whose gates began otherwise": (
        "train",
        ["model.source={root}/pregated", "QA:good.jsonl", "pregate.lookahead=2", "pregate.init=source"],
        "has init random, but pregate.init=source was asked for",
    ),
    "source whose gates began otherwise than an arm's": (
        "train",
        ["+experiment=nano_sst2", "+arm=gates_only", "reference={root}/pregated_once"],
        "has init random, but pregate.init=calibrated was asked for",
    ),
    "source without an expert": (
        "train",
        ["model.source={root}/lacks_an_expert", "pregate.lookahead=0", "QA:good.jsonl", "run_dir={out}/run"],
        "lacks decoder.block.3.layer.2.mlp.experts.expert_1.wo.weight",
    ),
    "pre-gated source without a gate": (
        "train",
        ["model.source={root}/lacks_a_gate", "pregate.lookahead=2", "QA:good.jsonl", "run_dir={out}/run"],
        "lacks encoder.block.1.layer.1.mlp.pre_gate.classifier.weight",
    ),
    "teacher without an expert": (
        "train",
        [
            "model.source={root}/conventional",
            "train.teacher={root}/lacks_an_expert",
            "train.distill_logits=1",
            "QA:good.jsonl",
            "run_dir={out}/run",
        ],
        "lacks_an_expert lacks decoder.block.3",
    ),
    "reference of a training without an expert": (
        "train",
        ["model.source={root}/conventional", "reference={root}/lacks_an_expert", "QA:good.jsonl", "run_dir={out}/run"],
        "lacks_an_expert lacks decoder.block.3",
    ),
    "reference of an evaluation without an expert": (
        "eval",
        ["checkpoint={root}/pregated", "reference={root}/lacks_an_expert", "QA:good.jsonl", "output={out}/eval"],
        "lacks_an_expert lacks decoder.block.3",
    ),
    "checkpoint without a gate": (
        "eval",
        ["checkpoint={root}/lacks_a_gate", "QA:good.jsonl", "output={out}/eval"],
        "lacks encoder.block.1.layer.1.mlp.pre_gate",
    ),
    "calibration of a source without an expert": (
        "convert",
        ["source={root}/lacks_an_expert", "output={out}/converted", "pregate.init=calibrated", "task=generated"],
        "lacks decoder.block.3",
    ),
    "benchmark of a checkpoint without an expert": (
        "bench",
        ["checkpoint={root}/lacks_an_expert", "run_dir={out}/bench"],
        "lacks decoder.block.3",
    ),
    "config of fewer experts": (
        "train",
        ["model.source={root}/fewer_experts", "QA:good.jsonl", "run_dir={out}/run"],
        "says num_experts=3 but its weights hold 5 experts a block",
    ),
    "no token to begin with": (
        "train",
        ["model.source={root}/no_start", "QA:good.jsonl", "run_dir={out}/run"],
        "names no decoder_start_token_id and no pad_token_id",
    ),
    "no token to begin with, for conversion": (
        "convert",
        ["source={root}/no_start", "output={out}/converted"],
        "names no decoder_start_token_id and no pad_token_id",
    ),
    "no token to begin with, for evaluation": (
        "eval",
        ["checkpoint={root}/no_start", "QA:good.jsonl", "output={out}/eval"],
        "names no decoder_start_token_id and no pad_token_id",
    ),
    "no token to pad with": (
        "train",
        ["model.source={root}/no_padding", "QA:good.jsonl", "run_dir={out}/run"],
        "names no pad_token_id, which training needs",
    ),
    "lookahead too large for the source to train": (
        "train",
        ["model.source={root}/conventional", "QA:good.jsonl", "pregate.lookahead=3", "run_dir={out}/run"],
        "needs at least 4 MoE blocks in the encoder",
    ),
    "results where nothing can be written": (
        "eval",
        ["checkpoint={root}/pregated", "QA:good.jsonl", "output={root}/good.jsonl/eval"],
        "choose another output=DIR",
    ),
    "run directory where nothing can be written": (
        "train",
        ["model.source={root}/conventional", "QA:good.jsonl", "run_dir={root}/good.jsonl/run"],
        "choose another run_dir=DIR",
    ),
    "missing checkpoint": ("eval", ["checkpoint={root}/nothing/here/at/all", "QA:good.jsonl"], "nothing/here"),
    "nothing to evaluate": ("eval", ["run_dir={out}/none", "QA:good.jsonl"], "train first"),
    "nowhere to convert to": ("convert", ["source={root}/conventional"], "output="),
    "no GPU": (
        "eval",
        ["checkpoint={root}/pregated", "QA:good.jsonl", "engine.device=cuda", "output={out}/eval"],
        "finds no CUDA GPU",
    ),
    "unknown metric": (
        "train",
        ["model.source={root}/conventional", "QA:good.jsonl", "task.primary_metric=bleu"],
        "choose one of em, f1",
    ),
    "stack that the scratch model lacks blocks for": (
        "train",
        ["+experiment=quickstart", "pregate.lookahead=3", "run_dir={out}/run"],
        "needs at least 4 MoE blocks",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_sentence(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    command, templates, said = CASES[name]
    if name == "no GPU":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = [] if command == "convert" or "experiment" in templates[0] else list(TRAIN_SETTINGS)
    for template in templates:
        if template.startswith("QA:"):
            arguments += qa(inputs, template.removeprefix("QA:"), template.removeprefix("QA:"))
        else:
            arguments.append(template.format(root=inputs, out=tmp_path))
    monkeypatch.chdir(tmp_path)
    before = files(inputs) | {f"out/{f}" for f in files(tmp_path)}
    status = run(command, arguments, monkeypatch)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("pregate: ")]
    assert status == 2
    assert len(told) == 1, told
    assert any(part in told[0] for part in said.split("|")), told[0]
    assert told[0].rstrip().endswith((".", "?")), told[0]
    assert files(inputs) | {f"out/{f}" for f in files(tmp_path)} == before


def test_the_same_settings_without_the_fault_work(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that each refusal above is for the reason it gives."""
    monkeypatch.chdir(tmp_path)
    settings = [*TRAIN_SETTINGS, *qa(inputs), f"model.source={inputs}/conventional", "run_dir=run"]
    assert run("train", settings, monkeypatch) == 0
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert set(evaluation["engine"]) == {"gpu_only", "on_demand", "prefetch_all", "pre_gated"}
    assert all(record["tokens_equal_resident"] for record in evaluation["engine"].values())
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["lm_head.weight", "encoder.embed_tokens.weight"])
def test_the_next_command_that_a_conversion_prints_works(
    kept: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """With a source whose tied table has another name than upstream gives it: it is the reference as well."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "conventional", "source")
    tensors = load_file("source/model.safetensors")
    save_file({kept if name == "shared.weight" else name: t for name, t in tensors.items()}, "source/model.safetensors")
    assert run("convert", ["source=source", "output=ahead"], monkeypatch) == 0
    printed = capfd.readouterr().out.strip().splitlines()[-1]
    assert printed == "next: python -m pregate.eval checkpoint=ahead reference=source"
    assert run("eval", [*printed.split()[4:], *TRAIN_SETTINGS, *qa(inputs)], monkeypatch) == 0
    of_source = json.loads(Path("ahead-eval/eval.json").read_text())
    whole = [f"checkpoint={inputs}/conventional", "output=whole", *TRAIN_SETTINGS, *qa(inputs)]
    assert run("eval", whole, monkeypatch) == 0
    asked = [json.loads(line) for line in Path("whole/predictions.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in Path("ahead-eval/predictions.jsonl").read_text().splitlines()]
    assert [row["reference_prediction"] for row in found] == [row["prediction"] for row in asked]
    assert any(row["prediction"] for row in asked) and of_source["scores"]["reference"]


@pytest.mark.parametrize("command", ["train", "eval", "convert"])
def test_a_typo_is_told_by_the_real_command(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"pregate.{command}", "sede=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "pregate: There is no setting 'sede'; did you mean seed?\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
