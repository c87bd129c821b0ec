"""A served model, whose experts are elsewhere, leaves no file that looks like a model and lacks them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from pregate.config import PreGateConfig, UsageError
from pregate.conversion.write import convert
from pregate.engine.engine import OffloadEngine
from pregate.models.families.switch_config import OLD_MARKER, PreGatedSwitchTransformersConfig
from pregate.models.family import family_of_model
from pregate.models.loading import load_resident
from pregate.models.pregated_models import without_experts
from pregate.models.pregating import PreGating
from pregate.models.synthetic import synthetic_checkpoint
from tests.engine.serving import Served, assert_same, generated, request
from tests.tiny import geometry, pregated_model, upstream_model


def test_a_served_model_is_not_saved(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("the hub was asked"))
    with OffloadEngine.open(served.directory) as engine:
        for part in (engine.model, engine.model.encoder, engine.model.get_decoder()):
            for save in (part.save_pretrained, part.push_to_hub):
                with pytest.raises(UsageError, match="cannot be saved, because an engine holds its experts: copy the "):
                    save(str(tmp_path / "saved"))
    with pytest.raises(UsageError, match="cannot be saved"):
        engine.model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_no_config_tells_of_it(served: Served, tmp_path: Path) -> None:
    with OffloadEngine.open(served.directory) as engine:
        configs = [part.config for part in (engine.model, engine.model.encoder, engine.model.decoder)]
        for config in [*configs, *copy.deepcopy(configs)]:
            config.save_pretrained(tmp_path)
            texts = [(tmp_path / "config.json").read_text(), config.to_json_string(use_diff=False)]
            assert not any("without_experts" in text for text in [*texts, repr(config.to_dict()), repr(vars(config))])
    # a model built afterwards from the very same config has its experts
    rebuilt = type(engine.model)(engine.model.config)
    assert {name for name, _ in rebuilt.named_parameters()} == {name for name, _ in served.model.named_parameters()}
    synthetic = synthetic_checkpoint(family_of_model(engine.model), geometry(), PreGating(1), torch.float32)
    assert "without_experts" not in repr(synthetic.config)


def test_a_fault_while_it_is_built_is_over_with_it(served: Served) -> None:
    with pytest.raises(KeyError), without_experts():
        raise KeyError
    assert any("expert_0" in name for name in type(served.model)(served.model.config).state_dict())


def test_a_config_that_an_earlier_version_marked_is_not_believed(served: Served, tmp_path: Path) -> None:
    """The weights are complete, so the model is; and what is saved of it is rid of the mark."""
    served.model.save_pretrained(tmp_path / "marked")
    path = tmp_path / "marked" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), OLD_MARKER: True}))
    expected, options = generated(served.model.generate, request(2)), request(2)
    for number, model in enumerate((load_resident(path.parent), AutoModelForSeq2SeqLM.from_pretrained(path.parent))):
        assert_same(generated(model.eval().generate, options), expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / str(number))
        assert OLD_MARKER not in (tmp_path / str(number) / "config.json").read_text()
        saved = load_resident(tmp_path / str(number)).state_dict()
        assert all(torch.equal(saved[name], tensor) for name, tensor in served.model.state_dict().items())
    with OffloadEngine.open(path.parent) as engine:
        assert_same(generated(engine.generate, options), expected, rtol=1e-4, atol=1e-5)
    assert not hasattr(AutoConfig.from_pretrained(path.parent), OLD_MARKER)


def test_a_conversion_does_not_copy_the_mark(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), OLD_MARKER: True}))
    convert(str(path.parent), tmp_path / "converted", PreGateConfig())
    assert OLD_MARKER not in (tmp_path / "converted" / "config.json").read_text()
    assert "pregate" in json.loads((tmp_path / "converted" / "config.json").read_text())


def test_a_whole_model_is_saved_as_ever(tmp_path: Path) -> None:
    model = pregated_model(1)
    model.save_pretrained(tmp_path)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in load_resident(tmp_path).state_dict().items())
    assert isinstance(model.config, PreGatedSwitchTransformersConfig)
