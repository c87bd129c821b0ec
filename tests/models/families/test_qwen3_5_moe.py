"""Qwen3.5-MoE as it is published: a config with a text section, and a visual part beside the language model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from pregate import OffloadEngine
from pregate.config import Policy, PreGateConfig
from pregate.conversion.write import convert
from pregate.models.gated_experts import MATRICES
from pregate.models.loading import load_resident, open_model
from tests.models.families.test_decoder_only import (
    FAMILIES,
    LEFT,
    assert_equal_states,
    assert_opens_and_saves_again,
    batch,
    gating,
    geometry,
    moves,
    pregated,
)

ROW, WITHIN = FAMILIES["qwen3_5_moe"], "model.language_model."
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4}


def published(directory: Path, layout: str) -> Any:
    """A directory as on the hub, in bfloat16. Returns upstream's text model of it."""
    draw = random.Random(3)
    torch.manual_seed(3)
    text = {**geometry(draw), **ROW.settings(draw)}
    vision = {**VISION, "out_hidden_size": text["hidden_size"], "num_position_embeddings": 16}
    config = Qwen3_5MoeConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"], dtype="bfloat16"
    )
    whole = Qwen3_5MoeForConditionalGeneration(config).to(torch.bfloat16)
    whole.save_pretrained(directory, save_original_format=layout == "separate")
    experts = [f"0.{name}.weight" for name in MATRICES] if layout == "separate" else ["gate_up_proj", "down_proj"]
    further = {f"mtp.layers.0.mlp.experts.{name}": torch.randn(4, 8) for name in experts}
    further["mtp.fc.weight"] = torch.randn(8, 16)
    file = directory / "model.safetensors"
    save_file(load_file(file) | further, file, metadata={"format": "pt"})
    upstream = AutoModelForCausalLM.from_pretrained(directory)
    assert type(upstream) is ROW.upstream
    upstream.set_experts_implementation("eager")
    return upstream.eval()


@pytest.mark.parametrize("layout", ["separate", "fused"])
def test_a_published_directory_is_converted_bit_by_bit(layout: str, tmp_path: Path, capsys: Any) -> None:
    source, converted, again = (tmp_path / name for name in ("source", "converted", "again"))
    upstream = published(source, layout)
    config = json.loads((source / "config.json").read_text())
    assert config["model_type"] == "qwen3_5_moe" and config["text_config"]["model_type"] == "qwen3_5_moe_text"
    stored = load_file(source / "model.safetensors")
    extras = {name for name in stored if name.startswith(("model.visual.", "mtp."))}
    assert len(extras) > 10 and all(name.startswith((WITHIN, "lm_head.")) for name in set(stored) - extras)

    conventional = load_resident(source)
    conventional.set_expert_path("reference")
    with torch.no_grad():
        assert torch.equal(conventional(**batch(LEFT)).logits, upstream(**batch(LEFT)).logits)
    convert(str(source), converted, PreGateConfig(lookahead=2))
    assert f"holds {len(extras)} tensors that this model does not read" in capsys.readouterr().err
    expected = pregated(ROW, upstream, gating(2))
    assert_opens_and_saves_again(ROW, converted, again, expected)
    assert_equal_states(load_resident(again), expected)

    written = load_file(converted / "model.safetensors")
    renamed, _ = moves(ROW, upstream, gating(2))
    moved = {origin.replace("model.", WITHIN): name.replace("model.", WITHIN) for name, origin in renamed.items()}
    moved = {origin: name for origin, name in moved.items() if origin in stored}
    assert len(moved) == 2 and set(written) == {moved.get(name, name) for name in stored}
    assert all(torch.equal(written[moved.get(name, name)], tensor) for name, tensor in stored.items())
    assert set(load_file(again / "model.safetensors")) == set(written) - extras
    # what describes the visual part is kept for who reads it
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "pregated_qwen3_5_moe_text" and config["vision_config"]["patch_size"] == 4


def test_a_published_directory_is_packed_and_served(tmp_path: Path) -> None:
    published(tmp_path / "source", "fused")
    whole = load_resident(tmp_path / "source", dtype=torch.bfloat16)
    whole.set_expert_path("reference")
    request = {**batch(LEFT), "max_new_tokens": 4, "do_sample": False}
    with OffloadEngine.open(tmp_path / "source", policy=Policy.on_demand, pack_dir=tmp_path / "pack") as engine:
        assert torch.equal(engine.generate(**request), whole.generate(**request))
        logits = engine.forward(**batch(LEFT)).logits
        assert logits.isfinite().all() and engine.counters.bytes_moved > 0
        torch.testing.assert_close(logits, whole(**batch(LEFT)).logits, rtol=2e-2, atol=2e-2)
    # a plan asks for the config.json alone
    assert open_model(str(tmp_path / "source")).config["num_experts"] == len(whole.model.layers[0].mlp.gate.weight)
