"""Conversion: names and bits of the output against a naive loop, and what is written around them."""

import hashlib
import itertools
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, SwitchTransformersForConditionalGeneration

from pregate import __version__
from pregate.config import Entry, Init, PreGateConfig, UsageError
from pregate.conversion.gate_starts import FittedGates
from pregate.conversion.write import convert
from pregate.models.loading import load_resident, open_model
from tests.make_switch_base import SWITCH_BASE_8, TINY, make, shapes, weight
from tests.tiny import upstream_model

BOTH = ["encoder", "decoder"]
GEOMETRIES = {
    "step2": {},
    "step1": {"num_layers": 4, "num_decoder_layers": 4},
    "step3": {"num_layers": 12, "num_decoder_layers": 12},
    "depths": {
        "num_layers": 5,
        "num_sparse_encoder_layers": 5,
        "num_decoder_layers": 9,
        "num_sparse_decoder_layers": 4,
    },
    "bias": {"router_bias": True},
    "untied": {"tie_word_embeddings": False},
}
FILES = {"bin": ("bin", 1), "bin-shards": ("bin", 3), "safe": ("safetensors", 1), "safe-shards": ("safetensors", 3)}
PAIRS = [
    ("step2", "bin"),
    ("step2", "safe"),
    ("step1", "bin-shards"),
    ("step3", "bin"),
    ("depths", "safe-shards"),
    ("bias", "safe-shards"),
    ("untied", "bin"),
    ("untied", "safe"),
]
GATINGS = [
    (0, "own", BOTH),
    *itertools.product((1, 2, 3), ("own", "embedding"), (BOTH,)),
    (1, "own", ["encoder"]),
    (1, "embedding", ["decoder"]),
    (3, "embedding", ["encoder"]),
    (2, "own", ["decoder"]),
]


def gate(lookahead: int = 1, stacks: list[str] | None = None, entry: str = "own", init: str = "source"):
    return PreGateConfig(lookahead, stacks or BOTH, Entry(entry), Init(init))


@pytest.fixture(scope="module", params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def source(request, tmp_path_factory) -> tuple[Path, dict]:
    geometry, files = request.param
    directory = tmp_path_factory.mktemp("source") / "model"
    return directory, make(directory, *FILES[files], **{**TINY, **GEOMETRIES[geometry]})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    make(directory, "bin", **TINY)
    return directory


def written(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


@cache
def stored_names(config: str) -> tuple[str, ...]:
    return tuple(shapes(json.loads(config)))


def naive(config: dict, lookahead: int, stacks: list[str], entry: str) -> dict[str, str]:
    """Output name -> source name, by the definition alone: G_i lives in block i - N."""
    names = stored_names(json.dumps(config))
    expected = {name: name for name in names}
    for stack, part, depth in (("encoder", 1, config["num_layers"]), ("decoder", 2, config["num_decoder_layers"])):
        if lookahead == 0 or stack not in stacks:
            continue
        layers = [n for n in range(depth) if f"{stack}.block.{n}.layer.{part}.mlp.experts.expert_0.wi.weight" in names]
        for i, layer in enumerate(layers):
            for suffix in ["weight"] + ["bias"] * config["router_bias"]:
                origin = f"{stack}.block.{layer}.layer.{part}.mlp.router.classifier.{suffix}"
                if i >= lookahead:
                    del expected[origin]
                    seat = layers[i - lookahead]
                    expected[f"{stack}.block.{seat}.layer.{part}.mlp.pre_gate.classifier.{suffix}"] = origin
                elif entry == "embedding":
                    del expected[origin]
                    expected[f"{stack}.entry_gates.{i}.classifier.{suffix}"] = origin
            if i < lookahead and entry == "embedding":
                norm = f"{stack}.block.{layer}.layer.{part}.layer_norm.weight"
                expected[f"{stack}.entry_gates.{i}.layer_norm.weight"] = norm
    if config["tie_word_embeddings"]:
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            del expected[name]
    return expected


def test_fixture_is_what_upstream_expects(source):
    directory, config = source
    model, info = SwitchTransformersForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    ids = torch.arange(2, 12)[None]
    logits = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    assert torch.equal(model.shared.weight, weight("shared.weight", (96, 24), config, seed=0))


def test_full_size_fixture_has_upstreams_geometry():
    full = shapes(SWITCH_BASE_8)
    tied = sum(torch.Size(full[n]).numel() for n in full if "embed_tokens" not in n and n != "lm_head.weight")
    assert full["encoder.block.11.layer.1.mlp.experts.expert_7.wi.weight"] == (3072, 768)
    attention, dense, experts = 36 * 4 * 768**2, 12 * 2 * 768 * 3072, 12 * 8 * 2 * 768 * 3072
    small = 12 * 8 * 768 + 62 * 768 + 2 * 32 * 12  # routers, layer norms, position biases
    by_hand = 32128 * 768 + attention + dense + experts + small
    assert tied == by_hand, f"{tied:,} parameters, {by_hand:,} by hand"


def test_names_and_bits_equal_the_naive_loop(source, tmp_path):
    directory, config = source
    truth = {name: weight(name, shape, config, seed=0) for name, shape in shapes(config).items()}
    for number, (lookahead, entry, stacks) in enumerate(GATINGS):
        output = tmp_path / str(number)
        report = convert(str(directory), output, gate(lookahead, stacks, entry))
        tensors, expected = written(output), naive(config, lookahead, stacks, entry)
        assert sorted(tensors) == sorted(expected), (lookahead, entry, stacks)
        for name, origin in expected.items():
            table = origin if origin == "lm_head.weight" or "embed_tokens" not in origin else "shared.weight"
            assert torch.equal(tensors[name], truth[table]), name
        assert len(report.moves) == sum(n != o and n.endswith("classifier.weight") for n, o in expected.items())
        section = json.loads((output / "config.json").read_text())["pregate"]
        asked = {"lookahead": lookahead, "stacks": stacks, "entry": entry, "init": "source"}
        assert section == asked | {"weights": "early", "start": 0, "gate": "linear", "gate_width": 256}


def test_auto_class_opens_the_output(source, tmp_path):
    directory, _ = source
    for lookahead, entry, max_shard_bytes in ((0, "own", 10**9), (1, "embedding", 150_000), (3, "own", 10**9)):
        output = tmp_path / str(lookahead)
        convert(str(directory), output, gate(lookahead, entry=entry), max_shard_bytes=max_shard_bytes)
        model, info = AutoModelForSeq2SeqLM.from_pretrained(output, output_loading_info=True)
        assert type(model).__name__ == "PreGatedSwitchTransformersForConditionalGeneration"
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        assert model.config.pregate["lookahead"] == lookahead
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in written(output).items())


def test_lookahead_0_is_the_source_model(source, tmp_path):
    directory, _ = source
    convert(str(directory), tmp_path / "out", gate(0))
    upstream = SwitchTransformersForConditionalGeneration.from_pretrained(directory).eval()
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    model.set_expert_path("reference")
    for parameter in (*upstream.parameters(), *model.parameters()):
        parameter.data = parameter.data.clone()  # matrix products of mapped weights differ in the last bit by alignment
    ids = torch.randint(2, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    want, got = (
        upstream(input_ids=ids, decoder_input_ids=ids).logits,
        model(input_ids=ids, decoder_input_ids=ids).logits,
    )
    assert torch.equal(want, got), f"largest difference {(want - got).abs().max()}"


def test_output_directory_is_complete(tiny, tmp_path):
    (tmp_path / "source").mkdir()
    for file in tiny.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    sides = {"generation_config.json": "{}", "tokenizer.json": "1", "spiece.model": "2", "README.md": "3"}
    for name, content in sides.items():
        (tmp_path / "source" / name).write_text(content)
    report = convert(str(tmp_path / "source"), tmp_path / "deep" / "out", gate(2), revision="abc", seed=7)
    output = tmp_path / "deep" / "out"
    weights = {"config.json", "model.safetensors", "pregate_manifest.json"}
    assert {file.name for file in output.iterdir()} == weights | set(sides) - {"README.md"}
    assert all((output / name).read_text() == sides[name] for name in set(sides) - {"README.md"})
    assert [folder.name for folder in output.parent.iterdir()] == ["out"]

    before, after = (json.loads((d / "config.json").read_text()) for d in (tiny, output))
    changed = {"model_type", "architectures", "pregate"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert after["model_type"] == "pregated_switch_transformers"
    assert after["architectures"] == ["PreGatedSwitchTransformersForConditionalGeneration"]

    manifest = json.loads((output / "pregate_manifest.json").read_text())
    assert (manifest["source"], manifest["revision"]) == (str(tmp_path / "source"), "abc")
    digest = hashlib.sha256((tiny / "pytorch_model.bin").read_bytes()).hexdigest()
    assert manifest["source_sha256"] == {"pytorch_model.bin": digest}
    assert [manifest[k] for k in ("lookahead", "stacks", "entry", "init", "seed")] == [2, BOTH, "own", "source", 7]
    assert manifest["num_moe_blocks"] == report.num_blocks == {"encoder": 4, "decoder": 4}
    assert set(manifest["versions"]) == {"pregate", "torch", "transformers", "safetensors"}
    assert manifest["versions"]["pregate"] == __version__ and manifest["created"].endswith("+00:00")
    assert report.has_tokenizer and report.shards == ("model.safetensors",)
    assert (output / "model.safetensors").stat().st_mode & 0o777 == (output / "config.json").stat().st_mode & 0o777


def test_code_that_a_config_points_to_is_not_taken_along(tiny, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoModelForSeq2SeqLM": "modeling_evil.Model"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    (source / "modeling_evil.py").write_text("raise SystemExit")
    convert(str(source), tmp_path / "out", gate())
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    load_resident(str(source)).save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()


def test_shards_and_index(tiny, tmp_path):
    report = convert(str(tiny), tmp_path / "out", gate(), max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == sorted(report.shards)
    assert len(report.shards) > 3 and report.shards[0] == f"model-00001-of-{len(report.shards):05}.safetensors"
    for shard in report.shards:
        part = load_file(tmp_path / "out" / shard)
        assert {name for name, file in index["weight_map"].items() if file == shard} == set(part)
        assert sum(tensor.nbytes for tensor in part.values()) <= 50_000
    total = sum(tensor.nbytes for tensor in written(tmp_path / "out").values())
    assert index["metadata"]["total_size"] == total == report.output_bytes


def test_tokenizer_from_elsewhere(tiny, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
        '"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}'
    )
    (tokenizer / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert not convert(str(tiny), tmp_path / "without", gate()).has_tokenizer
    assert convert(str(tiny), tmp_path / "with", gate(), tokenizer=str(tokenizer)).has_tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "with")("a")["input_ids"] == [0]


@pytest.mark.parametrize("auto_map", [["tokens.Tokens", None], {"AutoTokenizer": ["tokens.Tokens", None]}])
def test_a_tokenizer_that_is_code_is_not_taken_along(tiny, tmp_path, auto_map):
    """As the tokenizer of Moonlight is published. The report says what to do, and another tokenizer can be named."""
    source = tmp_path / "source"
    shutil.copytree(tiny, source)
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokens", "auto_map": auto_map}))
    (source / "tokens.py").write_text("raise SystemExit")
    report = convert(str(source), tmp_path / "out", gate())
    assert not report.has_tokenizer and report.tokenizer_is_code
    [line] = (line for line in report.told("source").splitlines() if "model.tokenizer=" in line)
    assert "is code" in line and "no tokenizer" not in line
    assert not list((tmp_path / "out").glob("token*"))  # or a command would not look at model.tokenizer
    with pytest.raises(UsageError, match=r"is code: give .* tokenizer\.json"):
        convert(str(tiny), tmp_path / "named", gate(), tokenizer=str(source))
    # with a tokenizer.json it can be opened without the code
    (source / "tokenizer.json").write_text("{}")
    report = convert(str(source), tmp_path / "whole", gate())
    assert report.has_tokenizer and not report.tokenizer_is_code and (tmp_path / "whole" / "tokenizer.json").is_file()


def test_random_gates_depend_on_seed_and_name_alone(tmp_path):
    config = make(tmp_path / "source", "bin", **{**TINY, "d_model": 64, "num_experts": 16, "router_bias": True})
    first = gate(1, init="random")
    for name, pregate, seed in (("a", first, 3), ("b", gate(2, init="random"), 3), ("c", first, 4), ("d", first, 3)):
        shard = 10**9 if name == "a" else 10**6
        convert(str(tmp_path / "source"), tmp_path / name, pregate, seed=seed, max_shard_bytes=shard)
    a, b, c, d = (written(tmp_path / name) for name in "abcd")
    assert all(torch.equal(a[name], d[name]) for name in a)
    one, two = naive(config, 1, BOTH, "own"), naive(config, 2, BOTH, "own")
    gates = [name for name, origin in one.items() if name != origin]
    for name in gates:
        if name.endswith("bias"):
            assert not a[name].any()
            continue
        assert not torch.equal(a[name], c[name])
        assert abs(a[name].std() / 64**-0.5 - 1) < 0.1 and abs(a[name].mean()) < 0.02, (a[name].std(), 64**-0.5)
        twin = [other for other, origin in two.items() if origin == one[name] and other != origin]
        assert not twin or torch.equal(a[name], b[twin[0]])
    assert len({tuple(a[name].flatten().tolist()) for name in gates if name.endswith("weight")}) == 6
    for name in set(one) - set(gates):
        assert torch.equal(a[name], weight(one[name], tuple(a[name].shape), config, seed=0)), name


def test_dtype_is_kept_and_a_leftover_tensor_dropped(tiny, tmp_path):
    tensors = {name: t.bfloat16() for name, t in torch.load(tiny / "pytorch_model.bin", weights_only=True).items()}
    leftover = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    torch.save({**tensors, leftover: torch.ones(8, 2)}, tmp_path / "source" / "pytorch_model.bin")
    report = convert(str(tmp_path / "source"), tmp_path / "out", gate(1, entry="embedding", init="random"))
    assert {tensor.dtype for tensor in written(tmp_path / "out").values()} == {torch.bfloat16}
    assert leftover in report.dropped and "lm_head.weight" in report.dropped


@pytest.mark.parametrize("keep", ["decoder.embed_tokens.weight", "lm_head.weight"])
def test_any_one_of_the_tied_tables_will_do(tiny, tmp_path, keep):
    tensors = torch.load(tiny / "pytorch_model.bin", weights_only=True)
    table = tensors["shared.weight"]
    tied = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    left = {name: t.clone() for name, t in tensors.items() if name not in tied or name == keep}
    save_file(left, tmp_path / "source" / "model.safetensors")
    convert(str(tmp_path / "source"), tmp_path / "out", gate())
    assert torch.equal(written(tmp_path / "out")["shared.weight"], table)
    assert set(tied) & set(written(tmp_path / "out")) == {"shared.weight"}


def test_a_tied_table_with_other_bits_is_kept_as_upstream_keeps_it(tiny, tmp_path):
    tensors = torch.load(tiny / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    convert(str(tmp_path / "source"), tmp_path / "out", gate())
    assert torch.equal(written(tmp_path / "out")["lm_head.weight"], tensors["lm_head.weight"])


def test_an_untied_model_with_one_table_for_both_stacks_opens(tmp_path):
    make(tmp_path / "source", "safetensors", **TINY, tie_word_embeddings=False)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    save_file(left, tmp_path / "source" / "model.safetensors")
    convert(str(tmp_path / "source"), tmp_path / "out", gate())
    _, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"], info
    assert torch.equal(written(tmp_path / "out")["decoder.embed_tokens.weight"], tensors["shared.weight"])


def test_a_source_that_changes_while_gates_are_fitted_is_refused(tmp_path):
    """Its gates would belong to other weights than those that are written."""
    upstream_model(0).save_pretrained(tmp_path / "source")
    opened = open_model(str(tmp_path / "source"))

    def fit(plan, config):
        origins = {n: o for move in plan.moves for n, o in move.renamed.items() if o in opened.tensors}
        read = opened.read(origins.values())
        tensors = {name: read[origin].clone() for name, origin in origins.items()}
        upstream_model(1).save_pretrained(tmp_path / "source")
        return FittedGates(tensors, {})

    with pytest.raises(UsageError, match="was written to while it was read"):
        convert(str(tmp_path / "source"), tmp_path / "out", gate(init="calibrated"), fit=fit)
    assert not (tmp_path / "out").exists()
