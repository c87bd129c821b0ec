"""Slabs as bytes: what goes in comes out, exactly or within half a step of its scale, wherever the slab lies."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pregate.config import SlabDtype
from pregate.engine.storage.aligned_memory import PAGE, aligned_bytes
from pregate.engine.storage.pack import pack
from pregate.engine.storage.quantisation import STRIP, dequantise, quantise, widen
from pregate.engine.storage.slabs import LINE, SlabLayout
from pregate.engine.storage.store import DiskStore, DramStore
from pregate.models.checkpoint import open_checkpoint
from pregate.models.expert_math import RowScaled, in_dtype, project
from pregate.models.experts import ExpertSpec, TensorSlice
from pregate.models.family import experts_of
from tests.engine.serving import Served

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def family_of(*shapes: tuple[int, int]) -> ExpertSpec:
    return ExpertSpec(
        num_experts=2,
        top_k=1,
        lookahead=0,
        matrices={f"m{number}": shape for number, shape in enumerate(shapes)},
        layers={"decoder": [0]},
        layouts=(lambda _, __, expert: [TensorSlice(f"{expert}.m{n}") for n in range(len(shapes))],),
        apply=lambda matrices, hidden: hidden,
        activation="relu",
    )


def random_matrices(layout: SlabLayout, seed: int) -> list[Tensor]:
    """Rows of very different magnitudes, one of them all zeros, one with a single number in it."""
    generator = torch.Generator().manual_seed(seed)
    matrices = []
    for place in layout.matrices:
        rows = 10.0 ** (torch.rand(place.shape[0], 1, generator=generator) * 6 - 4)
        matrix = torch.randn(place.shape, generator=generator) * rows
        matrix[0] = 0
        matrix[-1, 1:] = 0
        matrices.append(matrix.to(layout.dtype))
    return matrices


shapes = st.lists(st.tuples(st.integers(2, 40), st.integers(1, 40)), min_size=1, max_size=3)


@given(shapes=shapes, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
@settings(derandomize=True, database=None, deadline=None, max_examples=30)
def test_source_slabs_are_exact(shapes: list[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
    layout = SlabLayout.of(family_of(*shapes), dtype)
    matrices, slab = random_matrices(layout, seed), aligned_bytes(layout.slab_bytes).fill_(255)
    layout.encode(matrices, slab)
    for matrix, decoded in zip(matrices, layout.decode(slab), strict=True):
        assert torch.equal(matrix, decoded), f"{matrix}\n{decoded}"
    used = sum(matrix.nbytes for matrix in matrices)
    assert used <= layout.slab_bytes < used + PAGE + LINE * len(shapes)


@given(
    shapes=shapes,
    dtype=st.sampled_from(FLOATS),
    stored=st.sampled_from([SlabDtype.int8, SlabDtype.fp8]),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=60)
def test_quantised_slabs_are_within_half_a_step(
    shapes: list[tuple[int, int]], dtype: torch.dtype, stored: SlabDtype, seed: int
) -> None:
    layout = SlabLayout.of(family_of(*shapes), dtype, stored)
    matrices, slab = random_matrices(layout, seed), aligned_bytes(layout.slab_bytes).fill_(255)
    layout.encode(matrices, slab)
    for matrix, scale_R1, got, again in zip(
        matrices, layout.scales(slab), layout.decode(slab), layout.decode(slab), strict=True
    ):
        exact, back, scale_R1 = matrix.double(), got.double(), scale_R1.double()
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert torch.equal(scale_R1.log2(), scale_R1.log2().round()), "every scale is a power of two"
        if stored is SlabDtype.int8:
            # clipping is chosen only where a row is no worse for it than with the scale that nothing overflows
            coarse_R1 = torch.exp2((exact.abs().amax(1, keepdim=True) / 127).log2().ceil().nan_to_num(neginf=0))
            assert ((scale_R1 == coarse_R1) | (scale_R1 == coarse_R1 / 2)).all()
            rounding = (coarse_R1 / 2).expand_as(exact).norm(dim=1) + exact.norm(dim=1) * torch.finfo(dtype).eps
            worst = ((back - exact).norm(dim=1) - rounding - tiny).max()
        else:  # half a step: three bits of mantissa, down to the smallest subnormal of e4m3, 2 to the -9
            step = torch.maximum(exact.abs() / 8, scale_R1 * 2.0**-9)
            worst = ((back - exact).abs() - step / 2 - exact.abs() * torch.finfo(dtype).eps - tiny).max()
        assert worst <= 0, f"{stored} {dtype}: {worst} above the bound\n{matrix}\n{got}"
        assert torch.equal(got[0], torch.zeros_like(got[0])), got[0]
        assert torch.equal(got, again)


@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    num_tokens=st.integers(1, 9),
    dtype=st.sampled_from(FLOATS),
    stored=st.sampled_from(list(SlabDtype)),
    seed=st.integers(0, 99),
)
@settings(derandomize=True, database=None, deadline=None, max_examples=80)
def test_factors_give_the_products_of_the_decoded_matrices(
    sizes: tuple[int, int], num_tokens: int, dtype: torch.dtype, stored: SlabDtype, seed: int
) -> None:
    """Bit for bit: a scale that is a power of two commutes with every rounding."""
    layout = SlabLayout.of(family_of(sizes), dtype, stored)
    slab, scratch = aligned_bytes(layout.slab_bytes), layout.scratch(torch.device("cpu"))
    for number in range(2):
        layout.encode(random_matrices(layout, seed + number), slab)
        hidden = torch.randn(num_tokens, sizes[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
        (decoded,), (factor,) = layout.decode(slab), layout.factors(slab, scratch)
        # at the same alignment, where sums round alike
        held = aligned_bytes(decoded.nbytes).view(dtype).view(decoded.shape).copy_(decoded)
        if isinstance(factor, RowScaled):
            aligned = aligned_bytes(factor.values_RC.nbytes).view(dtype).view(decoded.shape)
            factor = factor._replace(values_RC=aligned.copy_(factor.values_RC))
        got, expected = project(hidden, factor), torch.nn.functional.linear(hidden, held)
        assert torch.equal(got, expected), f"{got}\n{expected}"


def test_rows_may_be_zero_or_hold_the_largest_number_in_any_place() -> None:
    matrix = torch.tensor([[0.0, 0.0, 0.0], [-3.0, 1.0, 3.0], [1e-30, 0.0, -1e-30], [65504.0, -1.0, 2.0]])
    for dtype, largest in ((torch.int8, 127.0), (torch.float8_e4m3fn, 448.0)):
        stored, scale, out = torch.empty(4, 3, dtype=dtype), torch.empty(4, 1), torch.empty(4, 3)
        quantise(matrix, stored, scale)
        assert stored[0].float().abs().max() == 0 and (stored[1:].float().abs().amax(1) > largest / 2.01).all(), stored
        dequantise(stored, scale, out)
        assert out.isfinite().all(), out
        assert torch.allclose(out.abs().amax(1), matrix.abs().amax(1), rtol=0.07, atol=0), f"{out}\n{matrix}"


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_fp8_code_is_what_torch_makes_of_it(dtype: torch.dtype) -> None:
    """More rows than one strip, so that all strips are looked at."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(STRIP // 256 + 1, 1).t().contiguous()
    codes = torch.cat([codes] * 3)
    assert codes.shape[0] > STRIP
    stored, out = codes.view(torch.float8_e4m3fn), torch.empty(codes.shape, dtype=dtype)
    widen(stored, out)
    expected = stored.to(dtype)
    numbers = ~expected.isnan()
    assert numbers.sum() == expected.numel() * 254 // 256
    assert torch.equal(out[numbers], expected[numbers])
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_int8_code_times_its_scale(dtype: torch.dtype) -> None:
    stored = torch.arange(-128, 128).to(torch.int8).repeat(STRIP + 3, 1)
    scale = torch.rand(STRIP + 3, 1)
    out = torch.empty(stored.shape, dtype=dtype)
    dequantise(stored, scale, out)
    expected = (stored.float() * scale).to(dtype)
    assert torch.equal(out, expected), f"{out}\n{expected}"
    widen(stored, out)
    assert torch.equal(out, stored.to(dtype))


def test_bytes_shrink_with_the_stored_dtype() -> None:
    family = family_of((3072, 768), (768, 3072))
    sizes = {
        (dtype, stored): SlabLayout.of(family, dtype, stored).slab_bytes
        for dtype in (torch.float32, torch.bfloat16)
        for stored in SlabDtype
    }
    numbers = 2 * 3072 * 768
    assert sizes[torch.float32, SlabDtype.source] == 4 * numbers
    assert sizes[torch.bfloat16, SlabDtype.source] == 2 * numbers
    scales = 4 * (3072 + 768)
    for dtype in (torch.float32, torch.bfloat16):
        for stored in (SlabDtype.int8, SlabDtype.fp8):
            assert numbers + scales <= sizes[dtype, stored] < numbers + scales + PAGE


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", list(SlabDtype))
def test_layouts_survive_json_and_are_aligned(dtype: torch.dtype, stored: SlabDtype) -> None:
    layout = SlabLayout.of(family_of((5, 7), (9, 3), (4, 33)), dtype, stored)
    assert SlabLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert layout.slab_bytes % PAGE == 0
    places = [*(p.offset for p in layout.matrices), *(p.scale_offset or 0 for p in layout.matrices)]
    assert all(place % LINE == 0 for place in places), places
    slab = aligned_bytes(layout.slab_bytes)
    assert slab.data_ptr() % PAGE == 0
    parts = [part for part in [*layout.views(slab), *layout.scales(slab)] if part is not None]
    begins = sorted((part.data_ptr(), part.nbytes) for part in parts)
    assert all(one + size <= other for (one, size), (other, _) in itertools.pairwise(begins)), begins
    assert begins[-1][0] + begins[-1][1] <= slab.data_ptr() + layout.slab_bytes


@pytest.mark.parametrize("stored", list(SlabDtype))
def test_both_tiers_hold_the_same_slabs(served: Served, tmp_path: Any, stored: SlabDtype) -> None:
    checkpoint, family = open_checkpoint(str(served.directory)), experts_of(served.model.config)
    layout = SlabLayout.of(family, torch.float32, stored)
    disk = DiskStore(pack(checkpoint, family, layout, tmp_path / "experts"))
    dram = DramStore(checkpoint, family, layout, page_locked=False)
    weights = served.model.state_dict()
    assert disk.layout == dram.layout == layout
    for key in family.keys():  # noqa: SIM118 - not a mapping
        read = aligned_bytes(layout.slab_bytes).fill_(255)
        disk.read_into(key, read)
        assert torch.equal(read, dram.slab(key)), key
        encoded = aligned_bytes(layout.slab_bytes)
        layout.encode([weights[name] for name in family.tensor_names(key)], encoded)
        assert torch.equal(read, encoded), key
    disk.close()
    dram.close()


def test_in_float16_scales_come_before_the_product() -> None:
    """Slabs of a bfloat16 checkpoint, computed in float16: the product with the stored numbers alone would overflow."""
    factor = RowScaled(
        torch.full((2, 64), 448.0, dtype=torch.bfloat16), torch.full((2,), 2.0**-12, dtype=torch.bfloat16)
    )
    hidden_ND = torch.full((1, 64), 8.0, dtype=torch.float16)
    found = project(hidden_ND, in_dtype(factor, torch.float16))
    assert torch.equal(found, torch.full((1, 2), 64 * 8 * 448 * 2.0**-12, dtype=torch.float16))
    wide = in_dtype(factor, torch.float32)
    assert isinstance(wide, RowScaled) and wide.values_RC.dtype == torch.float32
