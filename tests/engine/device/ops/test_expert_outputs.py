"""The experts from slots: the reference implementation against the resident experts, the kernel against it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pregate.config import SlabDtype, UsageError
from pregate.engine.device.ops.expert_forms import into_and_out
from pregate.engine.device.ops.expert_outputs import (
    NUM_WARPS,
    ExpertScratch,
    expert_outputs,
    launch_expert_outputs,
    linear_constants,
    slot_linear_kernel,
)
from pregate.engine.storage.slabs import SlabLayout
from tests.engine.device.experts_cases import CLAMP, ExpertsCase, assert_close, family_of, shapes_of

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["relu", "gated_silu", "gated_clamped"]
NUMBERS = [(ACTIVATIONS[i], FLOATS[j], list(SlabDtype)[(i + j) % 3]) for i in range(3) for j in range(3)]
"""Each two of an activation, a dtype and a slab dtype once."""
numbers = pytest.mark.parametrize(("activation", "dtype", "stored"), NUMBERS, ids=str)
COMPILED = [
    *(("relu", *case) for case in [(1, 90), (8, 90), (32, 80), (256, 90)]),
    *(("gated_silu", *case) for case in [(1, 80), (8, 90), (32, 90), (256, 100)]),
    *(("gated_clamped", *case) for case in [(1, 100), (8, 90), (32, 80), (256, 100)]),
]
"""Activations, numbers of choices and architectures: each activation with each number of choices."""
COMPILED_BY_DEFAULT = [("relu", 1, 90), ("relu", 32, 80), ("gated_silu", 1, 80), ("gated_clamped", 256, 100)]
SHARED_BYTES = 99 * 1024
"""The least that GPUs of these architectures give a program."""


@numbers
@pytest.mark.parametrize(
    ("slots", "top_k"),
    [([0], 1), ([-1], 1), ([2, 0, 2, -1, 1], 1), ([3] * 6, 1), ([1, 3, 3, 1, -1, 2, -1, -1], 2)],
    ids=str,
)
def test_as_the_resident_experts(
    activation: str, dtype: torch.dtype, stored: SlabDtype, slots: list[int], top_k: int
) -> None:
    sizes = {"width": 24, "hidden": 56, "top_k": top_k}
    case = ExpertsCase.random(len(slots), slots, dtype=dtype, stored=stored, activation=activation, **sizes)
    expert_outputs(*case.arguments)
    assert_close(case.out_BD, case.resident())
    dropped_B = (case.slot_N.view(-1, top_k) < 0).all(1)
    assert (case.out_BD[dropped_B] == 0).all()
    assert (case.out_BD[~dropped_B] != 0).any(1).all()


def test_poison_shows_where_a_slot_holds_nothing() -> None:
    """So that the other tests mean something."""
    case = ExpertsCase.random(0, [1, 0], width=24, hidden=56, stored=SlabDtype.fp8)
    case.slot_N[0] = 2
    expert_outputs(*case.arguments)
    assert case.out_BD[0].isnan().all() and case.out_BD[1].isfinite().all(), case.out_BD


def test_scratch_is_as_large_as_it_says() -> None:
    layout = SlabLayout.of(family_of(wi=(56, 24), wo=(24, 56)), torch.bfloat16)
    assert ExpertScratch.empty(3, layout, "cpu").num_bytes == 3 * (56 + 24) * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_weights_may_be_float32(activation: str) -> None:
    """As of routers that hand on what their softmax gives: one rounding, behind the product."""
    sizes = {"width": 24, "hidden": 56, "top_k": 2, "dtype": torch.bfloat16}
    case = ExpertsCase.random(0, [1, 0, 2, -1], activation=activation, weighed=torch.float32, **sizes)
    expert_outputs(*case.arguments)
    assert_close(case.out_BD, case.resident())


def test_experts_of_another_form_are_refused() -> None:
    case = ExpertsCase.random(0, [1, 0], width=24, hidden=56)
    with pytest.raises(UsageError, match=r"'gelu'.*only relu, gated_silu, gated_clamped"):
        expert_outputs(*case.arguments[:-2], "gelu", ())
    gated = family_of(wi_0=(56, 24), wi_1=(56, 24), wo=(24, 56))
    for family in (gated, family_of(wi=(56, 24), wo=(24, 55)), family_of(only=(3, 3))):
        with pytest.raises(UsageError, match="only an up and a down matrix"):
            into_and_out(SlabLayout.of(family, torch.float32), "relu")
    plain = family_of(wi=(56, 24), wo=(24, 56))
    for family in (plain, family_of(gate=(56, 24), up=(55, 24), wo=(24, 56))):
        with pytest.raises(UsageError, match="only a gate, an up and a down matrix"):
            into_and_out(SlabLayout.of(family, torch.float32), "gated_silu")
    biased = shapes_of("gated_clamped", 24, 56)
    for shapes in (shapes_of("gated_silu", 24, 56), biased | {"wo_bias": (56,)}):
        with pytest.raises(UsageError, match="only a gate, an up and a down matrix, and then a bias for each"):
            into_and_out(SlabLayout.of(family_of(**shapes), torch.float32), "gated_clamped")
    with pytest.raises(UsageError, match="only a gate, an up and a down matrix: use"):
        into_and_out(SlabLayout.of(family_of(**biased), torch.float32), "gated_silu")


@pytest.mark.parametrize("stored", list(SlabDtype))
def test_the_reference_reads_no_number_back(stored: SlabDtype) -> None:
    case = ExpertsCase.random(0, [2, -1, 2, 1], width=24, hidden=56, stored=stored, top_k=2)
    with FakeTensorMode() as mode:
        empty = case.converted(mode.from_tensor)
        expert_outputs.reference(*empty.arguments)
    assert empty.out_BD.shape == (2, 24)


def hold_to_reference(case: ExpertsCase, device: str) -> None:
    moved = case.copied_to(device)
    launch_expert_outputs(*moved.arguments)
    got_BD = moved.out_BD.cpu()
    expert_outputs.reference(*case.arguments)
    assert_close(got_BD, case.out_BD, case.slot_N.tolist())
    dropped_B = (case.slot_N.view(len(got_BD), -1) < 0).all(1)
    assert (got_BD[dropped_B] == 0).all()


@numbers
def test_one_choice_and_several(kernel_device: str, activation: str, dtype: torch.dtype, stored: SlabDtype) -> None:
    for slots in ([1], [2, 0, 2, -1, 1]):
        sizes = {"width": 32, "hidden": 40, "dtype": dtype, "stored": stored}
        hold_to_reference(ExpertsCase.random(len(slots), slots, activation=activation, **sizes), kernel_device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_weights_of_narrower_experts(kernel_device: str, activation: str) -> None:
    for slots, top_k in (([1], 1), ([1, 0, 2, -1], 2)):
        sizes = {"width": 32, "hidden": 40, "top_k": top_k, "dtype": torch.bfloat16}
        case = ExpertsCase.random(0, slots, activation=activation, weighed=torch.float32, **sizes)
        hold_to_reference(case, kernel_device)


def test_many_experts_a_token(kernel_device: str) -> None:
    """More choices than rows of a tile that holds 128 columns."""
    slots = (torch.randint(20, (9 * 8,), generator=torch.Generator().manual_seed(0)) - 1).tolist()
    sizes = {"width": 80, "hidden": 48, "top_k": 8, "dtype": torch.bfloat16}
    for activation in ("gated_silu", "gated_clamped"):
        hold_to_reference(ExpertsCase.random(0, slots, activation=activation, **sizes), kernel_device)


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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_experts_a_token(kernel_device: str, dtype: torch.dtype) -> None:
    for slots, top_k in (([1, 0], 2), ([2, 0, 0, 2, 2, -1, -1, -1], 2), ([0, 1, 2, 2, 1, 0], 3)):
        hold_to_reference(ExpertsCase.random(0, slots, width=32, hidden=48, dtype=dtype, top_k=top_k), kernel_device)


@pytest.mark.parametrize(
    ("activation", "num_choices", "architecture"),
    [pytest.param(*case, marks=() if case in COMPILED_BY_DEFAULT else pytest.mark.slow) for case in COMPILED],
)
def test_weights_of_a_real_size_are_read_16_bytes_at_a_time(
    compiler: None, activation: str, num_choices: int, architecture: int
) -> None:
    """One choice straight into registers, without a barrier between tiles; more through the tensor cores."""
    from tests.engine.device.compiling import compiled

    # of gpt-oss-20b, which no wide power of two divides, or of Switch-Base
    sizes = (2880, 2880) if activation == "gated_clamped" else (768, 3072)
    for slab_dtype, last in itertools.product(SlabDtype, (False, True)):
        layout = SlabLayout.of(family_of(activation, **shapes_of(activation, *sizes)), torch.bfloat16, slab_dtype)
        into, out = into_and_out(layout, activation)
        linear, following = (out, "") if last else (into, activation)
        clamp = CLAMP if following == "gated_clamped" else ()
        constants = linear_constants(layout, linear, num_choices, 1, following, clamp, weighed="bf16")
        raw = {"bf16": "*i16", "int8": "*i8", "fp8": "*u8"}[constants["STORED"]]
        pointers = {"inputs": "*i16", "slot_N": "*i32", "weights_N": "*i16", "slabs": raw, "scales": "*fp32"}
        pointers |= {"biases": "*i16", "outputs": "*i16"}
        kernel = compiled(slot_linear_kernel, pointers, constants, NUM_WARPS, architecture)
        ptx = kernel.asm["ptx"]
        if num_choices == 1:
            weights = len(linear.matrices) * constants["R"] * constants["C"]
            programs = constants["R"] // constants["TILE_R"]
            loads = weights * slots_itemsize(layout) // programs // (NUM_WARPS * 32 * 16)
            assert ptx.count("ld.global.v4.b32") >= loads > 0, (loads, ptx)
            narrow = 4 + (len(linear.matrices) + len(linear.biases)) * constants["TILE_R"]
            assert len([line for line in ptx.splitlines() if "ld.global.b" in line]) <= narrow, ptx
            assert ptx.count("bar.sync") <= 6 * len(linear.matrices), ptx
        else:
            assert any(name in ptx for name in ("mma.sync", "wgmma.mma", "tcgen05.mma")), ptx
            assert "cp.async.cg.shared.global" in ptx, ptx
            assert kernel.metadata.shared <= SHARED_BYTES, kernel.metadata


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
