"""A model whose modules are hooked, wrapped or replaced by the field's tools computes what upstream's does under them.

The tools act when a module is called, so a weight that is read beside its module is a placeholder or half of the story.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from pregate.models.linear import is_plain
from pregate.models.loading import load_resident
from tests.test_made_up_family import model as made_up_model
from tests.tiny import batch, pregated_model, upstream_model

peft = pytest.importorskip("peft")  # not on every machine that runs the GPU tests
few = settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """A conventional upstream checkpoint in each dtype."""
    places = {}
    for dtype in (torch.float32, torch.bfloat16):
        places[dtype] = tmp_path_factory.mktemp(str(dtype).removeprefix("torch."))
        upstream_model(3).to(dtype).save_pretrained(places[dtype])
    return places


@pytest.fixture(scope="module")
def pregated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pregated")
    pregated_model(4, entry="embedding").save_pretrained(place)
    return place


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found = model(**batch(1), use_cache=False).logits
    assert found.isfinite().all()
    return found


@pytest.mark.parametrize("tool", ["cpu_offload", "disk_offload", "device_map"])
def test_offloaded_weights_are_found(pregated: Path, tmp_path: Path, tool: str) -> None:
    expected = logits(load_resident(pregated))
    if tool == "device_map":
        half = sum(parameter.nbytes for parameter in load_resident(pregated).parameters()) // 2
        model = AutoModelForSeq2SeqLM.from_pretrained(
            pregated, device_map="auto", max_memory={"cpu": half}, offload_folder=tmp_path
        ).eval()
    else:
        model = load_resident(pregated)
        cpu_offload(model, torch.device("cpu")) if tool == "cpu_offload" else disk_offload(model, str(tmp_path))
    assert sum(parameter.is_meta for parameter in model.parameters()) > 10, "nothing was offloaded"
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)  # alignment changes the last digit
    inputs = batch(1)
    loss = model(**inputs, loss_only=True, use_cache=False).loss
    plain = load_resident(pregated)(**inputs, loss_only=True, use_cache=False).loss
    torch.testing.assert_close(loss, plain)
    assert torch.equal(
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=5),
        load_resident(pregated).generate(input_ids=inputs["input_ids"], max_new_tokens=5),
    )


def quantised(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def pruned(model: nn.Module) -> nn.Module:
    """Every linear layer loses the smaller half of its weights, by a parametrization."""

    class Prune(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (weight.abs() >= weight.abs().median())

    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", Prune(), unsafe=True)
    return model


def hooked(model: nn.Module) -> nn.Module:
    """Every linear layer's output is rounded by a forward hook."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, output: (output * 8).round() / 8)
    return model


def adapted(model: nn.Module, targets: Sequence[str] = ("q", "v", "wi", "wo", "classifier", "lm_head")) -> nn.Module:
    """LoRA, not at its neutral start: by default on attention, experts, gates and head."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), lora_alpha=16))
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted((n, p) for n, p in wrapped.named_parameters() if "lora_" in n):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return wrapped


def offloaded(model: nn.Module) -> nn.Module:
    cpu_offload(model, torch.device("cpu"))
    return model


TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {
    tool.__name__: tool for tool in (quantised, pruned, hooked, adapted, offloaded)
}


@few
@given(
    tool=st.sampled_from(sorted(TOOLS)),
    then=st.sampled_from([None, "hooked", "offloaded"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_lookahead_0_is_upstream_under_the_same_tool(
    sources: dict[torch.dtype, Path], tool: str, then: str | None, dtype: torch.dtype
) -> None:
    if tool == "quantised":
        dtype = torch.float32  # all that dynamic quantisation knows
        then = None if then == "offloaded" else then
    found = []
    for model in (
        AutoModelForSeq2SeqLM.from_pretrained(sources[dtype], dtype=dtype),
        load_resident(sources[dtype], dtype=dtype),
    ):
        plain = logits(model)
        if hasattr(model, "set_expert_path"):
            model.set_expert_path("reference")
        changed = TOOLS[tool](model.eval())
        found.append(logits(TOOLS[then](changed) if then and then != tool else changed))
    assert torch.equal(found[1], found[0]), (tool, then, dtype, (found[1] - found[0]).abs().max())
    if {tool, then} - {"offloaded", None}:
        assert not torch.allclose(found[1], plain, atol=1e-2), "the tool changed nothing"


def test_adapters_on_gates_are_those_that_merging_gives(pregated: Path) -> None:
    """Without the head, which shares its weight with the embeddings: merging changes those as well."""
    plain = logits(load_resident(pregated))
    model: Any = adapted(load_resident(pregated), ["q", "wo", "classifier"])
    wrapped = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert any("pre_gate" in n for n in wrapped) and any("entry_gates" in n for n in wrapped), wrapped
    through = logits(model)
    torch.testing.assert_close(through, logits(model.merge_and_unload()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(through, plain, atol=1e-2)


def test_adapters_on_gates_and_head_learn(pregated: Path) -> None:
    inputs = batch(1)
    model: Any = adapted(load_resident(pregated))
    loss = model(**inputs, loss_only=True, use_cache=False).loss
    logits_NV = model(**inputs, use_cache=False).logits[inputs["labels"] != -100]
    by_hand = nn.functional.cross_entropy(logits_NV, inputs["labels"][inputs["labels"] != -100], reduction="sum")
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    for part in ("lm_head", "pre_gate", "entry_gates"):
        learns = [p.grad for n, p in model.named_parameters() if part in n and "lora_B" in n]
        assert learns and all(grad is not None and grad.isfinite().all() for grad in learns), part
        assert any(grad.abs().sum() > 0 for grad in learns), part


@pytest.mark.parametrize("gate", ["router", "pre_gate"])
def test_a_gate_that_is_replaced_as_a_whole_decides(gate: str) -> None:
    """`modules_to_save` trains a copy of a whole gate: the copy routes, not the original beside it."""
    model: Any = peft.get_peft_model(pregated_model(4), peft.LoraConfig(target_modules=["q"], modules_to_save=[gate]))
    before = logits(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data = -parameter.data
    assert not torch.allclose(logits(model), before, atol=1e-2)
    model(**batch(1), use_cache=False).loss.backward()
    copies = [p.grad for n, p in model.named_parameters() if "modules_to_save" in n]
    assert copies and all(grad is not None and grad.abs().sum() > 0 for grad in copies)


@pytest.mark.parametrize(("lookahead", "entry"), [(0, "own"), (1, "own"), (1, "embedding")])
def test_every_module_that_holds_a_weight_is_called(lookahead: int, entry: str) -> None:
    """Gates as wholes included: whatever a tool hangs on one of them acts."""
    model, called = pregated_model(0, lookahead=lookahead, entry=entry), set()
    owners = {
        name: module
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False)) or name.endswith(("router", "pre_gate"))
    }
    for name, module in owners.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    logits(model)
    silent = {name for name in set(owners) - called if ".expert_" not in name}  # an expert may have had no token
    assert len(called) > 80 and silent <= {"shared"}, silent


def test_what_counts_as_a_plain_layer() -> None:
    layer = nn.Linear(3, 2)
    assert is_plain(layer)
    assert not is_plain(nn.LayerNorm(3))
    assert not is_plain(type("Scaled", (nn.Linear,), {})(3, 2))
    hook = layer.register_forward_pre_hook(lambda *_: None)
    assert not is_plain(layer)
    hook.remove()
    assert is_plain(layer)
    layer.compile(backend="eager")
    assert not is_plain(layer)


@pytest.mark.parametrize("make", [pregated_model, made_up_model], ids=["switch", "decoder_only"])
def test_the_trainer_accumulates_gradients_to_those_of_one_batch(make: Callable[[], Any], tmp_path: Path) -> None:
    """Of examples of one length, so that the mean of means is the mean."""
    whole = batch(7, size=4, padded=False)
    if make is made_up_model:
        whole["labels"] = whole["input_ids"]
    rows = [{name: tensor[row] for name, tensor in whole.items()} for row in range(4)]
    logged = {}
    for size, accumulated in ((4, 1), (1, 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(make(), arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train()
        logged[size] = trainer.state.log_history[0]
    AcceleratorState._reset_state(reset_partial_state=True)  # of this process, which other tests train in
    for name in ("loss", "grad_norm"):
        assert logged[4][name] > 0 and logged[1][name] == pytest.approx(logged[4][name], rel=1e-3), name
