"""Families with dense layers first: what their checkpoints hold beside the model, and what of a gate stays float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, Glm4MoeForCausalLM

from pregate import OffloadEngine
from pregate.config import PreGateConfig, UsageError
from pregate.conversion.write import convert
from pregate.models.family import family_named
from pregate.models.loading import load_resident

BIAS = "e_score_correction_bias"
LAYERS, DENSE = 6, 2
MODELS = {"deepseek_v3": DeepseekV3ForCausalLM, "glm4_moe": Glm4MoeForCausalLM}
with_correction_bias = pytest.mark.parametrize("kind", MODELS)


def settings(**changes: Any) -> dict[str, Any]:
    narrow = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_attention_heads": 2}
    latent = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    layers = {"num_hidden_layers": LAYERS, "first_k_dense_replace": DENSE, "num_nextn_predict_layers": 1}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    other = {"vocab_size": 61, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}
    return {**narrow, **latent, **layers, **experts, **other, **changes}


def further_layer() -> dict[str, Tensor]:
    """A few tensors of a layer that predicts one token further, as the hub's files name them."""
    names = ("eh_proj.weight", "mlp.experts.0.up_proj.weight", f"mlp.gate.{BIAS}", "shared_head.norm.weight")
    return {f"model.layers.{LAYERS}.{name}": torch.randn(8, 16).bfloat16() for name in names}


def saved(kind: str, directory: Path, extras: dict[str, Tensor]) -> dict[str, Tensor]:
    """A conventional checkpoint in bfloat16, but its correction biases, as the hub has them. Returns its tensors."""
    torch.manual_seed(0)
    model = MODELS[kind](MODELS[kind].config_class(**settings()))
    model.save_pretrained(directory)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    # of another scale than bfloat16 can tell apart
    biases = {name: 1 + torch.rand(8) / 1000 for name in tensors if name.endswith(BIAS)}
    tensors |= biases | extras
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return tensors


@with_correction_bias
def test_layers_behind_the_model_are_carried_along(kind: str, tmp_path: Path, capsys: Any) -> None:
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0)}
    extras = {**further_layer(), **frequencies, "mtp.norm.weight": torch.ones(16)}
    saved(kind, tmp_path / "source", extras)
    report = convert(str(tmp_path / "source"), tmp_path / "converted", PreGateConfig(lookahead=1))
    assert not report.dropped
    written = load_file(tmp_path / "converted" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extras.items())
    whole, opened = load_resident(tmp_path / "converted"), AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert set(written) - set(extras) >= {name for name in whole.state_dict() if "experts." not in name}
    assert all(torch.equal(tensor, opened.state_dict()[name]) for name, tensor in whole.state_dict().items())
    printed = capsys.readouterr()
    assert printed.err.count(f"source holds {len(extras)} tensors that this model does not read") == 1
    assert "LOAD REPORT" not in printed.err + printed.out


@with_correction_bias
def test_a_layer_too_many_is_refused(kind: str, tmp_path: Path) -> None:
    further = {name.replace(f".{LAYERS}.", f".{LAYERS + 1}."): tensor for name, tensor in further_layer().items()}
    saved(kind, tmp_path / "source", further)
    with pytest.raises(UsageError, match=f"says num_hidden_layers={LAYERS} but its weights hold {LAYERS + 1} layers"):
        convert(str(tmp_path / "source"), tmp_path / "converted", PreGateConfig(lookahead=1))
    # upstream prints these, and ours refuses them, whoever opens the directory
    with pytest.raises(UsageError, match=rf"hold unknown tensors, namely model.layers.{LAYERS + 1}"):
        family_named(kind).model_class.from_pretrained(tmp_path / "source")


@with_correction_bias
@pytest.mark.parametrize("entry", ["own", "embedding"])
def test_the_correction_bias_moves_with_its_gate_and_stays_float32(kind: str, entry: str, tmp_path: Path) -> None:
    tensors = saved(kind, tmp_path / "source", {})
    convert(str(tmp_path / "source"), tmp_path / "converted", PreGateConfig(lookahead=1, entry=entry))
    first = f"model.layers.{DENSE}.mlp.gate" if entry == "own" else "model.entry_gates.0.router"
    expected = {f"{first}.{BIAS}": tensors[f"model.layers.{DENSE}.mlp.gate.{BIAS}"]}
    for layer in range(DENSE, LAYERS - 1):
        moved = tensors[f"model.layers.{layer + 1}.mlp.gate.{BIAS}"]
        expected[f"model.layers.{layer}.mlp.gate.pre_gate.router.{BIAS}"] = moved
    with OffloadEngine.open(tmp_path / "converted", pack_dir=tmp_path / "pack") as engine:
        for model in (load_resident(tmp_path / "converted", dtype=torch.bfloat16), engine.model):
            held = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(BIAS)}
            assert set(held) == set(expected)
            for name, bias in expected.items():
                assert held[name].dtype is torch.float32 and torch.equal(held[name], bias), name
            assert model.lm_head.weight.dtype is torch.bfloat16
            assert not any(name.endswith(BIAS) for name, _ in model.named_parameters())


@pytest.mark.parametrize("model", [DeepseekV2ForCausalLM, *MODELS.values()])
@pytest.mark.parametrize(("share", "layers"), [(1.0, LAYERS), (0.5, DENSE + 2), (0.01, DENSE + 1)])
def test_a_smaller_model_keeps_its_dense_layers(model: Any, share: float, layers: int) -> None:
    family = family_named(model.config_class.model_type)
    whole = model.config_class(**settings(n_group=4, topk_group=2)).to_dict()
    small = family.config(family.smaller(whole, share, 3))
    assert family.moe_layers(small, "decoder") == list(range(DENSE, layers))
    ids = torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    assert family.model_class(small).eval()(ids).logits.isfinite().all() and family.experts(small).num_experts == 3
