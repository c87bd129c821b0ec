"""One way to load: whatever happened to a checkpoint, the model is the right one or there is one sentence."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from pregate.config import Init, PreGateConfig, UsageError
from pregate.conversion.write import convert
from pregate.engine.engine import OffloadEngine
from pregate.models.families.switch import SwitchFamily
from pregate.models.loading import load_resident, open_model
from tests.models.test_checkpoint import sentence
from tests.tiny import pregated_model, upstream_model

TABLES = (*SwitchFamily.input_tables, SwitchFamily.output_table)
SMALL = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
INPUTS = {
    "input_ids": torch.randint(2, 67, (2, 9), generator=torch.Generator().manual_seed(0)),
    "decoder_input_ids": torch.randint(2, 67, (2, 5), generator=torch.Generator().manual_seed(1)),
}
KINDS = ("tied", "untied", "one table", "pre-gated")
EXPERT = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"
PRE_GATE = "decoder.block.1.layer.2.mlp.pre_gate.classifier.weight"


def undamaged(kind: str) -> Any:
    """`one table`: untied from the head, with one table for both stacks, as every Switch model was before
    transformers 5."""
    if kind == "pre-gated":
        return pregated_model(3, path="reference", **SMALL)
    model = upstream_model(3, **SMALL, tie_word_embeddings=kind == "tied")
    if kind == "one table":
        for stack in (model.encoder, model.decoder):
            stack.embed_tokens.weight.data.copy_(model.shared.weight)
    return model


@cache
def truth(kind: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The config, all tensors and the logits of the undamaged model; the logits are upstream's but for a pre-gated
    one, which upstream has not."""
    model = undamaged(kind)
    with torch.no_grad():
        logits = model(**INPUTS).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.1
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return config, {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits


def write(directory: Path, kind: str, tensors: dict[str, Tensor], form: str = "safetensors", **config: Any) -> str:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**truth(kind)[0], **config}, default=str))
    suffix, save = ("bin", torch.save) if form.startswith("bin") else ("safetensors", save_file)
    stem = "pytorch_model" if suffix == "bin" else "model"
    if not form.endswith("shards"):
        save({name: t.clone() for name, t in tensors.items()}, directory / f"{stem}.{suffix}")
        return str(directory)
    weight_map = {name: f"{stem}-{place % 2}.{suffix}" for place, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, directory / file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(directory)


@torch.no_grad()
def resident_logits(directory: str) -> Tensor:
    model: Any = load_resident(directory, dtype=torch.float32)
    model.set_expert_path("reference")
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(pointers) == len(set(pointers)), "training one parameter would train another"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # matrix products of mapped weights differ in the last bit by alignment
    return model(**INPUTS).logits


def served_logits(directory: str) -> Tensor:
    with OffloadEngine.open(directory, policy="on_demand", tier="dram") as engine:  # type: ignore[arg-type]
        return engine.forward(**INPUTS).logits


def converted_logits(directory: str) -> Tensor:
    """Of what conversion at lookahead 0 makes of it, which is the source model."""
    output = Path(directory).with_name("converted")
    convert(directory, output, PreGateConfig(lookahead=0))
    return resident_logits(str(output))


WAYS: dict[str, Callable[[str], Tensor]] = {
    "resident": resident_logits,
    "served": served_logits,
    "converted": converted_logits,
}


def ways(kind: str) -> list[str]:
    return [way for way in WAYS if way != "converted" or kind != "pre-gated"]


def outcome(directory: str, kind: str, way: str) -> str:
    """`right`, or the sentence of a refusal; fails for anything else."""
    try:
        logits = WAYS[way](directory)
    except UsageError as error:
        return sentence(pytest.ExceptionInfo.from_exception(error))
    expected = truth(kind)[2]
    if way == "served":  # the engine computes its experts in an order of its own
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits, expected), f"{way}: largest difference {(logits - expected).abs().max()}"
    return "right"


DAMAGES = ("drop", "drop table", "prefix all", "prefix one", "rename", "add", "leftover", "reshape", "quantise")
PREFIXED = st.lists(st.sampled_from(["module.", "_orig_mod.", "model."]), min_size=1, max_size=3).map("".join)


def damage(draw: Callable[..., Any], tensors: dict[str, Tensor]) -> str:
    """Do one thing to `tensors`, in place; says which."""
    what, name = draw(st.sampled_from(DAMAGES)), draw(st.sampled_from(sorted(tensors)))
    if what == "drop":
        del tensors[name]
    elif what == "drop table":
        tensors.pop(draw(st.sampled_from(TABLES)), None)
    elif what == "prefix all":
        prefix = draw(PREFIXED)
        for old in list(tensors):
            tensors[prefix + old] = tensors.pop(old)
    elif what == "prefix one":
        tensors[draw(PREFIXED) + name] = tensors.pop(name)
    elif what == "rename":
        tensors[name.replace("weight", "kernel").replace("block", "blocks")] = tensors.pop(name)
    elif what == "add":
        added = draw(st.sampled_from(["teacher.shared.weight", "module.", EXPERT.replace("_2", "_7"), "ema." + name]))
        tensors[added] = torch.ones(3, 2)
    elif what == "leftover":
        tensors[next(iter(SwitchFamily.leftovers))] = torch.ones(8, 3)
    elif what == "reshape":
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    else:
        tensors[name] = (tensors[name] * 10).to(torch.int8)
    return what


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_damage_ends_in_the_right_model_or_in_one_sentence(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    form = data.draw(st.sampled_from(["safetensors", "bin", "safetensors shards", "bin shards"]))
    tensors = dict(truth(kind)[1])
    done = [damage(data.draw, tensors) for _ in range(data.draw(st.integers(0, 2)))]
    if kind == "untied" and sum(table not in tensors for table in TABLES[:3]) > 1:
        return  # nothing tells a model with three tables from one with a single table
    with tempfile.TemporaryDirectory() as scratch:
        directory = write(Path(scratch) / "source", kind, tensors, form)
        outcomes = {way: outcome(directory, kind, way) for way in ways(kind)}
        said = set(outcomes.values())
        assert len(said) == 1, outcomes
        if said != {"right"}:
            with pytest.raises(UsageError) as error:  # the headers say it all
                open_model(directory)
            assert said == {str(error.value)}
    if set(done) <= {"prefix all", "leftover"} or (done == ["drop table"] and kind == "tied"):
        assert said == {"right"}, "nothing is lost"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("kind", ["tied", "pre-gated"])
def test_what_wrappers_put_before_names_is_left_out_and_told(
    tmp_path: Path, kind: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of DistributedDataParallel and torch.compile, which used to train from random weights."""
    directory = write(tmp_path / "source", kind, {prefix + name: t for name, t in truth(kind)[1].items()})
    for way in ways(kind):
        assert outcome(directory, kind, way) == "right"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pregate: ")]
    assert told == [
        f"pregate: {directory} has {prefix} before the names of tensors, as wrapped models have: it is left out."
    ]


@pytest.mark.parametrize("part", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
@pytest.mark.parametrize("before", ["", "module."])
def test_what_wrappers_put_into_names_is_left_out_and_told(
    tmp_path: Path, before: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers that were compiled, sharded or checkpointed one by one."""
    tensors = {before + name.replace(".layer.", f".{part}layer.", 1): t for name, t in truth("tied")[1].items()}
    directory = write(tmp_path / "source", "tied", tensors)
    for way in WAYS:
        assert outcome(directory, "tied", way) == "right"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pregate: ")]
    left = [f"{before} before"] * bool(before) + [f"{part} inside"]
    assert told == [
        f"pregate: {directory} has {what} the names of tensors, as wrapped models have: it is left out."
        for what in left
    ]


def test_names_behind_an_unknown_prefix_are_told(tmp_path: Path) -> None:
    """An adapter's checkpoint, whose layers are all there, under other names."""
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in truth("tied")[1].items()}
    directory = write(tmp_path / "source", "tied", prefixed)
    for way in WAYS:
        assert "named as in a switch_transformers model, but base_model.model." in outcome(directory, "tied", way)


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tensors = truth("tied")[1]
    directory = write(tmp_path / "source", "tied", {**tensors, f"module.{EXPERT}": tensors[EXPERT] + 1})
    for way in WAYS:
        assert f"holds both {EXPERT} and module.{EXPERT}" in outcome(directory, "tied", way)


def without(kind: str, *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in truth(kind)[1].items() if name not in names}


@pytest.mark.parametrize(
    ("kind", "gone"), [("tied", EXPERT), ("pre-gated", PRE_GATE), ("pre-gated", EXPERT), ("untied", "lm_head.weight")]
)
def test_one_missing_tensor_is_named(tmp_path: Path, kind: str, gone: str) -> None:
    directory = write(tmp_path / "source", kind, without(kind, gone))
    for way in ways(kind):
        assert f"lacks {gone}" in outcome(directory, kind, way)


def test_two_different_tables_cannot_fill_a_third(tmp_path: Path) -> None:
    gone = "encoder.embed_tokens.weight"
    directory = write(tmp_path / "source", "untied", without("untied", gone))
    for way in WAYS:
        assert f"lacks {gone}, and shared.weight, decoder.embed_tokens.weight differ" in outcome(
            directory, "untied", way
        )


@pytest.mark.parametrize("form", ["bin", "safetensors", "bin shards"])
def test_an_untied_model_with_one_table_is_the_same_model_everywhere(tmp_path: Path, form: str) -> None:
    """It used to be converted with the table in all places and trained with random ones."""
    gone = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    directory = write(tmp_path / "source", "one table", without("one table", *gone), form)
    for way in WAYS:
        assert outcome(directory, "one table", way) == "right"


@pytest.mark.parametrize("kept", TABLES)
def test_a_tied_table_may_have_any_of_its_names(tmp_path: Path, kept: str) -> None:
    directory = write(tmp_path / "source", "tied", without("tied", *(set(TABLES) - {kept})))
    for way in WAYS:
        assert outcome(directory, "tied", way) == "right"


def test_a_tied_head_with_other_bits_is_served_as_upstream_reads_it(tmp_path: Path) -> None:
    tensors = {**truth("tied")[1], "lm_head.weight": truth("tied")[1]["lm_head.weight"] * 2}
    directory = write(tmp_path / "source", "tied", tensors)
    for way in WAYS.values():
        torch.testing.assert_close(way(directory), truth("tied")[2] * 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("setting", "said", "held"),
    [
        ("num_experts", 4, "5 experts a block"),
        ("num_experts", 6, "5 experts a block"),
        ("num_experts", -1, "5 experts a block"),
        ("num_layers", 2, "4 encoder layers"),
        ("num_decoder_layers", 6, "4 decoder layers"),
    ],
)
def test_a_config_of_another_size_is_told_with_both_numbers(tmp_path: Path, setting: str, said: int, held: str) -> None:
    directory = write(tmp_path / "source", "tied", truth("tied")[1], **{setting: said})
    for way in ("resident", "served", "converted"):
        assert f"says {setting}={said} but its weights hold {held}" in outcome(directory, "tied", way)


@pytest.mark.parametrize("changed", [{"num_experts": "many"}, {"num_experts": 0}, {"d_model": -3}, {"d_ff": None}])
def test_a_config_that_cannot_be_built_ends_in_one_sentence(tmp_path: Path, changed: dict[str, Any]) -> None:
    directory = write(tmp_path / "source", "tied", truth("tied")[1], **changed)
    for way in WAYS:
        assert outcome(directory, "tied", way) != "right"


def test_the_auto_class_refuses_what_it_would_draw_at_random(tmp_path: Path) -> None:
    """A plain `from_pretrained` after `import pregate`."""
    source = write(tmp_path / "source", "tied", truth("tied")[1])
    convert(source, tmp_path / "good", PreGateConfig(lookahead=1))
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "good", output_loading_info=True)
    assert not info["missing_keys"] and torch.isfinite(model(**INPUTS).logits).all()
    for name, change in (("lack", (PRE_GATE, None)), ("hold unknown tensors", (EXPERT, f"{EXPERT}.scale"))):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        gone, new = change
        if new is None:
            del weights[gone]
        else:
            weights[new] = torch.ones(2)
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UsageError, match=f"{name}.*{new or gone}"):
            AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name)


def test_generation_settings_without_effect_are_kept(tmp_path: Path) -> None:
    """Many published models have them. Training used to end in a traceback when it saved the model."""
    directory = write(tmp_path / "source", "tied", truth("tied")[1])
    settings = {"temperature": 0.7, "num_beams": 2, "max_length": 20, "early_stopping": True, "eos_token_id": 1}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    load_resident(directory).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert settings.items() <= saved.items()


# --- the token that the decoder begins with -------------------------------------------------------------------------

STARTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, int | str]] = {
    "its own": ({"decoder_start_token_id": 5}, {"decoder_start_token_id": 5}, 5),
    "of the generation config": ({"decoder_start_token_id": None}, {"decoder_start_token_id": 7}, 7),
    "the padding token": ({"decoder_start_token_id": None, "pad_token_id": 3}, None, 3),
    "the padding token of the generation config": (
        {"decoder_start_token_id": None, "pad_token_id": None},
        {"pad_token_id": 4},
        4,
    ),
    "none": ({"decoder_start_token_id": None, "pad_token_id": None}, {"eos_token_id": 1}, "names no decoder_start"),
    "no id": ({"decoder_start_token_id": 67}, None, "is no id of its vocabulary of 67"),
    "no number": ({"decoder_start_token_id": None}, {"decoder_start_token_id": "<s>"}, "'<s>' as decoder_start"),
}


@pytest.mark.parametrize("case", STARTS)
def test_the_decoder_begins_with_the_same_token_everywhere(tmp_path: Path, case: str) -> None:
    config, generation, expected = STARTS[case]
    directory = write(tmp_path / "source", "tied", truth("tied")[1], **config)
    if generation is not None:
        (tmp_path / "source" / "generation_config.json").write_text(json.dumps(generation))
    if isinstance(expected, str):
        for way in WAYS:
            assert expected in outcome(directory, "tied", way)
        return
    convert(directory, tmp_path / "ahead", PreGateConfig(lookahead=1, init=Init.source))
    assert json.loads((tmp_path / "ahead" / "config.json").read_text())["decoder_start_token_id"] == expected
    for place in (directory, str(tmp_path / "ahead")):
        model: Any = load_resident(place)
        assert model.config.decoder_start_token_id == expected
        assert model.prepare_decoder_input_ids_from_labels(torch.tensor([[9, 9]])).tolist() == [[expected, 9]]
        tokens = model.generate(input_ids=INPUTS["input_ids"], max_new_tokens=3)
        assert tokens[:, 0].tolist() == [expected, expected]
        with OffloadEngine.open(place, tier="dram") as engine:  # type: ignore[arg-type]
            served = engine.generate(input_ids=INPUTS["input_ids"], max_new_tokens=3)
        assert torch.equal(served, tokens)
