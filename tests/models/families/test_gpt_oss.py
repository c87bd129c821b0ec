"""gpt-oss: one expert against upstream's module, and its biases in slabs of every dtype."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from pregate import OffloadEngine
from pregate.config import SlabDtype
from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.models.family import experts_of, family_named
from pregate.models.loading import load_resident


def model(**changes: Any) -> Any:
    """A conventional model whose biases matter and whose projections are often clamped."""
    torch.manual_seed(0)
    narrow = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2, "head_dim": 8}
    layers = {"num_hidden_layers": 4, "num_key_value_heads": 1, "num_local_experts": 5, "num_experts_per_tok": 2}
    other = {"vocab_size": 61, "pad_token_id": 0, "initializer_range": 0.3, "sliding_window": 4, "swiglu_limit": 0.4}
    found = GptOssForCausalLM(GptOssForCausalLM.config_class(**{**narrow, **layers, **other, **changes})).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_computes_as_upstream_does(dtype: torch.dtype) -> None:
    whole = model().to(dtype)
    spec, weights = experts_of(family_named("gpt_oss").config(whole.config.to_dict())), dict(whole.named_parameters())
    hidden_ND = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    ones_N1 = torch.ones(7, 1, dtype=dtype)
    for key in spec.keys():  # noqa: SIM118 - not a mapping
        parts = [part.of(weights[part.tensor]) for part in spec.slices(key)]
        assert [tuple(part.shape) for part in parts] == list(spec.matrices.values())
        module = whole.model.layers[key.block].mlp.experts
        expected_ND = GptOssExperts.forward.__wrapped__(module, hidden_ND, torch.full((7, 1), key.expert), ones_N1)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(spec.apply(parts, hidden_ND), expected_ND, **tolerance)


@pytest.mark.parametrize("stored", SlabDtype)
def test_slabs_keep_biases_as_they_are(stored: SlabDtype, tmp_path: Path) -> None:
    """The engine against the resident model with the very weights that slabs hold."""
    source = model()
    source.save_pretrained(tmp_path / "source")
    whole = copy.deepcopy(load_resident(tmp_path / "source"))
    weights, spec = dict(whole.named_parameters()), experts_of(whole.config)
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(2))
    with OffloadEngine.open(tmp_path / "source", slab_dtype=stored, pack_dir=tmp_path / "pack") as engine:
        layout = engine.host.matrices._layout
        slab = aligned_bytes(layout.slab_bytes)
        for key in spec.keys():  # noqa: SIM118 - not a mapping
            parts = [part.of(weights[part.tensor].data) for part in spec.slices(key)]
            layout.encode(parts, slab)
            for part, held in zip(parts, layout.decode(slab), strict=True):
                assert torch.equal(part, held) if part.ndim == 1 else torch.allclose(part, held, atol=0.1)
                part.copy_(held)
        request = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(engine.generate(**request), whole.generate(**request))
        logits, expected = engine.forward(input_ids=ids).logits, whole(input_ids=ids).logits
        assert logits.isfinite().all() and engine.counters.bytes_moved > 0
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        exact = source(input_ids=ids).logits
        assert torch.allclose(expected, exact, atol=1e-4) == (stored is SlabDtype.source)


def test_a_smaller_model_has_the_first_kinds_of_layers() -> None:
    family = family_named("gpt_oss")
    whole = model(num_hidden_layers=6).config.to_dict()
    small = family.config(family.smaller(whole, 0.5, 3))
    assert small.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    ids = torch.randint(1, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    assert family.model_class(small).eval()(ids).logits.isfinite().all()
