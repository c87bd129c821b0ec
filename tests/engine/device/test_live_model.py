"""A model that somebody changes while it is served by the device-driven engine: other gates, other weights, hooks, a
listener. What is served is what the model does now, or it is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.device.sampler_state import StepKind
from pregate.measure.bench.active_experts import forced_experts
from pregate.models.families.switch_router import EmbeddingGate, SwitchGate
from pregate.models.routing import Routing
from tests.engine.device.steps.test_t5 import ATOL, inputs_of
from tests.tiny import pregated_model

STEPS = 6
OPTIONS: dict[str, Any] = {
    "max_new_tokens": STEPS,
    "eos_token_id": None,
    "repetition_penalty": 1e6,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def mlps(model: Any) -> list[Any]:
    return [block.module for block in model.moe_blocks() if block.stack == "decoder"]


def drawn(like: Tensor, seed: int, scale: float) -> nn.Parameter:
    numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * scale
    return nn.Parameter(numbers.to(like.dtype), requires_grad=False)


def other_weights(model: Any) -> None:
    """Another parameter in every gate of the decoder."""
    for seed, gate in enumerate(m for m in model.decoder.modules() if isinstance(m, SwitchGate)):
        gate.classifier.weight = drawn(gate.classifier.weight, seed, 0.7)


def other_data(model: Any) -> None:
    """Other memory behind the same parameters."""
    for seed, gate in enumerate(m for m in model.decoder.modules() if isinstance(m, SwitchGate)):
        gate.classifier.weight.data = drawn(gate.classifier.weight, seed, 0.7).data


def other_gates(model: Any) -> None:
    """Whole gates taken out and others put in their seats."""
    for seed, mlp in enumerate(mlps(model)):
        for name in ("router", "pre_gate"):
            if getattr(mlp, name) is not None:
                gate = SwitchGate(model.config).eval()
                gate.classifier.weight = drawn(gate.classifier.weight, seed, 0.7)
                setattr(mlp, name, gate)


def other_forward(model: Any) -> None:
    """The expert after the chosen one, from whatever gate the model calls."""
    called = [mlp.pre_gate for mlp in mlps(model) if mlp.pre_gate is not None]
    called += list(model.decoder.entry_gates.values())
    for gate in called:
        kind: Any = EmbeddingGate if isinstance(gate, EmbeddingGate) else SwitchGate
        forward = lambda hidden, gate=gate, kind=kind: next_expert(kind.forward(gate, hidden))  # noqa: E731
        setattr(gate, "forward", forward)  # noqa: B010


def hooks(model: Any) -> None:
    """The same by hooks, which may give another result than the module's."""
    called = [mlp.pre_gate for mlp in mlps(model) if mlp.pre_gate is not None]
    for gate in [*called, *model.decoder.entry_gates.values()]:
        gate.register_forward_hook(lambda _, __, routing: next_expert(routing))


def next_expert(routing: Routing) -> Routing:
    return routing._replace(expert_ids_BTK=(routing.expert_ids_BTK + 1) % 5)


def wrapped_classifiers(model: Any) -> None:
    """As an adapter wraps them: what the classifier gives, and something added."""

    class Adapted(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) + torch.arange(5.0) * 0.3

    for gate in (m for m in model.decoder.modules() if isinstance(m, SwitchGate)):
        adapted = Adapted(gate.classifier.in_features, 5, bias=False)
        adapted.weight = gate.classifier.weight
        gate.classifier = adapted


def other_attention(model: Any) -> None:
    """Keys of one layer, and the position bias in place."""
    attention = model.decoder.block[0].layer[0].SelfAttention
    attention.k.weight = drawn(attention.k.weight, 3, 0.3)
    with torch.no_grad():
        attention.relative_attention_bias.weight += 1.0 + torch.arange(3)


CHANGES = [other_weights, other_data, other_gates, other_forward, hooks, other_attention]


@pytest.fixture(params=["own", "embedding"], scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    directory = tmp_path_factory.mktemp(request.param)
    model = pregated_model(1, 1, entry=request.param)
    model.save_pretrained(directory)
    return str(directory), model


def served_by(generate: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    found = generate(**inputs_of(2, 2), **OPTIONS)
    return found.sequences, torch.stack(found.logits)


def assert_close(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], wanted[0]), f"engine:\n{got[0]}\nresident model:\n{wanted[0]}"
    assert torch.isfinite(got[1]).all()
    assert torch.allclose(got[1], wanted[1], rtol=0, atol=ATOL[torch.float32]), (got[1] - wanted[1]).abs().max()


class Replay:
    """As a captured graph: the step as it was at the capture, whatever has become of the model since."""

    captured = 0

    def __init__(self, step: Callable[[StepKind], None], kind: StepKind, steps: int) -> None:
        Replay.captured += 1
        self._work = (step, kind, steps)

    def replay(self) -> None:
        step, kind, steps = self._work
        for _ in range(steps):
            step(kind)


@pytest.fixture
def engine(saved: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceEngine]:
    """Captures are counted though there is no GPU."""
    with DeviceEngine.open(saved[0], batch=2, max_source_len=11, max_new_tokens=STEPS) as opened:
        graphs = opened._graphs
        monkeypatch.setattr(graphs, "_device", torch.device("cuda"))
        monkeypatch.setattr(graphs, "_capture", lambda kind, steps: Replay(graphs._step, kind, steps))
        monkeypatch.setattr(Replay, "captured", 0)
        yield opened


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_counts_from_the_next_request(
    saved: tuple[str, Any], engine: DeviceEngine, change: Callable[[Any], None]
) -> None:
    model = copy.deepcopy(saved[1])
    before = served_by(model.generate)
    for _ in range(2):
        assert_close(served_by(engine.generate), before)
    assert Replay.captured == 2, "one step and several, once"
    change(model)
    change(engine.model)
    after = served_by(model.generate)
    assert not torch.allclose(after[1], before[1], atol=1e-3), "the change changes nothing, so the test says nothing"
    for _ in range(2):
        assert_close(served_by(engine.generate), after)
    assert Replay.captured == 4, "what was captured before the change was replayed"
    assert engine.counters.bytes_moved > 0


def test_a_wrapped_classifier_is_asked(saved: tuple[str, Any], engine: DeviceEngine) -> None:
    before = served_by(engine.generate)
    wrapped_classifiers(engine.model)
    gate = next(m for m in engine.model.decoder.modules() if isinstance(m, SwitchGate))
    states = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))
    asked = SwitchGate.score(gate, states)
    assert torch.equal(gate.score(states), asked)
    served_by(engine.generate)
    assert Replay.captured == 4
    assert torch.isfinite(before[1]).all()


def test_forced_experts_reach_what_was_captured_and_leave_it_again(
    saved: tuple[str, Any], engine: DeviceEngine
) -> None:
    model = copy.deepcopy(saved[1])
    plain = served_by(model.generate)
    assert_close(served_by(engine.generate), plain)
    with forced_experts(model, 2), forced_experts(engine.model, 2):
        forced = served_by(model.generate)
        assert not torch.allclose(forced[1], plain[1], atol=1e-3)
        assert_close(served_by(engine.generate), forced)
    assert_close(served_by(engine.generate), plain)
    assert Replay.captured == 6


def test_weights_written_in_place_need_no_new_capture(saved: tuple[str, Any], engine: DeviceEngine) -> None:
    model = copy.deepcopy(saved[1])
    before = served_by(engine.generate)
    for each in (model, engine.model):
        for gate in (m for m in each.decoder.modules() if isinstance(m, SwitchGate)):
            with torch.no_grad():
                gate.classifier.weight.neg_()
    after = served_by(model.generate)
    assert not torch.allclose(after[1], before[1], atol=1e-3)
    assert_close(served_by(engine.generate), after)
    assert Replay.captured == 2


def test_a_listener_is_refused_because_steps_tell_it_nothing(saved: tuple[str, Any], engine: DeviceEngine) -> None:
    wanted = served_by(saved[1].generate)
    assert_close(served_by(engine.generate), wanted)
    told: list[Any] = []
    engine.model.set_listener(lambda *route: told.append(route))
    with pytest.raises(
        RuntimeError, match=r"has a listener, .*: take it away with set_listener\(None\), or serve with"
    ):
        served_by(engine.generate)
    engine.model.set_listener(None)
    assert_close(served_by(engine.generate), wanted)
