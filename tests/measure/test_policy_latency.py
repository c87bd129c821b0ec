"""The clock and the records of one policy: what is counted, and what is left out when it was not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pregate.config import Policy
from pregate.engine.engine import OffloadEngine
from pregate.engine.trace import Span
from pregate.measure.policy_latency import BenchRequest, measure_policy, resident_answers
from pregate.measure.request_timing import TokenClock
from pregate.measure.timeline import _without
from pregate.system.memory import PeakMemory
from tests.tiny import batch, pregated_model


def test_the_clock_skips_the_start_token() -> None:
    clock = TokenClock(torch.device("cpu"))
    for _ in range(4):
        clock.put(torch.tensor([0]))
    assert len(clock.seconds) == 3
    assert clock.seconds == sorted(clock.seconds)


def test_a_policy_record_is_complete_and_honest(tmp_path: Path) -> None:
    model = pregated_model(2, 1)
    model.save_pretrained(tmp_path)
    prompts = [row[None] for row in batch(1, size=2, padded=False)["input_ids"]]
    request = BenchRequest(prompts, new_tokens=5, repeats=2)
    expected = resident_answers(model, request)
    assert all(tokens.shape == (1, 6) for tokens in expected.tokens)
    assert all(logits.shape == (1, 5, 67) for logits in expected.logits)
    cpu = torch.device("cpu")
    record, timeline = measure_policy(
        lambda: OffloadEngine.open(tmp_path, policy=Policy.pre_gated), request, cpu, expected
    )
    assert record["tokens_equal_resident"] is record["logits_equal_resident"] is record["logits_finite"] is True
    assert record["logits_max_diff"] < 1e-5
    assert record["tokens_per_s"] > 0 and record["ttft_ms"] > 0 and record["block_ms"] > 0
    # one pass over two prompts: each moves at least one expert for each of three blocks and five steps
    assert record["misses"] >= 2 * 3 * 5
    assert record["bytes_moved"] == record["misses"] * 8192
    assert {span["lane"] for span in timeline} <= {"compute", "transfer", "wait"}
    assert timeline

    wrong = replace(expected, tokens=[tokens.flip(1) for tokens in expected.tokens])
    record, _ = measure_policy(lambda: OffloadEngine.open(tmp_path), request, cpu, wrong)
    assert record["tokens_equal_resident"] is False


def test_one_token_has_no_time_per_further_token(tmp_path: Path) -> None:
    model = pregated_model(2, 1)
    model.save_pretrained(tmp_path)
    request = BenchRequest([batch(1, size=1, padded=False)["input_ids"]], new_tokens=1, repeats=1)
    record, _ = measure_policy(
        lambda: OffloadEngine.open(tmp_path), request, torch.device("cpu"), resident_answers(model, request)
    )
    assert "tpot_ms" not in record and "block_ms" not in record and "exposed_ms_per_token" not in record


def test_waiting_is_not_computing() -> None:
    layer = Span("layer", "decoder block 0", 10.0, 20.0)
    waits = [Span("wait", "w", 12.0, 15.0), Span("wait", "w", 30.0, 31.0)]
    assert [(s.start_ms, s.end_ms) for s in _without(layer, waits)] == [(10.0, 12.0), (15.0, 20.0)]


def test_peak_memory_sees_a_large_allocation_and_forgets_it() -> None:
    with PeakMemory(torch.device("cpu")) as first:
        torch.ones(8_000_000)
    with PeakMemory(torch.device("cpu")) as second:
        torch.ones(10)
    if first.num_bytes is None:  # a kernel that does not let the mark be reset
        pytest.skip("this kernel does not let the mark be reset")
    assert 30e6 < first.num_bytes < 60e6
    assert second.num_bytes is not None and second.num_bytes < 10e6


def test_what_is_left_out_of_a_peak_does_not_count() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(2_000_000)
        with peak.left_out():
            torch.ones(16_000_000)
        torch.ones(4_000_000)
    if peak.num_bytes is None:
        pytest.skip("this kernel does not let the mark be reset")
    assert 14e6 < peak.num_bytes < 50e6, "16 MB, not 64 MB"
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(16_000_000)
        with peak.left_out():
            torch.ones(10)
    assert peak.num_bytes is not None and peak.num_bytes > 60e6, "what came before stays"
