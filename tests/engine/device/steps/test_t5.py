"""The static step alone, with experts that never move: tokens and logits of Hugging Face greedy generation."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor

from pregate.engine.device.sampler_state import Sampling
from pregate.engine.device.steps.t5 import StaticDecoder
from pregate.models.family import config_of
from tests.engine.device.stepping import ResidentExperts, assert_equal_while_live, decode
from tests.tiny import batch, pregated_model, upstream_model

NEVER_AGAIN = 1e6
"""A repetition penalty, or the tiny models would repeat one token for ever."""
ATOL = {torch.float32: 2e-5, torch.bfloat16: 0.13}
"""Float32: sums over a cache with room to spare run in another order. bfloat16: then a rounding more or less, of
logits up to 18, which bfloat16 holds to 0.125."""


ODD_WIDTH = {
    "seed": 0,
    "stacks": ("encoder", "decoder"),
    "lookahead": 0,
    "entry": "own",
    "num_experts": 1,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 2,
    "d_model": 20,
    "num_heads": 1,
    "d_kv": 5,
    "d_ff": 41,
    "tie_word_embeddings": False,
    "relative_attention_num_buckets": 8,
}


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Options of `pregated_model`: odd widths, heads, depths, expert counts, lookaheads and stacks."""
    stacks = draw(st.sampled_from([("encoder", "decoder"), ("decoder",), ("encoder",)]))
    blocks = {"encoder": draw(st.integers(1, 4)), "decoder": draw(st.integers(1, 4))}
    step = draw(st.sampled_from([1, 2]))
    most_ahead = min(3, *(blocks[stack] - 1 for stack in stacks))
    return {
        "seed": draw(st.integers(0, 2**16)),
        "stacks": stacks,
        "lookahead": draw(st.integers(0, most_ahead)),
        "entry": draw(st.sampled_from(["own", "embedding"])),
        "num_experts": draw(st.integers(1, 7)),
        "num_layers": step * blocks["encoder"],
        "num_decoder_layers": step * blocks["decoder"],
        "num_sparse_encoder_layers": blocks["encoder"],
        "num_sparse_decoder_layers": blocks["decoder"],
        "d_model": draw(st.sampled_from([20, 33, 64])),
        "num_heads": draw(st.integers(1, 4)),
        "d_kv": draw(st.sampled_from([5, 8])),
        "d_ff": draw(st.sampled_from([28, 41])),
        "tie_word_embeddings": draw(st.booleans()),
        "relative_attention_num_buckets": draw(st.sampled_from([8, 32])),
    }


def reference(model: Any, inputs: dict[str, Tensor], steps: int, eos: int | None, penalty: float = NEVER_AGAIN) -> Any:
    found = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        num_beams=1,
        repetition_penalty=penalty,
        eos_token_id=eos,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.sequences, torch.stack(found.logits)


def inputs_of(seed: int, size: int, source: int = 9) -> dict[str, Tensor]:
    inputs = batch(seed, size=size, source=source)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@given(
    options=models(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.one_of(st.integers(1, 4), st.just(32)),
    seed=st.integers(0, 2**16),
    spare=st.integers(0, 5),
    ends=st.booleans(),
)
@example(options=ODD_WIDTH, dtype=torch.bfloat16, size=32, seed=0, spare=0, ends=True)
@settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")
# oneDNN's bfloat16 products on processors with AMX (torch 2.13) read the first number of the next row, times 0, where
# the inner width is odd: the NaN of `ResidentExperts` would come into a row that lives from the library, not the step
@torch.backends.mkldnn.flags(enabled=False)
def test_steps_equal_hugging_face(
    options: dict[str, Any], dtype: torch.dtype, size: int, seed: int, spare: int, ends: bool
) -> None:
    """Rows padded to different lengths, room for more rows, places and tokens than are used, rows that end early. Of a
    step that bfloat16 cannot tell from a tie, another token is accepted; that is rare."""
    steps = 10
    model = pregated_model(**options).to(dtype)
    inputs = inputs_of(seed, size)
    eos = None
    if ends:
        # whatever comes third in row 0 ends every row that meets it
        eos = int(reference(model, inputs, steps, None)[0][0, 3])
    wanted = reference(model, inputs, steps, eos)
    experts = ResidentExperts(model)
    static = StaticDecoder(model, experts, batch=size + spare, max_source_len=9 + spare, max_new_tokens=steps + spare)
    sampling = Sampling(repetition_penalty=NEVER_AGAIN, eos=() if eos is None else (eos,))
    got = decode(static, model, inputs, sampling, steps=wanted[1].shape[0])
    ties = 0.0 if dtype is torch.float32 else 2 * ATOL[dtype]
    compared = assert_equal_while_live(got, wanted, eos, ATOL[dtype], ties)
    if eos is None:
        assert compared >= 0.8 * wanted[1].shape[0] * size, f"{compared} of {wanted[1].shape[0] * size} steps compared"
    if dtype is torch.float32:
        assert torch.equal(got[0], wanted[0]), f"static step:\n{got[0]}\nHugging Face:\n{wanted[0]}"


@pytest.mark.parametrize("entry", ["own", "embedding"])
@pytest.mark.parametrize(("lookahead", "start"), [(1, 0), (1, 2), (2, 1)])
def test_weights_of_the_blocks_own_router_and_a_later_start(lookahead: int, start: int, entry: str) -> None:
    depth = dict.fromkeys(("num_layers", "num_decoder_layers"), 4)
    depth |= dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 4)
    gates: dict[str, Any] = {"lookahead": lookahead, "start": start, "entry": entry}
    model = pregated_model(7, weights="late", **gates, **depth)
    inputs = inputs_of(3, 3)
    static = StaticDecoder(model, ResidentExperts(model), batch=3, max_source_len=9, max_new_tokens=8)
    got = decode(static, model, inputs, Sampling(repetition_penalty=NEVER_AGAIN), 8)
    wanted = reference(model, inputs, 8, None)
    assert assert_equal_while_live(got, wanted, None, ATOL[torch.float32]) == 24
    early = reference(pregated_model(7, **gates, **depth), inputs, 8, None)
    assert not torch.equal(early[1], wanted[1]) and wanted[1].isfinite().all()


@pytest.mark.parametrize(
    ("entry", "weights", "dtype"), [("own", "early", torch.float32), ("embedding", "late", torch.bfloat16)]
)
def test_networks_beside_the_linear_maps_of_gates(entry: str, weights: str, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"entry": entry, "weights": weights}
    model = pregated_model(7, 1, gate="mlp", **settings).to(dtype)
    inputs = inputs_of(3, 3)
    wanted, linear = (reference(m, inputs, 8, None) for m in (model, without_networks(model)))
    assert not torch.equal(linear[1], wanted[1]) and wanted[1].isfinite().all()
    static = StaticDecoder(model, ResidentExperts(model), batch=3, max_source_len=9, max_new_tokens=8)
    got = decode(static, model, inputs, Sampling(repetition_penalty=NEVER_AGAIN), 8)
    ties = 0.0 if dtype is torch.float32 else 2 * ATOL[dtype]
    assert assert_equal_while_live(got, wanted, None, ATOL[dtype], ties) >= 20
    assert all(gate.nonlinear.up.dtype == gate.dtype for gate in model.gates("decoder") if gate.nonlinear is not None)


def without_networks(model: Any) -> Any:
    linear = copy.deepcopy(model)
    for gate in linear.gates():
        gate.nonlinear = None
    return linear


def test_a_conventional_upstream_model_too() -> None:
    from pregate import PreGatedSwitchTransformersForConditionalGeneration

    upstream = upstream_model(5)
    config = config_of(upstream.config.to_dict())
    model: Any = PreGatedSwitchTransformersForConditionalGeneration(config).eval()
    model.load_state_dict(upstream.state_dict())
    inputs = inputs_of(1, 3)
    static = StaticDecoder(model, ResidentExperts(model), batch=3, max_source_len=9, max_new_tokens=8)
    got = decode(static, model, inputs, Sampling(repetition_penalty=NEVER_AGAIN), 8)
    assert_equal_while_live(got, reference(upstream, inputs, 8, None), None, ATOL[torch.float32])


def test_positions_beyond_the_farthest_bucket() -> None:
    """More tokens than the relative bias tells apart (16 here), so the last bucket is used too."""
    model = pregated_model(2, 1)
    inputs = inputs_of(2, 2)
    static = StaticDecoder(model, ResidentExperts(model), batch=2, max_source_len=9, max_new_tokens=40)
    got = decode(static, model, inputs, Sampling(repetition_penalty=NEVER_AGAIN), 40)
    assert_equal_while_live(got, reference(model, inputs, 40, None), None, ATOL[torch.float32])


def test_a_request_leaves_nothing_to_the_next() -> None:
    """A long wide one, then a short narrow one: as if nothing had been before."""
    model = pregated_model(4, 1)
    static = StaticDecoder(model, ResidentExperts(model), batch=4, max_source_len=12, max_new_tokens=12)
    sampling = Sampling(repetition_penalty=NEVER_AGAIN)
    inputs = inputs_of(1, 2, source=5)
    wanted = reference(model, inputs, 7, None)
    caches = static._layers[0].attention.cache_2BHTC, static._layers[0].cross.cache_2BHSC
    # a prompt whose states are not finite leaves NaN in every place
    for factor in (1.0, torch.nan):
        long = inputs_of(0, 4, source=12)
        states = model.encoder(**long).last_hidden_state * factor
        static.begin(states, long["attention_mask"], sampling)
        for _ in range(12):
            static.step(sampling.kind)
        assert all((cache != 0).all() for cache in caches), "nothing was left over, so this test says nothing"
        got = decode(static, model, inputs, sampling, 7)
        assert_equal_while_live(got, wanted, None, ATOL[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_half_precision_guard(dtype: torch.dtype) -> None:
    """float16 states are kept finite where the model keeps them finite."""
    model = pregated_model(1, 1).to(dtype)
    model.decoder.block[0].layer[-1].mlp.wo.weight.data.fill_(3e4)
    inputs = inputs_of(3, 2)
    static = StaticDecoder(model, ResidentExperts(model), batch=2, max_source_len=9, max_new_tokens=3)
    got = decode(static, model, inputs, Sampling(), 3)
    wanted = reference(model, inputs, 3, None, penalty=1.0)
    assert got[1].isfinite().all()
    assert torch.allclose(got[1][0], wanted[1][0], rtol=1e-2, atol=0.05), f"{got[1][0]}\n{wanted[1][0]}"


@pytest.mark.parametrize(
    ("gating", "order"),
    [
        ({"lookahead": 0}, "c0 r0 c1 r1 c2 r2"),
        ({"lookahead": 1}, "c0 c1 r0 c2 r1 r2"),
        ({"lookahead": 1, "entry": "embedding"}, "c0 c1 r0 c2 r1 r2"),
        ({"lookahead": 2}, "c0 c2 r0 c1 r1 r2"),
        ({"lookahead": 2, "entry": "embedding"}, "c0 c1 c2 r0 r1 r2"),
    ],
)
def test_routes_are_committed_as_early_as_they_are_known(gating: dict[str, Any], order: str) -> None:
    model = pregated_model(0, **gating)
    experts = ResidentExperts(model)
    static = StaticDecoder(model, experts, batch=2, max_source_len=9, max_new_tokens=2)
    decode(static, model, inputs_of(0, 2), Sampling(), 2)
    names = " ".join(f"{what[0]}{block}" for what, block in experts.calls if what != "begin")
    assert names == f"{order} {order}"


def test_parameters_stay_the_models_own() -> None:
    """Laid out anew, but not twice in memory, and the model still computes the same."""
    model = pregated_model(0, 1).to(torch.bfloat16)
    inputs = inputs_of(0, 2)
    before = reference(model, inputs, 4, None)
    size = sum(p.nbytes for p in model.parameters())
    gates = sum(p.nbytes for name, p in model.decoder.named_parameters() if "classifier" in name)
    StaticDecoder(model, ResidentExperts(model), batch=2, max_source_len=9, max_new_tokens=4)
    attention = model.decoder.block[0].layer[0].SelfAttention
    parts = [attention.q.weight, attention.k.weight, attention.v.weight]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert sum(p.nbytes for p in model.parameters()) == size + gates  # float32 for bfloat16
    after = reference(model, inputs, 4, None)
    assert_equal_while_live(after, before, None, ATOL[torch.bfloat16], ties=0.3)
