"""Rotary attention of one step: the reference against upstream's own functions, the kernels against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

from pregate.engine.device.ops.rotary_attention import (
    NUM_WARPS,
    attend_kernel,
    attention_constants,
    join_kernel,
    launch_rotary_attention,
    rotary_attention,
)
from tests.engine.device.ops.test_small_operations import DTYPES, assert_close, random

BATCH = 3
SHAPES = [(4, 2, 16, 20), (2, 2, 24, 70), (6, 1, 40, 130), (17, 1, 16, 600)]
"""Query heads, key-value heads, their width, and places."""


def arguments(
    heads: int, groups: int, width: int, length: int, place: int, dtype: torch.dtype, **options: Any
) -> dict[str, Any]:
    """Of a step whose rows see all places, the first of which is hidden from all but one row. What lies behind the
    step's place is NaN, and so is what is hidden."""
    half = options.pop("half", width // 2)
    angles = random(BATCH, half, seed=6) * 3
    seen = torch.ones(BATCH, length, dtype=torch.bool)
    seen[1, : place // 2], seen[2, :place] = False, False
    cache = random(2, BATCH, groups, length, width, seed=4, dtype=dtype)
    at = torch.arange(length)
    hidden = ~seen | (at >= place)
    cache.transpose(2, 3)[:, hidden] = torch.nan
    return {
        "query_B1Q": random(BATCH, 1, heads * width, seed=1, dtype=dtype),
        "key_B1N": random(BATCH, 1, groups * width, seed=2, dtype=dtype),
        "value_B1N": random(BATCH, 1, groups * width, seed=3, dtype=dtype),
        "cos_BR": angles.cos().to(dtype),
        "sin_BR": angles.sin().to(dtype),
        "cache_2BGTC": cache,
        "place_1": torch.tensor([place]),
        "seen_BT": seen,
        "scale": width**-0.5,
        "window": 0,
        "sinks_H": None,
        **options,
    }


def upstreams(given: dict[str, Any]) -> Tensor:
    """Eager attention with a mask, by the code of Mixtral and gpt-oss."""
    cache = given["cache_2BGTC"].nan_to_num()
    _, batch, groups, length, width = cache.shape
    place = int(given["place_1"])

    def headed(states: Tensor) -> Tensor:
        return states.view(batch, 1, -1, width).transpose(1, 2)

    query, key, value = (headed(given[name]) for name in ("query_B1Q", "key_B1N", "value_B1N"))
    cos, sin = (given[name].repeat(1, 2)[:, None] for name in ("cos_BR", "sin_BR"))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    keys, values = cache
    keys[:, :, place : place + 1], values[:, :, place : place + 1] = key, value
    at = torch.arange(length)
    seen = given["seen_BT"] & (at <= place) & ((at > place - given["window"]) | (given["window"] == 0))
    mask = torch.where(seen, 0.0, -torch.inf)[:, None, None]
    heads = query.shape[1]
    sinks = torch.full((heads,), -torch.inf) if given["sinks_H"] is None else given["sinks_H"]
    module = torch.nn.Module()
    module.num_key_value_groups, module.sinks = heads // groups, sinks
    return eager_attention_forward(module, query, keys, values, mask, given["scale"])[0].reshape(batch, 1, -1)


@pytest.mark.parametrize(("heads", "groups", "width", "length"), SHAPES)
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"sinks": True, "window": 1}], ids=str)
def test_as_upstream(heads: int, groups: int, width: int, length: int, options: dict[str, Any]) -> None:
    sinks = random(heads, seed=7) if options.get("sinks") else None
    for place in (0, length // 2, length - 1):
        window = options.get("window", 0)
        given = arguments(heads, groups, width, length, place, torch.float32, window=window, sinks_H=sinks)
        expected = upstreams(given)
        got = rotary_attention.reference(**given)
        assert expected.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_part_of_a_head_may_stay_as_it_is() -> None:
    """The channels behind twice `half` are not turned."""
    given = arguments(4, 2, 16, 9, 5, torch.float32, half=3)
    whole = arguments(4, 2, 16, 9, 5, torch.float32, half=3)
    order = torch.tensor([0, 1, 2, *range(6, 11), 3, 4, 5, *range(11, 16)])
    for name in ("query_B1Q", "key_B1N", "value_B1N"):
        whole[name] = whole[name].view(BATCH, 1, -1, 16)[..., order].flatten(2)
    whole["cache_2BGTC"] = whole["cache_2BGTC"][..., order]
    for name, still in (("cos_BR", 1.0), ("sin_BR", 0.0)):
        whole[name] = torch.cat([whole[name], torch.full((BATCH, 5), still)], dim=1)
    expected = upstreams(whole).view(BATCH, 1, -1, 16)[..., order.argsort()].flatten(2)
    torch.testing.assert_close(rotary_attention.reference(**given), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "width", "length"), SHAPES)
def test_kernels(kernel_device: str, dtype: torch.dtype, heads: int, groups: int, width: int, length: int) -> None:
    for place, options in (
        (0, {}),
        (length // 2, {"window": 7}),
        (length - 1, {"half": width // 4, "sinks_H": random(heads, seed=7, dtype=dtype)}),
    ):
        given = arguments(heads, groups, width, length, place, dtype, **options)
        moved = {n: v.to(kernel_device, copy=True) if isinstance(v, Tensor) else v for n, v in given.items()}
        expected, got = rotary_attention.reference(**given), launch_rotary_attention(**moved)
        assert expected.isfinite().all()
        assert_close(got, expected)
        one, other = given["cache_2BGTC"][:, :, :, place], moved["cache_2BGTC"].cpu()[:, :, :, place]
        assert_close(other, one)


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("heads", "groups", "width", "window"), [(32, 4, 128, 0), (64, 8, 64, 128)])
def test_the_cache_is_read_in_wide_loads(
    compiler: None, architecture: int, heads: int, groups: int, width: int, window: int
) -> None:
    """Of Qwen3-30B-A3B and gpt-oss, whose heads are read through the tensor cores."""
    from tests.engine.device.compiling import compiled

    cache = torch.empty(2, 4, groups, 768, width, dtype=torch.bfloat16, device="meta")
    constants = attention_constants(cache, heads, width // 2, window)
    names = ("queries", "new_keys", "new_values", "cos", "sin", "cache")
    pointers = dict.fromkeys(names, "*i16") | {"place_1": "*i64", "seen_BT": "*u8"}
    pointers |= {"sums_BHPC": "*fp32", "stats_BHP2": "*fp32"}
    sizes = {"scale": "fp32", "cache_half": "i32"}
    kernel = compiled(attend_kernel, pointers | sizes, constants, NUM_WARPS, architecture)
    assert "mma" in kernel.asm["ptx"] and kernel.metadata.shared <= 99 * 1024
    assert "v4.b32" in kernel.asm["ptx"] or "cp.async.cg.shared.global" in kernel.asm["ptx"]
    kept = {name: constants[name] for name in ("H", "C", "PARTS", "KIND", "NATIVE", "TILE_C")}
    pointers = {"sums_BHPC": "*fp32", "stats_BHP2": "*fp32", "sinks": "*i16", "outputs": "*i16"}
    assert compiled(join_kernel, pointers, kept | {"SINKS": True}, NUM_WARPS, architecture).asm["ptx"]
