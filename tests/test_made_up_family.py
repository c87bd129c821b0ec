"""A family that the package does not know, in one file and registered from outside: every command works with it."""

from __future__ import annotations

import copy
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pregate import OffloadEngine
from pregate.cli import compose_run
from pregate.config import GeneratedConfig, Policy, UsageError
from pregate.convert import work as convert
from pregate.measure.servers import forced_logits
from pregate.models.experts import ExpertKey
from pregate.models.family import experts_of
from pregate.models.loading import load_resident, mark_conventional, open_model
from pregate.tasks.generated import generated_tokenizer
from pregate.train import main as train
from tests import made_up
from tests.made_up import MadeUpConfig, MadeUpForCausalLM
from tests.tiny import layer_passes

LAYOUTS = ("fused", "apart")


def model(lookahead: int = 0, entry: str = "own") -> Any:
    torch.manual_seed(0)
    config = MadeUpConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        pregate={"lookahead": lookahead, "entry": entry},
    )
    return MadeUpForCausalLM(config).eval()


def prompts(seed: int = 0) -> dict[str, Tensor]:
    """Two rows, the second padded on the left."""
    ids = torch.randint(2, 640, (2, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def take_apart(directory: Path) -> None:
    """Rewrite the weights so that each expert is three tensors of its own, and `mlp` has another name."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    spec = experts_of(MadeUpConfig.from_pretrained(directory))
    for key in spec.keys():  # noqa: SIM118 - not a mapping
        other = spec.layouts[1](key.stack, spec.layers[key.stack][key.block], key.expert)
        for fused, alone in zip(spec.slices(key), other, strict=True):
            tensors[alone.tensor] = fused.of(tensors[fused.tensor]).clone()
    for block in range(len(spec.layers[made_up.STACK])):
        for name in spec.tensors_of(made_up.STACK, block):
            del tensors[name]
    renamed = {name.replace(".mlp.", ".feed_forward."): tensor for name, tensor in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=LAYOUTS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conventional checkpoint with a tokenizer, its experts on disk in each layout."""
    directory = tmp_path_factory.mktemp("made_up") / request.param
    model().save_pretrained(directory)
    if request.param == "apart":
        take_apart(directory)
    mark_conventional(directory)
    generated_tokenizer(GeneratedConfig(train=200, validation=20)).save_pretrained(directory)
    return directory


def test_the_family_is_one_short_file() -> None:
    assert inspect.getsource(made_up).count("\n") <= 150


@pytest.mark.parametrize("entry", ["own", "embedding"])
def test_a_converted_checkpoint_routes_one_block_ahead(source: Path, tmp_path: Path, entry: str) -> None:
    """Against a naive pass: the input of every block is recorded, and each gate decides on that of the block before."""
    output = tmp_path / "converted"
    convert(compose_run([f"source={source}", f"output={output}", f"pregate.entry={entry}"]))
    conventional, ahead = load_resident(source), load_resident(output)
    seen: list[Tensor] = []
    chosen: list[Tensor] = []
    blocks = list(ahead.moe_blocks())
    for block in blocks:
        block.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        block.module.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    logits = ahead(**prompts()).logits
    embedded = ahead.model.embed_tokens(prompts()["input_ids"]).flatten(0, 1)
    first = ahead.model.entry_gates["0"].norm(embedded) if entry == "embedding" else seen[0]
    routers = [block.module.gate for block in conventional.moe_blocks()]
    assert len(blocks) == len(routers) == 4
    for router, states, ids in zip(routers, [first, *seen[:-1]], chosen, strict=True):
        expected = (states @ router.weight.T).softmax(-1).topk(2).indices
        assert torch.equal(ids, expected)
    assert logits.isfinite().all() and not torch.allclose(logits, conventional(**prompts()).logits)


def test_lookahead_0_is_upstream(source: Path) -> None:
    """The same layers with upstream's own router in every block."""
    ours, naive = load_resident(source), load_resident(source)
    for block in naive.moe_blocks():
        router = made_up.upstream.OlmoeTopKRouter(naive.config)
        router.load_state_dict({"weight": block.gates.weight})
        block.module.gate = router
    with torch.no_grad():
        logits = ours(**prompts()).logits
        assert logits.isfinite().all() and torch.equal(logits, naive(**prompts()).logits)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_every_policy_gives_the_tokens_of_the_whole_model(source: Path, tmp_path: Path, lookahead: int) -> None:
    directory = source
    if lookahead:
        directory = tmp_path / "converted"
        convert(compose_run([f"source={source}", f"output={directory}", f"pregate.lookahead={lookahead}"]))
    whole = load_resident(directory)
    request = {**prompts(), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected, logits = whole.generate(**request), whole(**prompts()).logits
    for policy in Policy:
        with OffloadEngine.open(directory, policy=policy, pack_dir=tmp_path / "pack") as engine:
            assert torch.equal(engine.generate(**request), expected)
            torch.testing.assert_close(engine.forward(**prompts()).logits, logits, rtol=1e-4, atol=1e-5)
            assert (engine.counters.bytes_moved > 0) == (policy is not Policy.gpu_only)
    assert logits.isfinite().all() and len(expected[0]) == 13


def test_two_steps_of_training_and_an_evaluation(source: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    rows = [{"id": str(i), "question": f"who is {i}?", "context": f"it is {i}", "answers": [f"{i}"]} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"steps": 2, "batch_sequences": 4, "micro_batch_tokens": 64, "learning_rate": 1e-2, "precision": "fp32"}
    settings |= {"log_every": 1, "eval_every": 2, "save_every": 2, "eval_examples": 4, "warmup_steps": 0}
    train(
        compose_run(
            [
                *(f"task.files.{split}={tmp_path}/rows.jsonl" for split in ("train", "validation")),
                *(f"train.{key}={value}" for key, value in settings.items()),
                *("task=qa", "tracking=jsonl", "task.max_target_tokens=6", "task.max_source_tokens=32"),
                *(f"model.source={source}", f"run_dir={run_dir}", f"reference={source}", "engine.bench_new_tokens=4"),
                *("engine.bench_repeats=1", "engine.bench_prompts=2", "pregate.init=calibrated"),
            ]
        )
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    evaluation = json.loads((run_dir / "eval.json").read_text())
    assert evaluation["num_examples"] == 8 and set(evaluation["scores"]) == {"pre_gated", "reference"}
    assert len(evaluation["routing"]["agreement"][made_up.STACK]) == 4
    for policy, record in evaluation["engine"].items():
        assert record["tokens_equal_resident"] and record["logits_equal_resident"], policy
        assert (record["bytes_moved"] > 0) == (policy != "gpu_only")
    trained, before = load_resident(run_dir / "checkpoint"), load_resident(source)
    moved = trained.model.layers[1].mlp.gate.pre_gate.router.weight
    assert moved.isfinite().all() and not torch.equal(moved, before.model.layers[3].mlp.gate.weight)


def test_recomputed_layers_give_the_same_gradients() -> None:
    labels = prompts()["input_ids"]
    gradients, passes = [], []
    for recompute in (False, True):
        trained = model(lookahead=2).train()
        passes.append(layer_passes(trained))
        if recompute:
            trained.gradient_checkpointing_enable()
        trained(**prompts(), labels=labels, output_router_logits=True, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    plain, recomputed = gradients
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())
    assert plain["model.layers.1.mlp.gate.pre_gate.router.weight"].abs().max() > 0
    assert [list(each.values()) for each in passes] == [[1] * 8, [2] * 8]


def test_threads_do_not_mix_up_the_routes_of_one_model() -> None:
    shared = model(lookahead=2)
    with torch.no_grad():
        expected = [shared(**prompts(seed)).logits for seed in range(6)]

        def again(seed: int) -> bool:
            return all(torch.equal(shared(**prompts(seed)).logits, expected[seed]) for _ in range(5))

        with ThreadPoolExecutor(6) as threads:
            assert all(threads.map(torch.no_grad()(again), range(6)))


def test_a_copy_has_gates_of_its_own() -> None:
    first = model(lookahead=1)
    logits = first(**prompts()).logits
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(second(**prompts()).logits, logits)


def test_what_the_family_does_not_have_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names encoder, but the model has decoder"):
        convert(compose_run([f"source={source}", f"output={tmp_path}/a", "pregate.stacks=[encoder]"]))
    with pytest.raises(UsageError, match="needs at least 5 MoE blocks"):
        model(lookahead=4)
    stored = open_model(str(source)).tensors
    spec = experts_of(MadeUpConfig.from_pretrained(source)).as_found_in(stored)
    lost = stored[spec.tensor_names(ExpertKey(made_up.STACK, 1, 2))[0]].key
    tensors = {name: tensor for name, tensor in load_file(source / "model.safetensors").items() if name != lost}
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(UsageError, match="lacks"):
        OffloadEngine.open(broken)


def test_equality_is_claimed_of_the_tokens_that_were_generated() -> None:
    """Not of the prompt alone: the logits behind every new token are compared, for rows padded on the left too."""
    whole, objective = model(lookahead=1), made_up.FAMILY.objective
    tokens = whole.generate(**prompts(), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(objective.new_tokens(tokens, prompts()["input_ids"])[0]) == 5
    logits = forced_logits(whole, objective, prompts(), tokens[:, :-1])
    assert logits.isfinite().all() and torch.equal(logits[:, -5:].argmax(-1), tokens[:, -5:])
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 640
    other = forced_logits(whole, objective, prompts(), changed[:, :-1])
    torch.testing.assert_close(other[:, :8], logits[:, :8], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[:, 8:], logits[:, 8:], atol=1e-2)
