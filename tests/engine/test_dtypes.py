"""Whatever dtypes a checkpoint's tensors have, and whether its config names one: the engine computes in the dtypes that
the model has as transformers loads it, and gives its tokens and logits."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from pregate.config import Policy, Tier, UsageError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from pregate.models.loading import load_resident
from tests.engine.serving import assert_same, generated, request
from tests.tiny import batch, pregated_model, upstream_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = {
    "router": ("router", "pre_gate", "entry_gates"),
    "norm": ("layer_norm",),
    "even expert": ("expert_0.", "expert_2.", "expert_4."),
    "odd expert": ("expert_1.", "expert_3."),
    "embedding": ("shared", "embed_tokens", "lm_head"),
}
"""What names of tensors have in them; all others are attention and dense layers."""

dtypes = st.sampled_from(list(DTYPES))
stored_in = st.fixed_dictionaries(dict.fromkeys((*PARTS, "attention"), dtypes))


def part_of(name: str) -> str:
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "attention")


@pytest.fixture(scope="module", params=["pre-gated", "untied", "conventional"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    model: Any = {
        "pre-gated": lambda: pregated_model(3, entry="embedding"),
        "untied": lambda: pregated_model(4, lookahead=2, tie_word_embeddings=False),
        "conventional": lambda: upstream_model(5),
    }[request.param]()
    model.save_pretrained(directory)
    return directory


def write(directory: Path, whole: Path, stored: dict[str, str], said: dict[str, str], form: str) -> None:
    """The checkpoint of `whole` with its tensors in other dtypes, `said` in its config, as files of `form`."""
    directory.mkdir()
    config = json.loads((whole / "config.json").read_text())
    del config["dtype"]
    (directory / "config.json").write_text(json.dumps({**config, **said}))
    shutil.copy(whole / "generation_config.json", directory)
    tensors = {name: t.to(DTYPES[stored[part_of(name)]]) for name, t in load_file(whole / "model.safetensors").items()}
    if form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    elif form == "one":
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    else:
        names = sorted(tensors, reverse=True)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, held in shards.items():
            save_file({name: tensors[name] for name in held}, directory / file, {"format": "pt"})
        metadata = {"total_size": 1, "dtype": "bfloat16"} if form == "index that names one" else {"total_size": 1}
        weight_map = {name: file for file, held in shards.items() for name in held}
        index = {"metadata": metadata, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def kinds(model: Any) -> Counter[tuple[str, torch.dtype]]:
    """How many parameters outside the experts have which dtype, by part."""
    named = {name: parameter.dtype for name, parameter in model.named_parameters() if "expert_" not in name}
    return Counter((part_of(name), dtype) for name, dtype in named.items())


def resident(directory: Path) -> Any:
    """With its weights at an alignment of their own, not at that of the file, where sums round differently."""
    model = load_resident(directory)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@given(
    stored=stored_in,
    said=st.sampled_from(["dtype", "torch_dtype", "", ""]).flatmap(
        lambda key: dtypes.map(lambda dtype: {key: dtype} if key else {})
    ),
    form=st.sampled_from(["one", "two", "bin", "index that names one"]),
    policy=st.sampled_from([Policy.on_demand, Policy.pre_gated]),
    tier=st.sampled_from([Tier.dram, Tier.disk]),
    seed=st.integers(0, 99),
)
@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=6,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_the_engine_computes_in_the_resident_models_dtypes(
    whole: Path,
    tmp_path_factory: pytest.TempPathFactory,
    stored: dict[str, str],
    said: dict[str, str],
    form: str,
    policy: Policy,
    tier: Tier,
    seed: int,
) -> None:
    directory = tmp_path_factory.mktemp("mixed") / "checkpoint"
    write(directory, whole, stored, said, form)
    expected, options = resident(directory), request(2, seed=seed)
    found = kinds(AutoModelForSeq2SeqLM.from_pretrained(directory))
    with OffloadEngine.open(directory, policy=policy, tier=tier, device_budget="40%") as engine:
        assert kinds(engine.model) == kinds(expected) == found
        assert engine.model.config.dtype == expected.config.dtype
        got = generated(engine.generate, options)
        with torch.inference_mode():
            one, other = (forward(**batch(seed)).logits for forward in (engine.forward, expected))
        assert engine.counters.bytes_moved > 0
    assert_same(got, generated(expected.generate, options))
    assert torch.equal(one, other) and one.isfinite().all()
    assert len(got[0].unique()) > 3, got[0]
    shutil.rmtree(directory)


@pytest.mark.parametrize(("experts", "rest"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_experts_in_another_dtype_than_the_rest(tmp_path: Path, experts: str, rest: str) -> None:
    """Without a dtype in its config, the rest decides: its first tensor is the file's first."""
    pregated_model(3).save_pretrained(tmp_path / "whole")
    stored = {part: experts if "expert" in part else rest for part in (*PARTS, "attention")}
    write(tmp_path / "mixed", tmp_path / "whole", stored, {}, "one")
    expected, options = resident(tmp_path / "mixed"), request(3)
    assert {parameter.dtype for parameter in expected.parameters()} == {DTYPES[rest]}
    store = open_store(tmp_path / "mixed", tier=Tier.dram)
    with OffloadEngine.open(tmp_path / "mixed", store=store) as engine:
        assert store.layout.dtype == DTYPES[rest] == engine.model.dtype
        assert_same(generated(engine.generate, options), generated(expected.generate, options))
    with DeviceEngine.open(tmp_path / "mixed", batch=3, max_source_len=9, max_new_tokens=5, store=store) as engine:
        options = {**options, "repetition_penalty": 1e6}
        asked = {name: value for name, value in options.items() if name != "num_beams"}
        result = engine.generate(**asked)
        tokens, logits = result.sequences, torch.stack(result.logits)
    wanted = generated(expected.generate, options)
    assert torch.equal(tokens, wanted[0])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if rest == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(logits, wanted[1], **tolerance) and wanted[1].isfinite().all()
    store.close()


def test_tables_of_a_tied_model_that_differ_stay_apart(tmp_path: Path) -> None:
    """As transformers keeps them: a head of its own is used though the config says that it is tied."""
    pregated_model(3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = torch.randn(tensors["shared.weight"].shape, generator=torch.Generator().manual_seed(0))
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    expected, options = resident(tmp_path), request(2)
    assert torch.equal(expected.lm_head.weight, head) and not torch.equal(expected.shared.weight, head)
    with OffloadEngine.open(tmp_path) as engine:
        assert torch.equal(engine.model.lm_head.weight, head)
        assert_same(generated(engine.generate, options), generated(expected.generate, options))


def test_a_dtype_in_which_nothing_computes_is_one_sentence(tmp_path: Path) -> None:
    pregated_model(3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for dtype in ("int8", "float8_e4m3fn"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        with pytest.raises(UsageError, match=rf"is a model of {dtype}, in which no model computes: set dtype in its c"):
            OffloadEngine.open(tmp_path)
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole_numbers: dict[str, Tensor] = {
        name: tensor.to(torch.int32) for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(whole_numbers, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="in int32, as quantised models do: use the weights in float32"):
        OffloadEngine.open(tmp_path)
    assert not (tmp_path / "experts").exists()
