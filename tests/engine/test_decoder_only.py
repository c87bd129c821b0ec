"""OLMoE, several experts a token, with few slots and long prompts; a block's experts move together. `test_matrix` has
every policy, cache, tier and slab dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from pregate.config import Policy, SlabDtype
from pregate.engine.engine import OffloadEngine
from pregate.engine.storage.aligned_memory import aligned_bytes
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.expert_math import RowScaled
from pregate.models.family import experts_of
from tests.engine.hostile import poison_slots
from tests.engine.olmoe import EXPERTS, decode, olmoe, prompts
from tests.engine.serving import OFFLOADED, Served, assert_same, generated


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory, model = tmp_path_factory.mktemp("olmoe"), olmoe()
    model.save_pretrained(directory)
    return Served(directory, model)


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert got[1].isfinite().all()
    assert_same(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", OFFLOADED)
@pytest.mark.parametrize("slots", [1, 2])
def test_fewer_slots_than_a_block_needs_stream_through(small: Served, policy: Policy, slots: int) -> None:
    """Whole prompts and chunks of them; a block needs more experts than there are slots, and gets all of them."""
    expected = generated(small.model.generate, decode(**prompts(4)))
    budget = str(slots * SlabLayout.of(experts_of(small.model.config), torch.float32).slab_bytes)
    for chunk in (None, 3):
        options: dict[str, Any] = {"policy": policy, "device_budget": budget, "prefill_chunk": chunk}
        with OffloadEngine.open(small.directory, **options) as engine:
            poison_slots(engine)
            assert_close(generated(engine.generate, decode(**prompts(4))), expected)
            assert engine.num_slots == slots and engine.counters.misses > 3 * EXPERTS


@pytest.mark.parametrize("policy", [Policy.on_demand, Policy.pre_gated])
def test_the_experts_of_a_block_are_one_batch_in_the_order_of_use(small: Served, policy: Policy) -> None:
    batches: list[list[int]] = []
    used: list[list[int]] = []
    with OffloadEngine.open(small.directory, policy=policy, device_budget="100%") as engine:
        mover: Any = engine.host.mover
        start, acquire = mover.start, engine.host.scheduler.acquire
        mover.start = lambda moves: batches.append([move.key.expert for move in moves]) or start(moves)
        for block in engine.model.moe_blocks():
            block.layer_module.register_forward_pre_hook(lambda *_: used.append([]))
        engine.host.scheduler.acquire = lambda key: used[-1].append(key.expert) or acquire(key)
        # every slab counts as late, so that they are used in the order they were asked for
        engine.host.scheduler.is_ready = lambda key: False
        engine.generate(**decode(**prompts(4)))
    assert batches == used and len(batches) == 3 * 4
    assert max(len(batch) for batch in batches) == EXPERTS and min(len(batch) for batch in batches) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_product_gives_gate_and_up_as_upstream_computes_them(dtype: torch.dtype) -> None:
    """Bit for bit, out of a slab, where upstream multiplies with its fused tensor."""
    config = olmoe().config
    config._experts_implementation = "eager"
    upstream, family = OlmoeExperts(config).to(dtype), experts_of(config)
    hidden_TD = torch.randn(5, config.hidden_size, dtype=dtype)
    layout, key = SlabLayout.of(family, dtype), family.keys()[3]
    slab = aligned_bytes(layout.slab_bytes)
    with torch.no_grad():
        for parameter in upstream.parameters():
            parameter.normal_()
        weights = {name: getattr(upstream, name.rpartition(".")[2]) for name in family.tensor_names(key)}
        layout.encode([part.of(weights[part.tensor]) for part in family.slices(key)], slab)
        ones_T1 = torch.ones(5, 1, dtype=dtype)
        expected = upstream(hidden_TD, torch.full((5, 1), key.expert), ones_T1)
        factors = layout.factors(slab, [])
        assert [tuple(factor.shape) for factor in factors] == [(32, 32), (32, 16)]
        assert torch.equal(family.apply(factors, hidden_TD), expected)
        # and with the matrices apart within rounding
        apart = family.apply(layout.decode(slab), hidden_TD)
    torch.testing.assert_close(apart, expected, rtol=2e-2, atol=0.2) if dtype is torch.bfloat16 else (
        torch.testing.assert_close(apart, expected, rtol=1e-4, atol=1e-3)
    )


@pytest.mark.parametrize("stored", [SlabDtype.int8, SlabDtype.fp8])
@pytest.mark.parametrize("width", [16, 7])
def test_joined_matrices_are_quantised_row_by_row(stored: SlabDtype, width: int) -> None:
    """What is multiplied with is gate's rows and scales, then up's; also where they do not end on a cache line."""
    family = experts_of(olmoe(intermediate_size=width).config)
    layout = SlabLayout.of(family, torch.float32, stored)
    slab, scratch = aligned_bytes(layout.slab_bytes), layout.scratch(torch.device("cpu"))
    layout.encode([torch.randn(shape) for shape in family.matrices.values()], slab)
    gate, up, down = layout.decode(slab)
    factors = layout.factors(slab, scratch)
    for factor, matrix in zip(factors, (torch.cat([gate, up]), down), strict=True):
        assert isinstance(factor, RowScaled)
        assert torch.equal(factor.values_RC * factor.scale_R[:, None], matrix)


def fed(engine: OffloadEngine) -> list[int]:
    """Fills with the number of tokens of each call of the first MoE block."""
    seen: list[int] = []
    first = next(engine.model.moe_blocks())
    first.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    return seen


@pytest.mark.parametrize("policy", list(Policy))
def test_a_long_prompt_is_read_in_chunks(small: Served, policy: Policy) -> None:
    """The last row's padding is longer than a chunk."""
    asked = decode(**prompts(4, length=23, padding=8))
    expected = generated(small.model.generate, asked)
    with OffloadEngine.open(small.directory, policy=policy, prefill_chunk=5) as engine:
        seen = fed(engine)
        assert_close(generated(engine.generate, asked), expected)
        assert seen == [4 * 5] * 4 + [4 * 3] + [4] * 3
        assert (engine.counters.bytes_moved > 0) == (policy is not Policy.gpu_only)
        assert_close(
            generated(engine.generate, asked | {"num_beams": 2}),
            generated(small.model.generate, asked | {"num_beams": 2}),
        )


def test_a_prompt_is_given_as_upstream_takes_it(small: Served) -> None:
    """By position or as `inputs`, and read in chunks as `input_ids` is."""
    ids, options = prompts(1, length=12)["input_ids"], {"max_new_tokens": 3, "do_sample": False}
    config = GenerationConfig.from_model_config(small.model.config)
    with OffloadEngine.open(small.directory, prefill_chunk=5) as engine:
        seen = fed(engine)
        for args, named in ((ids,), {}), ((ids, config), {}), ((), {"inputs": ids}), ((), {"input_ids": ids}):
            seen.clear()
            expected = small.model.generate(*args, **named, **options)
            assert torch.equal(engine.generate(*args, **named, **options), expected)
            assert seen == [5, 5, 2, 1, 1]


def test_who_reads_a_prompt_at_once(small: Served, served: Served, tmp_path: Path) -> None:
    asked = decode(**prompts(1, length=12))
    expected = generated(small.model.generate, asked)
    with OffloadEngine.open(small.directory, prefill_chunk=5) as engine:
        seen = fed(engine)
        for own, first in ({"prefill_chunk_size": 8}, 8), ({"use_cache": False}, 12), (decode(**prompts(1, 5)), 5):
            seen.clear()
            got = generated(engine.generate, asked | own)
            if "input_ids" not in own:
                assert_close(got, expected)
            assert seen[0] == first
    with OffloadEngine.open(small.directory) as engine:
        seen = fed(engine)
        assert_close(generated(engine.generate, asked), expected)
        assert seen[0] == 12
    # another kind of model has no prompt in front of what it generates
    with OffloadEngine.open(served.directory, prefill_chunk=1, pack_dir=tmp_path) as engine:
        asked = {"input_ids": torch.arange(2, 9)[None], "max_new_tokens": 3, "return_dict_in_generate": True}
        assert_same(
            generated(engine.generate, asked | {"output_logits": True}),
            generated(served.model.generate, asked | {"output_logits": True}),
        )


def test_all_but_the_experts_is_resident(small: Served) -> None:
    """Attention, norms, gates and tables lie on the device; of the experts only what is in slots."""
    spec = experts_of(small.model.config)
    experts = {name for block in range(3) for name in spec.tensors_of("decoder", block)}
    others = sum(p.nbytes for name, p in small.model.named_parameters() if name not in experts)
    others += sum(buffer.nbytes for buffer in small.model.buffers())
    with OffloadEngine.open(small.directory, device_budget="25%") as engine:
        expected = engine.expected_bytes()
        assert expected["non_expert"] == others and expected["slots"] == engine.num_slots * engine.slab_bytes
        assert not experts & dict(engine.model.named_parameters()).keys()
