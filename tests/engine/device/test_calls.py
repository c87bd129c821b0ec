"""Calls in an order, from a thread or of a size that the device-driven engine cannot serve: one clear error, and the
next request is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import CacheRule, Policy, UsageError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.device.sampler_state import Sampling
from pregate.engine.engine import OffloadEngine
from tests.engine.device.steps.test_t5 import inputs_of
from tests.engine.serving import ClosedBehind, Served

pytestmark = pytest.mark.timeout(300)
NEW = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "repetition_penalty": 1e6}


@pytest.fixture(params=["gpu_only", "pre_gated"])
def engine(served: Served, request: pytest.FixtureRequest) -> Any:
    with DeviceEngine.open(
        served.directory, batch=2, max_source_len=11, max_new_tokens=NEW, policy=request.param, cache=CacheRule.lru
    ) as opened:
        yield opened


def prefill(engine: DeviceEngine) -> None:
    inputs = inputs_of(3, 2)
    engine.prefill(inputs["input_ids"], inputs["attention_mask"], Sampling(repetition_penalty=1e6))


def assert_generates(engine: DeviceEngine, served: Served) -> None:
    inputs = inputs_of(5, 2)
    wanted = served.model.generate(**inputs, **OPTIONS)
    got = engine.generate(**inputs, **OPTIONS)
    assert torch.equal(got, wanted), f"engine:\n{got}\nresident model:\n{wanted}"


def test_decoding_goes_as_far_as_the_engine_was_opened_for(engine: DeviceEngine, served: Served) -> None:
    """Steps in two parts, with a call of the host between them, are those of one request."""
    inputs = inputs_of(3, 2)
    wanted = served.model.generate(**inputs, **OPTIONS)
    prefill(engine)
    engine.decode(0)
    engine.decode(NEW - 1)
    with pytest.raises(UsageError, match=r"2 more tokens .* room for 1 of the 4 .* ask for 0 to 1, or open it with a"):
        engine.decode(2)
    counted = engine.counters
    assert counted.hits + counted.misses > 0 or engine.policy is Policy.gpu_only  # which counts nothing
    engine.forward(**inputs, decoder_input_ids=wanted[:, :2])
    assert (engine.counters.hits, engine.counters.misses) == (counted.hits, counted.misses)
    engine.decode_one_token()
    assert torch.equal(engine.tokens(), wanted)
    for too_many in (1, -1, -3):
        with pytest.raises(UsageError, match=rf"{too_many} more tokens are asked for, .* ask for 0 to 0, or open it"):
            engine.decode(too_many)
    assert torch.equal(engine.tokens(), wanted), "what was refused has changed the tokens"
    assert_generates(engine, served)


def test_there_is_nothing_to_decode_without_a_request(engine: DeviceEngine, served: Served) -> None:
    """Before the first one, after one that was refused, and after a step that was cut short."""

    def refused() -> None:
        for steps in (0, 1):
            with pytest.raises(RuntimeError, match="no request to decode: begin one with prefill"):
                engine.decode(steps)

    refused()
    prefill(engine)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.model.encoder, "forward", interrupt)
        prefill(engine)
    refused()
    prefill(engine)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine._experts, "run", interrupt)
        engine.decode_one_token()
    refused()
    assert_generates(engine, served)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_closed_engine_says_so(engine: DeviceEngine) -> None:
    prefill(engine)
    engine.close()
    inputs = inputs_of(3, 2)
    calls: list[Callable[[], Any]] = [
        lambda: engine.generate(**inputs),
        lambda: engine.generate(**inputs, num_beams=2),
        lambda: engine.forward(**inputs, decoder_input_ids=inputs["input_ids"][:, :2]),
        lambda: prefill(engine),
        lambda: engine.decode(1),
        lambda: engine.decode(0),
        engine.decode_one_token,
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="closed: open it again"):
            call()
    engine.close()


def test_closing_waits_for_another_threads_request(engine: DeviceEngine, served: Served) -> None:
    behind, got = ClosedBehind(), []
    inputs = inputs_of(3, 2)
    wanted = served.model.generate(**inputs, **OPTIONS)
    run = engine._experts.run

    def slow(*args: Any) -> Tensor:
        behind.wait()
        return run(*args)

    engine._experts.run = slow  # type: ignore[method-assign]
    behind.run(lambda: got.append(engine.generate(**inputs, **OPTIONS)), engine.close)
    assert torch.equal(got[0], wanted)
    with pytest.raises(RuntimeError, match="closed: open it again"):
        engine.generate(**inputs)


def test_a_request_cannot_be_served_or_closed_from_within_another(engine: DeviceEngine, served: Served) -> None:
    inputs = inputs_of(3, 2)
    for call in (engine.close, lambda: engine.generate(**inputs), lambda: engine.decode(1), lambda: prefill(engine)):
        hook = engine.model.encoder.block[2].register_forward_hook(lambda *_, call=call: call())
        with pytest.raises(RuntimeError, match="is serving a request: call it again, or close it, when"):
            engine.generate(**inputs, **OPTIONS)
        hook.remove()
        assert_generates(engine, served)


@pytest.mark.parametrize("drive", ["host", "device"])
def test_the_engines_gpu_is_the_current_one_while_it_serves(
    served: Served, drive: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels in Triton start on the current device, wherever their tensors are."""
    current, seen = [torch.device("cuda", 0)], []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        try:
            yield
        finally:
            current.pop()

    def where(*_: Any) -> None:
        seen.append(current[-1])

    inputs = inputs_of(5, 2)
    with OffloadEngine.open(served.directory, drive=drive, batch=2, max_new_tokens=NEW) as engine:
        engine.model.encoder.register_forward_pre_hook(where)
        engine.forward(**inputs, decoder_input_ids=inputs["input_ids"])
        assert seen == [current[0]], "on a CPU there is nothing to change"
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(engine, "_device", torch.device("cuda", 1))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
        engine.forward(**inputs, decoder_input_ids=inputs["input_ids"])
        engine.generate(**inputs, **OPTIONS)
        assert seen[1:] == [torch.device("cuda", 1)] * 2 and current == [torch.device("cuda", 0)]
        with pytest.raises(ValueError):
            engine.forward(nonsense=1)
        assert current == [torch.device("cuda", 0)]
