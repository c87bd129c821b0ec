"""The experts' kernel holds to its reference over dtypes, shapes and choices; its conversions are exact."""

from __future__ import annotations

import itertools

import pytest
import torch

from pregate.config import SlabDtype
from pregate.engine.storage.slabs import SlabLayout
from tests.engine.device.experts_cases import ExpertsCase, assert_close, family_of

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pregate.engine.device.ops.expert_outputs import (  # noqa: E402
    NUM_WARPS,
    expert_outputs,
    launch_expert_outputs,
    linear_constants,
    slot_linear_kernel,
)
from pregate.engine.device.ops.numbers import RAW, numbers, rounded, stored  # noqa: E402

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def hold_to_reference(case: ExpertsCase, device: str) -> None:
    moved = case.copied_to(device)
    launch_expert_outputs(*moved.arguments)
    got_BD = moved.out_BD.cpu()
    expert_outputs.reference(*case.arguments)
    assert_close(got_BD, case.out_BD, case.slot_N.tolist())
    dropped_B = (case.slot_N.view(len(got_BD), -1) < 0).all(1)
    assert (got_BD[dropped_B] == 0).all()


@pytest.mark.parametrize("dtype", list(FLOATS.values()), ids=str)
@pytest.mark.parametrize("slab_dtype", list(SlabDtype))
def test_one_choice_and_several(kernel_device: str, dtype: torch.dtype, slab_dtype: SlabDtype) -> None:
    for slots in ([1], [2, 0, 2, -1, 1]):
        case = ExpertsCase.random(len(slots), slots, width=32, hidden=40, dtype=dtype, stored=slab_dtype)
        hold_to_reference(case, kernel_device)


@pytest.mark.parametrize(
    "slots",
    [[0], [-1], [-1, -1, -1], [3, 3, 3, 3], [-1, 5, 2, 5, 0, 5, 0]],
    ids=str,
)
@pytest.mark.parametrize(("width", "hidden"), [(64, 80), (18, 70), (33, 7)])
def test_shapes_that_fill_tiles_and_that_do_not(kernel_device: str, slots: list[int], width: int, hidden: int) -> None:
    for slab_dtype in (SlabDtype.source, SlabDtype.int8):
        hold_to_reference(
            ExpertsCase.random(width, slots, width=width, hidden=hidden, stored=slab_dtype), kernel_device
        )


@pytest.mark.parametrize("batch", [2, 8, 16, 17, 32])
def test_batches(kernel_device: str, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    for most in (2, 12):
        slots = (torch.randint(most, (batch,), generator=generator) - 1).tolist()
        hold_to_reference(ExpertsCase.random(batch, slots, width=32, hidden=64, dtype=torch.bfloat16), kernel_device)


@pytest.mark.parametrize("dtype", list(FLOATS.values()), ids=str)
def test_several_experts_a_token(kernel_device: str, dtype: torch.dtype) -> None:
    for slots, top_k in (([1, 0], 2), ([2, 0, 0, 2, 2, -1, -1, -1], 2), ([0, 1, 2, 2, 1, 0], 3)):
        hold_to_reference(ExpertsCase.random(0, slots, width=32, hidden=48, dtype=dtype, top_k=top_k), kernel_device)


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


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("num_choices", [1, 8, 32])
def test_weights_of_a_real_size_are_read_16_bytes_at_a_time(
    compiler: None, num_choices: int, architecture: int
) -> None:
    """Batch 1 straight into registers, without a barrier between tiles; larger ones through the tensor cores."""
    from tests.engine.device.compiling import compiled

    for slab_dtype, last in itertools.product(SlabDtype, (False, True)):
        layout = SlabLayout.of(family_of(wi=(3072, 768), wo=(768, 3072)), torch.bfloat16, slab_dtype)
        constants = linear_constants(layout, layout.matrices[last], num_choices, share=1, last=last)
        raw = {"bf16": "*i16", "int8": "*i8", "fp8": "*u8"}[constants["STORED"]]
        pointers = {"inputs": "*i16", "slot_N": "*i32", "weights_N": "*i16", "slabs": raw, "scales": "*fp32"}
        kernel = compiled(slot_linear_kernel, {**pointers, "outputs": "*i16"}, constants, NUM_WARPS, architecture)
        ptx = kernel.asm["ptx"]
        if num_choices == 1:
            weights = layout.matrices[last].shape[0] * layout.matrices[last].shape[1]
            programs = constants["R"] // constants["TILE_R"]
            loads = weights * slots_itemsize(layout) // programs // (NUM_WARPS * 32 * 16)
            assert ptx.count("ld.global.v4.b32") >= loads > 0, (loads, ptx)
            assert len([line for line in ptx.splitlines() if "ld.global.b" in line]) <= 4 + constants["TILE_R"], ptx
            assert ptx.count("bar.sync") <= 6, ptx
        else:
            assert "mma.sync" in ptx and "cp.async.cg.shared.global" in ptx, ptx


def slots_itemsize(layout: SlabLayout) -> int:
    return 1 if layout.is_quantised else layout.dtype.itemsize


@pytest.mark.gpu
@pytest.mark.parametrize("slab_dtype", list(SlabDtype))
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_experts_of_a_real_size_in_a_cuda_graph(slab_dtype: SlabDtype, batch: int) -> None:
    """Captured once; the slots change between replays."""
    generator = torch.Generator().manual_seed(batch)
    slots = torch.randint(10, (batch,), generator=generator).tolist()
    case = ExpertsCase.random(1, slots, width=768, hidden=3072, dtype=torch.bfloat16, stored=slab_dtype)
    moved = case.copied_to("cuda")
    launch_expert_outputs(*moved.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_expert_outputs(*moved.arguments)
    for shift in range(3):
        slot_N = case.slot_N.roll(shift)
        slot_N[-1] = -1 if shift == 2 else slot_N[-1]
        moved.slot_N.copy_(slot_N)
        moved.out_BD.fill_(float("nan"))
        graph.replay()
        case.slot_N.copy_(slot_N)
        expert_outputs.reference(*case.arguments)
        assert_close(moved.out_BD, case.out_BD, slot_N.tolist())
