"""One request of the device-driven engine, timed as a whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pregate.engine.device.device_engine import DeviceEngine
from pregate.measure.device_steps import time_steps
from pregate.measure.request_timing import Timed
from tests.tiny import batch, pregated_model


def test_time_per_token_is_that_of_the_steps_after_the_first() -> None:
    timed = Timed(torch.zeros(1, 5), [0.5, 0.9], [0, 40], None, steps=4)
    assert timed.ttft_ms == 500
    assert timed.tpot_ms == pytest.approx(100)
    assert timed.read_per_step == 10
    assert timed.exposed_ms_per_token is None and timed.block_ms == []


def test_a_request_is_timed_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is made to take 5 ms and the encoder 40; one row needs three experts a step."""
    model = pregated_model(3, 1)
    model.save_pretrained(tmp_path)
    inputs = batch(0, size=1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    greedy = {"repetition_penalty": 1e6, "min_new_tokens": 6, "max_new_tokens": 6}
    with DeviceEngine.open(tmp_path, max_new_tokens=6) as engine:
        step, run = engine.decoder.step, engine.host.run

        def slow(seconds: float, call: Any) -> Any:
            def called(*args: Any, **kwargs: Any) -> Any:
                time.sleep(seconds)
                return call(*args, **kwargs)

            return called

        monkeypatch.setattr(engine._graphs, "_step", slow(0.005, step))
        monkeypatch.setattr(engine.host, "run", slow(0.04, run))
        timed = time_steps(engine, ids, mask, torch.device("cpu"), **greedy)
        again = time_steps(engine, ids, mask, torch.device("cpu"), **greedy)
    assert timed.tpot_ms is not None and timed.tpot_ms >= 5
    assert timed.ttft_ms >= 45
    assert timed.steps == 5
    assert timed.readings == [3 * 8192, 18 * 8192]
    assert timed.distinct == 1.0
    # the encoder's experts were moved by the host and are counted too
    assert timed.counted["misses"] > 18
    assert timed.counted["bytes_moved"] == timed.counted["misses"] * 8192
    assert torch.equal(timed.tokens, model.generate(input_ids=ids, attention_mask=mask, **greedy))
    assert torch.equal(timed.tokens, again.tokens)
