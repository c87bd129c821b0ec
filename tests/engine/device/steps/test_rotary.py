"""The static step of decoder-only models in an engine: tokens and logits of upstream's greedy generation, for random
small models of each family that has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import CacheRule, Policy, SlabDtype, UsageError
from pregate.engine.device.device_engine import DeviceEngine
from pregate.engine.device.limits import slots_for
from pregate.engine.device.ops.residual_and_norm import norm
from pregate.engine.device.steps.registry import step_of
from pregate.engine.device.steps.rotary import RotaryDecoder
from pregate.engine.device.steps.static_norm import static_norm
from pregate.engine.storage.slabs import SlabLayout
from pregate.measure.servers import engine_server, forced_logits
from pregate.models.family import experts_of
from pregate.models.pregating import PreGating
from tests.engine.serving import as_stored
from tests.models.families.late import choosing_gates, hand_over, with_gates
from tests.models.families.test_decoder_only import (
    FAMILIES,
    VOCABULARY,
    Row,
    gating,
    pregated,
    upstream_model,
)
from tests.models.families.test_mlp_gates import stirred

STEPS = 7
CAPTURED = {name: row for name, row in FAMILIES.items() if row.family.step == "rotary"}
AHEAD = {
    "conventional": gating(0),
    "paper": gating(1),
    "embedding": gating(2, "embedding"),
    "late": PreGating(1, weights="late"),
    "late_start": PreGating(2, entry="embedding", weights="late", start=1),
    "start": PreGating(1, start=2),
}
QUICK = [(0, 4, "conventional"), (0, 1, "paper"), (1, 4, "embedding")]
"""Of seeds, rows and gatings: those that are always tested."""
SLOW = [(1, 1, "conventional"), (0, 4, "late"), (1, 1, "late_start"), (0, 4, "start")]
"""With those above: each gating, and each number of rows with and without a cache (of odd seeds)."""
captured_families = pytest.mark.parametrize("row", CAPTURED.values(), ids=CAPTURED)


def prompts(rows: int, length: int = 9, seed: int = 5) -> dict[str, Tensor]:
    """All rows but the first are padded on the left; of the last only one token is none."""
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : min(row + 1, length - 1) if row < rows - 1 else length - 1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generated(generate: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and logits (step, B, V)."""
    asked = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    asked |= {"return_dict_in_generate": True, "output_logits": True, "repetition_penalty": 1.3}
    found = generate(**inputs, **(asked | options))
    return found.sequences, torch.stack(found.logits)


def assert_equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert expected[1].isfinite().all()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[0], expected[0]), f"{got[0]}\n{expected[0]}"


def saved(row: Row, seed: int, ahead: PreGating, directory: Path) -> tuple[Any, Any]:
    """Upstream's model, routed ahead by a naive hand-over, and ours, which is saved too."""
    upstream = upstream_model(row, seed)
    gates = choosing_gates(row, upstream, ahead)
    ours = with_gates(row, pregated(row, upstream, ahead), gates)
    ours.save_pretrained(directory)
    return hand_over(row, upstream, gates, ahead), ours


def test_these_families_are_captured() -> None:
    assert {"olmoe", "mixtral", "granitemoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "glm4_moe"} <= set(CAPTURED)
    assert all(step_of(row.family.config({"model_type": name})) is RotaryDecoder for name, row in CAPTURED.items())


@captured_families
@pytest.mark.parametrize(
    ("seed", "rows", "ahead"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_steps_are_upstreams_greedy_generation(tmp_path: Path, row: Row, seed: int, rows: int, ahead: str) -> None:
    """Each policy, with room for one row, place and token more than is used."""
    assert_steps(tmp_path, row, seed, rows, ahead)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "glm4_moe"])
def test_late_weights_and_a_later_start(tmp_path: Path, name: str) -> None:
    """Softmax before top-k, behind it, and sigmoids with a correction bias."""
    assert_steps(tmp_path, CAPTURED[name], 2, 4, "late_start")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "glm4_moe" else pytest.mark.slow) for name in CAPTURED]
)
def test_networks_beside_the_linear_maps_of_gates(tmp_path: Path, name: str) -> None:
    """What they add is held against upstream's rule elsewhere; here steps are held against the resident model."""
    asked = PreGating(1, entry="embedding", weights="late", gate="mlp", gate_width=6)
    upstream = upstream_model(CAPTURED[name], 214)
    ours = stirred(pregated(CAPTURED[name], upstream, asked))
    ours.save_pretrained(tmp_path)
    inputs = prompts(4)
    expected = generated(ours.generate, inputs)
    linear = generated(pregated(CAPTURED[name], upstream, replace(asked, gate="linear")).generate, inputs)
    assert not torch.equal(expected[1], linear[1])
    sizes = {"batch": 5, "max_source_len": 10, "max_new_tokens": STEPS}
    with DeviceEngine.open(tmp_path, policy=Policy.pre_gated, **sizes) as engine:
        assert_equal(generated(engine.generate, inputs), expected)
        assert engine.counters.bytes_moved > 0


def assert_steps(tmp_path: Path, row: Row, seed: int, rows: int, ahead: str) -> None:
    upstream, ours = saved(row, 100 * seed + 10 * AHEAD[ahead].lookahead + rows, AHEAD[ahead], tmp_path)
    inputs = prompts(rows)
    expected = generated(upstream.generate, inputs)
    for policy in Policy:
        sizes = {"batch": rows + 1, "max_source_len": 10, "max_new_tokens": STEPS + 1}
        cache = CacheRule.lru if seed % 2 else CacheRule.none
        with DeviceEngine.open(tmp_path, policy=policy, cache=cache, **sizes) as engine:
            for _ in range(2):
                assert_equal(generated(engine.generate, inputs), expected)
            assert (engine.counters.bytes_moved > 0) == (policy is not Policy.gpu_only)
    asked = ours.config.pregating
    assert (asked.lookahead, asked.weights, asked.start) == (
        AHEAD[ahead].lookahead,
        AHEAD[ahead].weights,
        AHEAD[ahead].start,
    )


@captured_families
@pytest.mark.parametrize("slab_dtype", [SlabDtype.int8, SlabDtype.fp8])
def test_quantised_slabs(tmp_path: Path, row: Row, slab_dtype: SlabDtype) -> None:
    """Within the fewest slots that any step can do with."""
    _, ours = saved(row, 3, gating(1), tmp_path)
    layout = SlabLayout.of(experts_of(ours.config), torch.float32, slab_dtype)
    expected = generated(as_stored(ours, layout).generate, prompts(2))
    slots = 2 * min(2 * experts_of(ours.config).top_k, experts_of(ours.config).num_experts)
    budget = f"{slots * layout.slab_bytes}B"
    sizes = {"batch": 2, "max_source_len": 9, "max_new_tokens": STEPS}
    with DeviceEngine.open(tmp_path, slab_dtype=slab_dtype, device_budget=budget, **sizes) as engine:
        assert engine.num_slots == slots
        assert_equal(generated(engine.generate, prompts(2)), expected)
        assert engine.counters.bytes_moved > 0


@captured_families
def test_bfloat16(tmp_path: Path, row: Row) -> None:
    """Logits of the same tokens, as a near tie may choose another one, are no further than upstream's in bfloat16 from
    those in float32, over a few random models: in one, a route that is a near tie decides how far."""
    found = torch.tensor([distances(row, seed, tmp_path / str(seed)) for seed in range(4, 8)])
    difference, usual = found.mean(0)
    assert difference <= 1.25 * usual < 0.1, f"{difference} {usual}: {found}"


def distances(row: Row, seed: int, directory: Path) -> list[Tensor]:
    """How far the logits of a captured step and of the resident model, both in bfloat16, are from those in float32."""
    _, ours = saved(row, seed, gating(1), directory)
    ours = ours.to(torch.bfloat16)
    ours.save_pretrained(directory)
    inputs = prompts(2)
    tokens, expected = generated(ours.generate, inputs)
    with DeviceEngine.open(directory, batch=2, max_source_len=9, max_new_tokens=STEPS) as engine:
        generated(engine.generate, inputs)
        assert engine.counters.bytes_moved > 0
        with engine_server(engine, torch.device("cpu")) as server:
            logits = server.logits(inputs, tokens[:, :-1])
    assert logits.shape == (2, 9 + STEPS - 1, VOCABULARY) and logits.isfinite().all()
    exact = forced_logits(ours.float(), row.family.objective, inputs, tokens[:, :-1])[:, -STEPS:]
    return [(narrow - exact).norm() / exact.norm() for narrow in (logits[:, -STEPS:], expected.transpose(0, 1))]


@captured_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_single_launches_that_round_as_the_models_do(row: Row, dtype: torch.dtype) -> None:
    norms = [part for part in upstream_model(row, 1).to(dtype).modules() if "RMSNorm" in type(part).__name__]
    assert len(norms) > 8
    for module in norms:
        launch = static_norm(module, dtype)
        hidden = torch.randn(3, 1, module.weight.numel(), generator=torch.Generator().manual_seed(1)).to(dtype)
        assert launch is not module and torch.equal(launch(hidden), module(hidden))


def test_a_norm_of_another_kind_is_called() -> None:
    class OneMore(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, hidden: Tensor) -> Tensor:
            return norm(hidden, 1 + self.weight, self.variance_epsilon)

    class Gated(OneMore):
        def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(hidden * gate)

    for module in (OneMore(), Gated(), torch.nn.LayerNorm(8), torch.nn.Identity()):
        assert static_norm(module, torch.float32) is module


def test_a_prompt_of_one_token_and_rows_that_end(tmp_path: Path) -> None:
    """Nothing is read ahead of the first step, and the end of a row pads what follows."""
    upstream, _ = saved(CAPTURED["olmoe"], 1, gating(1), tmp_path)
    inputs = prompts(3, length=1)
    with DeviceEngine.open(tmp_path, batch=4, max_source_len=3, max_new_tokens=STEPS) as engine:
        free = generated(upstream.generate, inputs)
        assert_equal(generated(engine.generate, inputs), free)
        ends = int(free[0][0, 3])
        options = {"eos_token_id": ends, "pad_token_id": 0, "output_logits": False}
        wanted = upstream.generate(**inputs, do_sample=False, repetition_penalty=1.3, max_new_tokens=STEPS, **options)
        got = engine.generate(**inputs, do_sample=False, repetition_penalty=1.3, max_new_tokens=STEPS, **options)
        assert torch.equal(got, wanted), f"{got}\n{wanted}"
        assert (wanted == ends).any()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_longer_request_after_a_shorter_one(tmp_path: Path, name: str) -> None:
    """What a request leaves in the caches, NaN too, and the host's own calls in between, change nothing. A window of 4
    places is longer than some prompts."""
    upstream, ours = saved(CAPTURED[name], 2, gating(1), tmp_path)
    assert ours.config.sliding_window == 4
    with DeviceEngine.open(tmp_path, batch=4, max_source_len=12, max_new_tokens=STEPS) as engine:
        for rows, length in ((4, 12), (1, 3), (3, 9), (4, 12)):
            inputs = prompts(rows, length, seed=length)
            for cache_2BGTC in engine.decoder._caches:
                cache_2BGTC.fill_(torch.nan)
            assert_equal(generated(engine.generate, inputs), generated(upstream.generate, inputs))
            assert engine.counters.bytes_moved > 0
            torch.testing.assert_close(
                engine.forward(**inputs).logits[:, -1], upstream(**inputs).logits[:, -1], rtol=1e-4, atol=1e-4
            )


def test_another_correction_bias_is_noticed(tmp_path: Path) -> None:
    """It is a buffer, which a captured step reads where it lay."""
    upstream, _ = saved(CAPTURED["glm4_moe"], 1, gating(0), tmp_path)
    inputs = prompts(2)
    with DeviceEngine.open(tmp_path, batch=2, max_source_len=9, max_new_tokens=STEPS) as engine:
        before = generated(engine.generate, inputs)
        assert not engine.decoder.has_changed()
        for block in engine.model.moe_blocks():
            other = block.gates.e_score_correction_bias.flip(0)
            block.gates.e_score_correction_bias = other
            upstream.model.layers[block.layer].mlp.gate.e_score_correction_bias = other
        assert engine.decoder.has_changed() and not engine.decoder.has_changed()
        after = generated(engine.generate, inputs)
        assert_equal(after, generated(upstream.generate, inputs))
        assert not torch.equal(after[1], before[1])


def test_lengths_count_the_prompt(tmp_path: Path) -> None:
    _, ours = saved(CAPTURED["olmoe"], 1, gating(0), tmp_path)
    inputs = prompts(2)
    with DeviceEngine.open(tmp_path, batch=2, max_source_len=9, max_new_tokens=STEPS) as engine:
        asked = {"do_sample": False, "max_length": 12, "min_length": 11}
        first = int(ours.generate(**inputs, **asked)[0, 9])
        for ends in (None, first):
            wanted = ours.generate(**inputs, **asked, eos_token_id=ends)
            assert torch.equal(engine.generate(**inputs, **asked, eos_token_id=ends), wanted)
        assert wanted.shape[1] >= 11


# --- what is refused ------------------------------------------------------------------------------------------------


def test_padding_on_the_right_is_refused(tmp_path: Path) -> None:
    saved(CAPTURED["olmoe"], 1, gating(0), tmp_path)
    inputs = prompts(2)
    inputs["attention_mask"][1, -1] = 0
    with (
        DeviceEngine.open(tmp_path, batch=2, max_source_len=9, max_new_tokens=2) as engine,
        pytest.raises(UsageError, match="ends in padding: pad the rows of a decoder-only model on the left"),
    ):
        engine.generate(**inputs)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(CAPTURED)))
def test_other_kinds_of_attention_are_left_to_the_host(name: str) -> None:
    with pytest.raises(UsageError, match=f"no decoding step for a '{name}.*' model: use engine.drive=host"):
        step_of(upstream_config(FAMILIES[name]))


def upstream_config(row: Row, **changes: Any) -> Any:
    upstream = upstream_model(row, 0)
    return row.family.config({**row.family.pregated_json(upstream.config.to_dict(), gating(0)), **changes})


def test_frequencies_that_follow_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UsageError, match=r"no rotary embeddings of the type 'dynamic', only .*: use engine.drive=host"):
        step_of(upstream_config(CAPTURED["olmoe"], rope_parameters=rope))


def test_more_choices_than_a_fetch_looks_at_are_refused() -> None:
    config = upstream_config(CAPTURED["olmoe"], num_experts=64, num_experts_per_tok=16)
    with pytest.raises(UsageError, match="17 rows choose 16 experts each: serve 16 rows or fewer"):
        slots_for(None, Policy.pre_gated, config, 4096, batch=17)
    assert slots_for(None, Policy.pre_gated, config, 4096, batch=16) > 0
