"""The clock and the records of one policy: what is counted, and what is left out when it was not measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pregate.config import Policy
from pregate.engine.engine import OffloadEngine
from pregate.measure.policy_latency import BenchRequest, measure_policy, resident_answers
from pregate.measure.request_timing import TokenClock
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
