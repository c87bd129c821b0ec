"""One row: the requests, the floors' arithmetic, and what is said where something was not measured."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pregate.engine.trace import Span
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.references import Reference
from pregate.measure.bench.requests import Effort, Requests, greedy
from pregate.measure.bench.row import figures
from pregate.measure.equality import logit_difference
from pregate.measure.request_timing import Timed, TokenClock, time_request

SPEC = RowSpec("m", "float32", 1, "own", "pre_gated", batch=4, prompt_len=8, new_tokens=3, seed=5)
CPU = torch.device("cpu")


def timed(*seconds: float, tokens: list[list[int]] | None = None, spans: list[Span] | None = None) -> Timed:
    return Timed(torch.tensor(tokens or [[0, 1, 2]]), list(seconds), [], spans)


def test_figures_are_medians_with_their_spread() -> None:
    requests = [timed(0.5, 0.6, 0.7), timed(0.2, 0.5, 0.8), timed(0.4, 0.6, 0.8)]
    found = figures(requests, SPEC, None)
    assert found == pytest.approx(
        {
            "ttft_ms": 400.0,
            "tpot_ms": 200.0,
            "tpot_ms_min": 100.0,
            "tpot_ms_max": 300.0,
            "tokens_per_s": 20.0,  # four sequences, a step every 200 ms
            "repeats": 3,
        }
    )


def test_waiting_and_blocks_count_while_decoding_only() -> None:
    spans = [
        Span("wait", "w", 10.0, 90.0),
        Span("wait", "w", 510.0, 530.0),
        Span("wait", "w", 610.0, 620.0),
        Span("layer", "decoder block 0", 10.0, 90.0),
        Span("layer", "decoder block 0", 510.0, 540.0),
        Span("layer", "encoder block 0", 410.0, 490.0),
    ]
    found = figures([timed(0.5, 0.6, 0.7, spans=spans)], SPEC, None)
    assert found["exposed_ms_per_token"] == pytest.approx(15.0)
    assert found["block_ms"] == pytest.approx(30.0)
    assert "exposed_ms_per_token" not in figures([timed(0.5, 0.6)], SPEC, None), "without a trace nothing was seen"


def test_tokens_are_compared_request_by_request_as_far_as_both_go() -> None:
    reference = Reference(torch.tensor([[[0, 1, 2, 3]], [[0, 4, 5, 6]]]))
    same = [timed(0.1, 0.2, tokens=[[0, 1, 2]]), timed(0.1, 0.2, tokens=[[0, 4, 5]])]
    assert figures(same, SPEC, reference)["tokens_equal_resident"] is True
    assert figures(same[::-1], SPEC, reference)["tokens_equal_resident"] is False
    third = timed(0.1, 0.2, tokens=[[9, 9, 9]])
    assert figures([*same, third], SPEC, reference)["tokens_equal_resident"] is True, "the whole model had two"


def test_where_tokens_depart_is_told() -> None:
    reference = Reference(torch.tensor([[[0, 1, 2, 3]], [[0, 4, 5, 6]]]))
    served = [timed(0.1, 0.2, tokens=[[0, 1, 2, 9]]), timed(0.1, 0.2, tokens=[[0, 4, 9, 6]])]
    found = figures(served, SPEC, reference)
    assert found["tokens_equal_resident"] is False
    assert found["tokens_equal_until"] == 1, "two new tokens of the first request, one of the second"
    assert "tokens_equal_until" not in figures([timed(0.1, 0.2, tokens=[[0, 1, 2]])], SPEC, reference)


@pytest.mark.parametrize("at", [8, 9, 10])
def test_new_tokens_are_counted_from_behind_a_prompt(at: int) -> None:
    """A decoder-only model's tokens begin with the prompt, here of eight tokens, not with a start token."""
    tokens = torch.arange(2, 13)
    served = tokens.clone()
    served[at] = 0
    found = figures([timed(0.1, 0.2, tokens=[served.tolist()])], SPEC, Reference(tokens[None, None]))
    assert found["tokens_equal_until"] == at - 8


def test_a_reference_survives_its_file(tmp_path: Any) -> None:
    path = tmp_path / "kept" / "reference.safetensors"
    assert Reference.load(path) is None
    Reference(torch.tensor([[[1, 2]]]), torch.ones(1, 1, 3)).save(path)
    loaded = Reference.load(path)
    assert loaded is not None and loaded.logits is not None
    assert torch.equal(loaded.tokens, torch.tensor([[[1, 2]]])) and torch.equal(loaded.logits, torch.ones(1, 1, 3))
    path.write_bytes(b"damaged")
    assert Reference.load(path) is None


def test_the_change_in_logits() -> None:
    source = torch.tensor([3.0, 4.0])
    found = logit_difference(source + torch.tensor([0.5, 0.0]), source)
    assert found == {"logits_max_abs_diff": 0.5, "logits_rel_diff": pytest.approx(0.1)}
    assert logit_difference(source, None) == {}


def test_requests_differ_by_number_and_repeat_by_seed() -> None:
    requests = Requests(2, 6, 50, seed=1, device=CPU)
    first = requests.prompt(0)["input_ids"]
    assert first.shape == (2, 6) and int(first.min()) >= 2
    assert torch.equal(first, replace(requests).prompt(0)["input_ids"])
    assert not torch.equal(first, requests.prompt(1)["input_ids"])

    def generate(**options: Any) -> torch.Tensor:
        assert options["repetition_penalty"] > 1 and not options["do_sample"] and options["max_new_tokens"] == 4
        for value in options["input_ids"].flatten()[:3]:
            options["streamer"].put(value)
        return options["input_ids"]

    draws = [
        time_request(generate, {**requests.prompt(number), **greedy(4)}, TokenClock(CPU)).tokens for number in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_no_repeat_begins_after_the_time_is_up() -> None:
    def slow(number: int) -> Timed:
        time.sleep(0.02)
        return timed(0.1 * (number + 1), 1.0)

    probed: list[int] = []
    assert len(Effort(repeats=3, warmup=1, max_seconds=60).run(slow, lambda: probed.append(1))) == 3
    assert len(probed) == 4, "before each and after the last"
    assert [t.seconds[0] for t in Effort(repeats=3, warmup=1, max_seconds=0.001).run(slow)] == [0.1]
    assert len(Effort(repeats=50, warmup=1, max_seconds=0.05).run(slow)) < 10


def test_work_between_steps_is_not_timed_and_counts_are_read_with_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the test moves: a step takes 1 s, the work before it 100 s."""
    calls, counter, now = [], iter(range(100, 200)), [50.0]
    monkeypatch.setattr("pregate.measure.request_timing.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def between() -> None:
        calls.append(1)
        now[0] += 100

    def generate(streamer: TokenClock) -> torch.Tensor:
        for _ in range(4):
            streamer.put(torch.tensor([0]))
            now[0] += 1
        return torch.zeros(1, 4)

    served = time_request(generate, {}, TokenClock(CPU, read=lambda: next(counter), between=between))
    assert served.seconds == [1.0, 2.0, 3.0]
    assert served.readings == [100, 101, 102]
    assert len(calls) == 5, "before the request and after every token"
