"""Experts in every layout that checkpoints have: mixed from block to block, interleaved, transposed, with biases."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

from pregate import OffloadEngine
from pregate.config import Policy, PreGateConfig, SlabDtype, Tier, UsageError
from pregate.conversion.write import convert
from pregate.engine.storage.origin import read_experts
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.checkpoint import open_checkpoint
from pregate.models.experts import ExpertSpec, TensorSlice
from pregate.models.family import config_of, experts_of
from pregate.models.loading import _state_of, load_resident, open_model
from tests.models import quantised
from tests.models.quantised import FP8, from_block_fp8, in_block_fp8, write
from tests.models.test_quantised_checkpoints import PROMPT, assert_same, stored_in

# --- mixed from block to block --------------------------------------------------------------------------------------

FUSED = (1, 2)
"""The layers whose experts are two tensors; those of the other two layers are a tensor for each matrix."""


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the experts of the layers `FUSED` as in memory."""
    fused = dict(tensors)
    for layer in FUSED:
        within = f"model.layers.{layer}.mlp.experts"
        parts = {
            name: torch.stack([fused.pop(f"{within}.{expert}.{name}.weight") for expert in range(6)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        fused[f"{within}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        fused[f"{within}.down_proj"] = parts["down_proj"]
    return fused


def of_fused(name: str) -> bool:
    return re.search(rf"layers\.({'|'.join(map(str, FUSED))})\.mlp\.experts", name) is not None


@cache
def mixed(kind: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The config, the tensors of a mixed checkpoint, and those of the same model with all experts apart."""
    config, tensors = quantised.olmoe()
    config["dtype"] = "float32"
    if kind == "plain":
        return config, fuse(tensors), tensors
    numbers = in_block_fp8(tensors)
    decoded = from_block_fp8(numbers, torch.float32)
    stored = fuse(decoded) | {name: tensor for name, tensor in numbers.items() if not of_fused(name)}
    return {**config, "quantization_config": FP8}, stored, decoded


def at(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    config, stored, apart = mixed(kind)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    return write(tmp_path / "mixed", config, stored), write(tmp_path / "apart", plain, apart)


KINDS = pytest.mark.parametrize("kind", ["plain", "fp8 where they are apart"])


@KINDS
def test_a_mixed_checkpoint_is_loaded_whole(tmp_path: Path, kind: str) -> None:
    directory, apart = at(tmp_path, kind)
    names = open_model(str(directory)).tensors
    assert "model.layers.1.mlp.experts.down_proj" in names and "model.layers.0.mlp.experts.3.up_proj.weight" in names
    one = load_resident(directory).state_dict()
    assert_same(one, load_resident(apart).state_dict())
    if kind == "plain":
        assert_same(one, OlmoeForCausalLM.from_pretrained(apart).state_dict())


@KINDS
def test_a_mixed_checkpoint_is_converted_as_it_is(tmp_path: Path, kind: str) -> None:
    directory, apart = at(tmp_path, kind)
    for source, output in ((directory, "one"), (apart, "other")):
        convert(str(source), tmp_path / output, PreGateConfig(lookahead=1), max_shard_bytes=30_000)
    written, found = stored_in(tmp_path / "one"), open_model(str(directory)).tensors
    assert {name for name in written if "experts" in name} == {name for name in found if "experts" in name}
    other: Any = load_resident(tmp_path / "other")
    assert_same(load_resident(tmp_path / "one").state_dict(), other.state_dict())
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict(), other.state_dict())


@KINDS
def test_a_mixed_checkpoint_is_served(tmp_path: Path, kind: str) -> None:
    directory, apart = at(tmp_path, kind)
    asked = {**PROMPT, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = load_resident(apart).generate(**asked)
    assert len(set(expected[:, 5:].flatten().tolist())) > 3
    for tier in (Tier.disk, Tier.dram):
        with OffloadEngine.open(directory, policy=Policy.on_demand, tier=tier, device_budget="50%") as engine:
            tokens = engine.generate(**asked)
            assert engine.counters.bytes_moved > 0 and engine.forward(**PROMPT).logits.isfinite().all()
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("gone", ["3.mlp.experts.2.up_proj.weight", "2.mlp.experts.down_proj"])
def test_what_one_block_lacks_is_named(tmp_path: Path, gone: str) -> None:
    config, stored, _ = mixed("plain")
    kept = {name: tensor for name, tensor in stored.items() if name != f"model.layers.{gone}"}
    assert len(kept) == len(stored) - 1
    with pytest.raises(UsageError, match=re.escape(f"lacks model.layers.{gone}")):
        open_model(str(write(tmp_path / "model", config, kept)))


def test_a_block_in_two_layouts_is_refused(tmp_path: Path) -> None:
    config, stored, apart = mixed("plain")
    with pytest.raises(UsageError, match=re.escape("unknown tensors, namely model.layers.1.mlp.experts.0.down_proj.")):
        open_model(str(write(tmp_path / "model", config, apart | stored)))


# --- interleaved, transposed, with biases ---------------------------------------------------------------------------

E, D, F = 3, 5, 4
MATRICES = {"gate": (F, D), "up": (F, D), "down": (D, F), "gate_bias": (F,), "up_bias": (F,), "down_bias": (D,)}


def interleaved(stack: str, layer: int, expert: int) -> list[TensorSlice]:
    """As gpt-oss: columns of gate and up in turn, all matrices the other way round."""
    rows, gate, up = slice(None), slice(0, None, 2), slice(1, None, 2)
    return [
        TensorSlice(f"{layer}.gate_up", (expert, rows, gate), True, (E, D, 2 * F)),
        TensorSlice(f"{layer}.gate_up", (expert, rows, up), True, (E, D, 2 * F)),
        TensorSlice(f"{layer}.down", (expert,), True, (E, F, D)),
        TensorSlice(f"{layer}.gate_up_bias", (expert, gate), shape=(E, 2 * F)),
        TensorSlice(f"{layer}.gate_up_bias", (expert, up), shape=(E, 2 * F)),
        TensorSlice(f"{layer}.down_bias", (expert,), shape=(E, D)),
    ]


def apart(stack: str, layer: int, expert: int) -> list[TensorSlice]:
    return [TensorSlice(f"{layer}.{expert}.{name}") for name in MATRICES]


def spec(*layouts: Any) -> ExpertSpec:
    return ExpertSpec(E, 2, 1, MATRICES, {"decoder": [0, 2]}, layouts, lambda *_: torch.empty(0), "none")


def naive(form: Any, values: dict[tuple[int, int, str], Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, number by number."""
    stored: dict[str, Tensor] = {}
    for (layer, expert, name), matrix in values.items():
        if form is apart:
            stored[f"{layer}.{expert}.{name}"] = matrix
            continue
        kind, _, bias = name.partition("_")
        shift, step = {"gate": (0, 2), "up": (1, 2), "down": (0, 1)}[kind]
        whole = f"{layer}." + ("down" if kind == "down" else "gate_up") + (f"_{bias}" if bias else "")
        columns = D if kind == "down" else 2 * F
        into = stored.setdefault(whole, torch.zeros((E, columns) if bias else (E, F if kind == "down" else D, columns)))
        for row in range(matrix.shape[0]):
            if bias:
                into[expert, row * step + shift] = matrix[row]
            else:
                for column in range(matrix.shape[1]):
                    into[expert, column, row * step + shift] = matrix[row, column]
    return stored


@pytest.fixture(scope="module")
def values() -> dict[tuple[int, int, str], Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        (layer, expert, name): torch.randn(shape, generator=draw)
        for layer in (0, 2)
        for expert in range(E)
        for name, shape in MATRICES.items()
    }


@pytest.mark.parametrize("stored_as", [interleaved, apart])
@pytest.mark.parametrize("in_memory", [interleaved, apart])
def test_any_layout_becomes_any_other(tmp_path: Path, values: Any, stored_as: Any, in_memory: Any) -> None:
    directory = write(tmp_path / "model", {}, naive(stored_as, values) | {"table": torch.ones(2)})
    own = spec(in_memory, interleaved, apart)
    assert_same(_state_of(open_checkpoint(str(directory)), own), naive(in_memory, values) | {"table": torch.ones(2)})


def test_blocks_in_two_layouts_become_one(tmp_path: Path, values: Any) -> None:
    parts = [
        (form, {key: matrix for key, matrix in values.items() if key[0] == layer})
        for form, layer in ((apart, 0), (interleaved, 2))
    ]
    directory = write(tmp_path / "model", {}, {n: t for form, part in parts for n, t in naive(form, part).items()})
    source = open_checkpoint(str(directory))
    assert_same(_state_of(source, spec(interleaved, apart)), naive(interleaved, values))
    found = spec(interleaved, apart).as_found_in(source.tensors)
    assert found.as_found_in(source.tensors) is found, "the layouts found are those of the model now"
    assert_experts(read_experts(source, found), values)


def assert_experts(read: Any, values: Any) -> None:
    seen = 0
    for key, matrices in read:
        for name, matrix in zip(MATRICES, matrices, strict=True):
            assert torch.equal(matrix, values[(0, 2)[key.block], key.expert, name]), (key, name)
            seen += 1
    assert seen == len(values)


@pytest.mark.parametrize("stored_as", [interleaved, apart])
@pytest.mark.parametrize("slabs", list(SlabDtype))
def test_slabs_hold_them_as_the_engine_computes(tmp_path: Path, values: Any, stored_as: Any, slabs: SlabDtype) -> None:
    """Biases bit for bit, whatever the matrices are stored as."""
    source = open_checkpoint(str(write(tmp_path / "model", {}, naive(stored_as, values))))
    family = spec(interleaved, apart).as_found_in(source.tensors)
    assert_experts(read_experts(source, family), values)
    layout = SlabLayout.of(family, torch.float32, slabs)
    slab = torch.empty(layout.slab_bytes, dtype=torch.uint8)
    for key, matrices in read_experts(source, family):
        layout.encode(matrices, slab)
        for (name, matrix), got in zip(MATRICES.items(), layout.decode(slab), strict=True):
            expected = values[(0, 2)[key.block], key.expert, name]
            exact = slabs is SlabDtype.source or len(matrix) == 1
            torch.testing.assert_close(got, expected, rtol=0, atol=0 if exact else 0.15)
            assert exact or not torch.equal(got, expected), "a quantised matrix is rounded"


def test_gpt_oss_is_read_as_its_layout_says(tmp_path: Path) -> None:
    config, tensors = quantised.gpt_oss()
    source = open_model(str(write(tmp_path / "model", config, tensors)))
    family = experts_of(config_of(source.config)).as_found_in(source.tensors)
    for key, matrices in read_experts(source, family):
        within = f"model.layers.{key.block}.mlp.experts"
        whole = source.read([f"{within}.{name}" for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias")])
        gate_up, down, bias = (tensor[key.expert] for tensor in whole.values())
        by_name = dict(zip(family.matrices, matrices, strict=True))
        assert torch.equal(by_name["gate"], gate_up.t()[0::2]) and torch.equal(by_name["up"], gate_up.t()[1::2])
        assert torch.equal(by_name["down"], down.t()) and bias.abs().min() > 0
        assert torch.equal(by_name["gate_bias"], bias[0::2]) and torch.equal(by_name["up_bias"], bias[1::2])
        assert not any(matrix._base is not None and matrix._base.numel() > matrix.numel() for matrix in matrices[:3])
