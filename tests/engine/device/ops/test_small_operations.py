"""The small kernels of a decoding step hold to their references: norm, gate, wanted slabs, attention, next token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pregate.engine.device.ops.attention import (
    NUM_WARPS,
    TILE,
    attention_kernel,
    cross_attention,
    launch_cross_attention,
    launch_self_attention,
    self_attention,
)
from pregate.engine.device.ops.first_choice import first_choice, launch_first_choice
from pregate.engine.device.ops.gate_logits import gate_logits, launch_gate_logits
from pregate.engine.device.ops.next_tokens import (
    SPLITS,
    best_kernel,
    choose_kernel,
    choose_tokens,
    launch_choose_tokens,
)
from pregate.engine.device.ops.residual_and_norm import add_norm, launch_add_norm, launch_norm, norm
from pregate.engine.device.ops.want_slabs import launch_want_slabs, want_slabs
from pregate.engine.device.sampler_state import Sampler, Sampling, StepKind

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Within the roundings of the dtype, and none of it left out."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    bound = CLOSE[expected.dtype]
    torch.testing.assert_close(got.cpu().float(), expected.float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 33, 768])
@pytest.mark.parametrize(("adds", "factor"), [(False, 1.0), (True, 1.0), (True, 0.0361)])
def test_norm(kernel_device: str, dtype: torch.dtype, width: int, adds: bool, factor: float) -> None:
    hidden, weight = random(3, 1, width, seed=0, dtype=dtype), random(width, seed=1, dtype=dtype)
    moved = hidden.to(kernel_device), weight.to(kernel_device)
    if not adds:
        for rounds_last in (False, True):
            got = launch_norm(*moved, 1e-6, factor, rounds_last)
            expected = norm.reference(hidden, weight, 1e-6, factor, rounds_last)
            assert_close(got, expected)
            # a step of a rounding more or less would move every third number
            assert dtype is torch.float32 or (got.cpu() == expected).float().mean() > 0.95
        return
    added = random(3, 1, width, seed=2, dtype=dtype)
    expected = add_norm.reference(hidden, added, weight, 1e-6, factor)
    got = launch_add_norm(moved[0], added.to(kernel_device), moved[1], 1e-6, factor)
    assert torch.equal(got[0].cpu(), expected[0]), "the sum is exact"
    assert_close(got[1], expected[1])


def test_the_norm_of_tiny_and_large_rows(kernel_device: str) -> None:
    for scale in (1e-4, 1e4):
        hidden, weight = random(2, 1, 48, seed=3) * scale, torch.ones(48)
        got = launch_norm(hidden.to(kernel_device), weight.to(kernel_device), 1e-6, 1.0)
        assert_close(got, norm.reference(hidden, weight, 1e-6, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routed", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_experts", "width", "biased"), [(2, 24, False), (8, 768, False), (61, 33, True)])
def test_gate_logits(
    kernel_device: str, dtype: torch.dtype, routed: torch.dtype, num_experts: int, width: int, biased: bool
) -> None:
    hidden = random(3, 1, width, seed=0, dtype=dtype)
    weight = (random(num_experts, width, seed=1) / width**0.5).to(routed)
    bias = random(num_experts, seed=2, dtype=routed) if biased else None
    expected = gate_logits.reference(hidden, weight, bias)
    moved = None if bias is None else bias.to(kernel_device)
    assert_close(launch_gate_logits(hidden.to(kernel_device), weight.to(kernel_device), moved), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routed", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", [2, 60, 256])
def test_first_choice(kernel_device: str, dtype: torch.dtype, routed: torch.dtype, num_experts: int) -> None:
    logits = (3 * random(5, 1, num_experts, seed=num_experts)).to(routed)
    logits[1] = 0.5  # all equal: the first wins
    logits[2, 0, 1:] = -torch.inf
    expected_ids, expected_weights = first_choice.reference(logits, dtype)
    ids, weights = launch_first_choice(logits.to(kernel_device), dtype)
    assert torch.equal(ids.cpu(), expected_ids) and expected_ids[1] == 0
    assert_close(weights, expected_weights)


@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (5, 1), (32, 1), (3, 2)])
def test_wanted_slabs(kernel_device: str, rows: int, top_k: int) -> None:
    ids = torch.randint(-1, 9, (rows, 1, top_k), generator=torch.Generator().manual_seed(rows))
    live = torch.arange(rows) % 3 != 1
    for first_slab in (0, 1, 18):
        expected, got = (torch.full((rows * top_k,), 77, dtype=torch.int32, device=d) for d in ("cpu", kernel_device))
        want_slabs.reference(ids, live, first_slab, expected)
        launch_want_slabs(ids.to(kernel_device), live.to(kernel_device), first_slab, got)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "width"), [(5, 16), (130, 24), (300, 64)])
def test_self_attention(kernel_device: str, dtype: torch.dtype, length: int, width: int) -> None:
    batch, heads = 2, 3
    qkv = random(batch, 1, 3, heads, width, seed=length, dtype=dtype)
    cache = random(2, batch, heads, length, width, seed=1, dtype=dtype)
    bias = random(1, heads, 1, length, seed=2, dtype=dtype)
    for position in (0, 1, length // 2, length - 1):
        hidden = bias.clone()
        hidden[..., position + 1 :] = torch.finfo(dtype).min
        at = torch.tensor([position])
        expected_cache, got_cache = cache.clone(), cache.to(kernel_device, copy=True)
        got_cache[:, :, :, position + 1 :] = torch.nan  # nothing behind the position may be looked at
        expected = self_attention.reference(qkv, expected_cache, at, hidden)
        moved = qkv.to(kernel_device), got_cache, at.to(kernel_device), hidden.to(kernel_device)
        assert_close(launch_self_attention(*moved), expected)
        filled = (..., slice(position + 1), slice(None))
        assert torch.equal(got_cache.cpu()[filled], expected_cache[filled])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [3, 128, 200])
def test_cross_attention(kernel_device: str, dtype: torch.dtype, length: int) -> None:
    """A row with a short source, one with a long one, and one of which all places are hidden."""
    query, cache = random(3, 1, 4, 16, seed=0, dtype=dtype), random(2, 3, 4, length, 16, seed=1, dtype=dtype)
    mask = torch.zeros(3, 1, 1, length, dtype=dtype)
    mask[0, ..., length // 2 :] = torch.finfo(dtype).min
    mask[2] = torch.finfo(dtype).min
    expected = cross_attention.reference(query, cache, mask)
    got = launch_cross_attention(query.to(kernel_device), cache.to(kernel_device), mask.to(kernel_device))
    assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_source_that_begins_far_behind(kernel_device: str, dtype: torch.dtype) -> None:
    """Padding on the left that fills a tile: in float16 score and mask are then -inf, in all of it."""
    query, cache = random(1, 1, 2, 16, seed=0, dtype=dtype), random(2, 1, 2, 300, 16, seed=1, dtype=dtype)
    mask = torch.zeros(1, 1, 1, 300, dtype=dtype)
    mask[..., :150] = torch.finfo(dtype).min
    query *= 8
    cache[0, ..., :150, :] = -8 * query[0, 0, :, None].sign()  # scores far below zero
    expected = cross_attention.reference(query, cache, mask)
    assert expected.isfinite().all()
    got = launch_cross_attention(query.to(kernel_device), cache.to(kernel_device), mask.to(kernel_device))
    assert_close(got, expected)


@pytest.mark.parametrize("penalises", [False, True])
@pytest.mark.parametrize("vocabulary", [20, 5000])
def test_choice_of_a_token(kernel_device: str, penalises: bool, vocabulary: int) -> None:
    """Step by step as the reference: penalties, a least length, ends, rows that are not used, equal logits."""
    kind = StepKind(penalise=penalises)
    sampling = Sampling(repetition_penalty=1.5, min_new_tokens=2, start=3, pad=4, eos=(1, 7))
    expected = Sampler(5, 9, vocabulary, torch.device("cpu"))
    got = copy.deepcopy(expected)
    for name, tensor in vars(got).items():
        setattr(got, name, tensor.to(kernel_device))
    expected.begin(sampling, rows=4)
    got.begin(sampling, rows=4)
    for step in range(7):
        logits = random(5, vocabulary, seed=step, dtype=torch.bfloat16 if step % 2 else torch.float32)
        logits[0, 7] = 50.0 if step in (0, 3) else -9.0  # wants to end: too early, then not
        logits[1, [2, vocabulary - 1]] = 30.0  # of equals the first
        logits[2, vocabulary // 2] = {4: torch.nan, 5: torch.inf}.get(step, logits[2, vocabulary // 2])
        logits[3, -1] = -torch.inf if step == 6 else logits[3, -1]
        logits[0, 2] = torch.nan if step == 6 else logits[0, 2]  # the row has ended
        logits[4] = torch.nan  # a row that is not used may hold anything
        expected.choose(logits, kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choose_tokens, "chosen", launch_choose_tokens)
            got.choose(logits.to(kernel_device), kind)
        broken = [row for row in range(4) if not (step >= 4 and row == 2) and not (step == 6 and row == 3)]
        assert expected.finite_B.nonzero().flatten().tolist() == [*broken, 4], "these rows have had finite logits"
        live = [row for row in range(4) if row != 2 or step < 4]  # which token NaN gives is nobody's promise
        for name in ("finite_B", "position_1"):
            assert torch.equal(getattr(got, name).cpu(), getattr(expected, name)), (step, name)
        for name in ("tokens_BT", "token_B", "live_B"):
            assert torch.equal(getattr(got, name).cpu()[live], getattr(expected, name)[live]), (step, name)
        assert torch.equal(got.logits_BV.cpu()[:4].nan_to_num(7.0), expected.logits_BV[:4].nan_to_num(7.0))
        if penalises:
            assert torch.equal(got._seen_BV.cpu()[live], expected._seen_BV[live])
    assert not expected.live_B[0] and expected.tokens_BT[0, 5] == 4, "the first row has ended"


@pytest.mark.parametrize("grows", [False, True])
def test_the_cache_is_read_in_wide_loads(compiler: None, grows: bool) -> None:
    from tests.engine.device.compiling import compiled

    pointers = dict.fromkeys(("queries", "cache", "bias", "outputs"), "*i16") | {"position_1": "*i64"}
    sizes = dict.fromkeys(("query_stride", "bias_row_stride", "bias_head_stride", "cache_half"), "i32")
    constants = {"H": 12, "C": 64, "LENGTH": 256, "GROWS": grows, "KIND": "bf16", "NATIVE": True}
    constants |= {"TILE": TILE, "TILE_C": 64}
    ptx = compiled(attention_kernel, pointers | sizes, constants, NUM_WARPS).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") >= 2, "keys and values"
    assert ".local" not in ptx, "nothing is spilled"


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16"])
def test_the_choice_compiles_for_a_gpu(compiler: None, kind: str) -> None:
    """The interpreter takes more than the compiler does."""
    from tests.engine.device.compiling import compiled

    raw = {"fp32": "*fp32", "bf16": "*i16", "fp16": "*fp16"}[kind]
    pointers = {"logits": raw, "kept_BV": "*fp32", "seen_BV": "*u8", "eos_V": "*u8", "position_1": "*i64"}
    pointers |= {"min_new_1": "*i64", "penalty_1": "*fp32", "best_BP": "*fp32", "token_BP": "*i32", "broken_BP": "*i32"}
    constants = {"V": 32128, "PENALISES": True, "KIND": kind, "SPLITS": SPLITS, "TILE": 2048}
    assert ".local" not in compiled(best_kernel, pointers, constants, 8).asm["ptx"], "nothing is spilled"
    pointers = {"best_BP": "*fp32", "token_BP": "*i32", "broken_BP": "*i32", "seen_BV": "*u8", "eos_V": "*u8"}
    pointers |= {"tokens_BT": "*i64", "token_B": "*i64", "live_B": "*u8", "finite_B": "*u8", "position_1": "*i64"}
    constants = {"num_rows": 5, "V": 32128, "T": 9, "PENALISES": True, "SPLITS": SPLITS, "ROWS": 8}
    assert compiled(choose_kernel, pointers | {"pad_1": "*i64"}, constants, 1).asm["ptx"]
