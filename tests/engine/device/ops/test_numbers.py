"""The kernels' conversions between stored numbers and float32 are exact, and they round as torch does."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pregate.engine.device.ops.numbers import RAW, numbers, rounded, stored  # noqa: E402

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@triton.jit
def numbers_kernel(raw, out, KIND: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, numbers(tl.load(raw + place), KIND))


@triton.jit
def rounding_kernel(values, out, KIND: tl.constexpr, NATIVE: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(out + place, stored(rounded(tl.load(values + place), KIND, NATIVE), KIND))


@pytest.mark.parametrize("kind", list(RAW))
def test_every_stored_number_is_what_torch_makes_of_it(kernel_device: str, kind: str) -> None:
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, **FLOATS}[kind]
    if dtype.itemsize == 4:
        values = torch.randn(1 << 16) * 10.0 ** torch.randint(-40, 38, (1 << 16,))
    else:
        codes = torch.arange(1 << 8 * dtype.itemsize)
        values = codes.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype)
    expected = values.float()
    out = torch.empty(len(values), device=kernel_device)
    numbers_kernel[(1,)](values.view(RAW[kind]).to(kernel_device), out, KIND=kind, SIZE=len(values))
    finite = ~expected.isnan()
    assert finite.sum() > len(values) * 0.95
    assert torch.equal(out.cpu()[finite], expected[finite])


@pytest.mark.parametrize("kind", list(FLOATS))
def test_rounding_is_torchs(kernel_device: str, kind: str) -> None:
    """Ties, overflow, subnormal numbers, infinities and NaN included."""
    dtype, generator = FLOATS[kind], torch.Generator().manual_seed(0)
    ties = (torch.arange(1 << 15).int() << 17 | 1 << 15).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    random = torch.randint(-(1 << 31), 1 << 31, ((1 << 16) - 5,), generator=generator).int().view(torch.float32)
    values = torch.cat([ties, -ties, special, random])
    out = torch.empty(len(values), dtype=dtype, device=kernel_device)
    native = kernel_device != "cpu"
    rounding_kernel[(1,)](values.to(kernel_device), out.view(RAW[kind]), KIND=kind, NATIVE=native, SIZE=len(values))
    got, expected = out.cpu(), values.to(dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    numbers_only = ~expected.isnan()
    assert torch.equal(got[numbers_only], expected[numbers_only])
    assert expected.isinf().any() and expected.isnan().any() and (expected == 0).any()
