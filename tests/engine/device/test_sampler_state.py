"""The choice of the next token, against Hugging Face's processors and against the distribution it should draw from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from pregate.engine.device.sampler_state import Sampler, Sampling, StepKind

CPU = torch.device("cpu")


def sampler(sampling: Sampling, batch: int = 1, length: int = 12, vocab: int = 7, rows: int | None = None) -> Sampler:
    made = Sampler(batch, length, vocab, CPU)
    made.begin(sampling, batch if rows is None else rows)
    return made


def drawn(sampling: Sampling, logits_V: Tensor, number: int) -> Tensor:
    """Counts (V,) of the tokens that `number` rows draw in one step."""
    made = sampler(sampling, batch=number, length=2, vocab=len(logits_V))
    made.choose(logits_V.expand(number, -1), sampling.kind)
    return torch.bincount(made.token_B, minlength=len(logits_V))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_samples_are_drawn_from_the_softmax(temperature: float) -> None:
    """Chi-square over 20,000 draws: 99.99 % of right samplers stay below 27.9 with 6 degrees of freedom."""
    torch.manual_seed(0)
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5])
    number = 20_000
    expected_V = torch.softmax(logits_V / temperature, -1) * number
    found_V = drawn(Sampling(sample=True, temperature=temperature), logits_V, number)
    chi_square = float(((found_V - expected_V) ** 2 / expected_V).sum())
    assert chi_square < 27.9, f"{chi_square}: {found_V.tolist()} for {expected_V.tolist()}"


def test_the_test_above_tells_temperatures_apart() -> None:
    torch.manual_seed(0)
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5])
    expected_V = torch.softmax(logits_V, -1) * 20_000
    found_V = drawn(Sampling(sample=True, temperature=1.1), logits_V, 20_000)
    assert float(((found_V - expected_V) ** 2 / expected_V).sum()) > 27.9


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(1))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made = sampler(Sampling(sample=True), batch=5, length=9, vocab=50)
        for _ in range(8):
            made.choose(logits_V.expand(5, -1), StepKind(sample=True))
        found.append(made.tokens_BT.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_has_no_probability_is_never_drawn() -> None:
    torch.manual_seed(0)
    logits_V = torch.tensor([1.0, -torch.inf, 3.0])
    assert drawn(Sampling(sample=True, temperature=100.0), logits_V, 5000)[1] == 0


@pytest.mark.parametrize("penalty", [1.0, 1.3, 1e6])
@pytest.mark.parametrize("least", [0, 3])
def test_greedy_follows_hugging_faces_processors(penalty: float, least: int) -> None:
    """Scores of both signs, over steps in which tokens come again, and an end that is forbidden at first."""
    eos, steps, rows = 4, 9, 6
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1.0 else [])
    processors.append(MinNewTokensLengthLogitsProcessor(1, least, eos, device="cpu"))
    sampling = Sampling(repetition_penalty=penalty, min_new_tokens=least, start=2, pad=0, eos=(eos,))
    made = sampler(sampling, batch=rows, length=steps + 1)
    draw = torch.Generator().manual_seed(0)
    wanted_BT = torch.full((rows, 1), 2)
    for step in range(steps):
        logits_BV = torch.randn(rows, 7, generator=draw)
        logits_BV[:, eos] += 1.0
        scores_BV = processors(wanted_BT, logits_BV.clone())
        live_B = ~(wanted_BT[:, 1:] == eos).any(1)
        chosen_B = torch.where(live_B, scores_BV.argmax(-1), 0)
        wanted_BT = torch.cat([wanted_BT, chosen_B[:, None]], 1)
        made.choose(logits_BV, sampling.kind)
        assert torch.equal(made.logits_BV, logits_BV), "the logits kept are those before any processor"
        assert torch.equal(made.tokens_BT[:, : step + 2], wanted_BT), f"{made.tokens_BT}\n{wanted_BT}"
        assert torch.equal(made.live_B, ~(wanted_BT[:, 1:] == eos).any(1))
        assert torch.equal(made.token_B, wanted_BT[:, -1])
    assert not made.live_B.any(), "no row ended, so the test said nothing"
    if least:
        assert not (wanted_BT[:, 1 : least + 1] == eos).any()


def test_rows_beyond_the_request_are_padding() -> None:
    made = sampler(Sampling(start=3, pad=5), batch=4, rows=2)
    made.choose(torch.eye(4, 7), StepKind())
    assert made.tokens_BT[:, :2].tolist() == [[3, 0], [3, 1], [3, 5], [3, 5]]
    assert made.live_B.tolist() == [True, True, False, False]


def test_a_new_request_forgets_the_last_one() -> None:
    sampling = Sampling(repetition_penalty=1e6, eos=(1,), min_new_tokens=2, temperature=3.0)
    made = sampler(sampling)
    for _ in range(4):
        made.choose(torch.arange(7.0)[None], sampling.kind)
    made.begin(Sampling(pad=6), 1)
    fresh = Sampler(1, 12, 7, CPU)
    fresh.begin(Sampling(pad=6), 1)
    kept = {"logits_BV"}
    for name, tensor in vars(made).items():
        assert name in kept or torch.equal(tensor, vars(fresh)[name]), name


def test_a_prompt_counts_as_seen_but_its_padding_does_not() -> None:
    """As Hugging Face's penalty reads a prompt that is padded on the left: the second row, with the token 5."""
    ids, mask = torch.tensor([[5, 2, 3], [5, 5, 4]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    made = Sampler(3, 4, 7, CPU)
    made.begin(Sampling(repetition_penalty=2.0, pad=6), 2, (ids, mask))
    assert made.token_B.tolist() == [3, 4, 0] and made.live_B.tolist() == [True, True, False]
    logits = torch.tensor([0.0, 0.0, 3.0, 3.0, 3.0, 4.0, 2.5]).expand(3, -1)
    processor = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.tensor([0, 2]))
    wanted = processor(ids, logits[:2].clone()).argmax(-1).tolist()
    made.choose(logits, StepKind(penalise=True))
    assert made.token_B.tolist() == [*wanted, 6] and wanted == [4, 5]
    assert made.tokens_BT[:, :2].tolist() == [[3, 4], [4, 5], [0, 6]]


def test_tensors_stay_where_they_are() -> None:
    """A graph has their addresses for good."""
    sampling = Sampling(sample=True, repetition_penalty=2.0, eos=(1,))
    made = sampler(sampling, batch=3)
    before = {name: tensor.data_ptr() for name, tensor in vars(made).items()}
    for _ in range(2):
        made.begin(sampling, 2)
        made.choose(torch.randn(3, 7), sampling.kind)
    assert {name: tensor.data_ptr() for name, tensor in vars(made).items()} == before
    assert made.num_bytes == sum(tensor.nbytes for tensor in vars(made).values())
