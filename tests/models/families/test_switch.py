"""The Switch family against upstream (lookahead 0, bit for bit) and against a naive loop (lookahead 1 to 3)."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, SwitchTransformersForConditionalGeneration

from pregate import PreGatedSwitchTransformersConfig
from pregate.config import UsageError
from pregate.models.families import switch_layers
from pregate.models.family import config_of
from pregate.models.loading import load_resident, mark_conventional
from tests.make_switch_base import TINY, make
from tests.models.families.naive_switch import naive_logits
from tests.tiny import batch, geometry, layer_passes, pregated_model, upstream_model


def random_geometry(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    encoder_step, decoder_step = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    encoder_blocks, decoder_blocks = draw.choice([2, 3]), draw.choice([2, 3])
    return {
        "num_layers": encoder_step * encoder_blocks,
        "num_sparse_encoder_layers": encoder_blocks,
        "num_decoder_layers": decoder_step * decoder_blocks,
        "num_sparse_decoder_layers": decoder_blocks,
        "d_model": draw.choice([9, 16, 21]),
        "d_kv": draw.choice([3, 8]),
        "d_ff": draw.choice([7, 24]),
        "num_heads": draw.choice([1, 3]),
        "num_experts": draw.choice([1, 3, 8]),
        "expert_capacity": draw.choice([1, 2, 64]),
        "router_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Every gradient within `tolerance` of the largest entry of its tensor (or of the model's, where it is tiny)."""
    assert expected.keys() == actual.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    for name, want in expected.items():
        allowed = tolerance * max(want.abs().max().item(), 1e-2 * largest)
        worst = (actual[name] - want).abs().max().item()
        assert worst <= allowed, f"{name}: differs by {worst}, allowed {allowed}"


def same_weights(changes: dict[str, Any], seed: int, path: str) -> tuple[Any, Any]:
    source = upstream_model(seed, **changes)
    ours = pregated_model(seed + 1, lookahead=0, path=path, **changes)
    ours.load_state_dict(source.state_dict())
    return source, ours


@pytest.mark.parametrize("seed", range(12))
def test_lookahead_0_is_upstream_bit_for_bit(seed: int) -> None:
    changes = random_geometry(seed)
    source, ours = same_weights(changes, seed, "reference")
    inputs = batch(seed)
    results = []
    for model in (source, ours):
        output = model(**inputs)
        output.loss.backward()
        results.append((output.logits, gradients(model)))
    (expected_logits, expected), (logits, actual) = results
    assert torch.equal(expected_logits, logits)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


@pytest.mark.parametrize("seed", range(4))
def test_lookahead_0_training_mode_is_upstream_bit_for_bit(seed: int) -> None:
    """Dropout and jitter draw the same numbers in the same order, gradients included."""
    changes = {**random_geometry(seed), "dropout_rate": 0.1, "router_jitter_noise": 0.2}
    source, ours = same_weights(changes, seed, "reference")
    results = []
    for model in (source, ours):
        model.train()
        torch.manual_seed(seed)
        output = model(**batch(seed))
        output.loss.backward()
        results.append((output.logits, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_grouped_path_equals_the_reference_path_within_rounding(
    seed: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = random_geometry(seed)
    reference = pregated_model(seed, lookahead=1, path="reference", **changes).train(training)
    grouped = copy.deepcopy(reference)
    grouped.set_expert_path("grouped")
    calls: list[Any] = []
    fast = switch_layers.biased_attention
    monkeypatch.setattr(switch_layers, "biased_attention", lambda *args: calls.append(args) or fast(*args))
    for model in (reference, grouped):
        model(**batch(seed)).loss.backward()
    attentions = grouped.config.num_layers + 2 * grouped.config.num_decoder_layers
    assert len(calls) == (attentions if training else 0)
    assert_gradients_close(gradients(grouped), gradients(reference))


# --- the naive loop -------------------------------------------------------------------------------------------------


BOTH = ("encoder", "decoder")
CASES = [
    (lookahead, entry, stacks, capacity)
    for lookahead in (1, 2, 3)
    for entry in ("own", "embedding")
    for stacks, capacity in ((("encoder", "decoder"), 64), (("encoder",), 2), (("decoder",), 1))
]


LATE_CASES = [
    (lookahead, entry, BOTH if capacity > 1 else ("decoder",), capacity, weights, start)
    for lookahead, entry, capacity, weights, start in (
        (1, "own", 64, "late", 0),
        (1, "embedding", 2, "late", 0),
        (2, "own", 1, "late", 0),
        (2, "embedding", 64, "late", 1),
        (1, "own", 2, "late", 2),
        (1, "own", 64, "early", 1),
        (1, "embedding", 64, "early", 2),
        (2, "own", 1, "early", 1),
    )
]


@pytest.mark.parametrize(
    ("lookahead", "entry", "stacks", "capacity", "weights", "start", "gate"),
    [
        *((*case, "early", 0, "linear") for case in CASES),
        *((*case, "linear") for case in LATE_CASES),
        (1, "own", BOTH, 64, "early", 0, "mlp"),
        (2, "embedding", BOTH, 2, "late", 1, "mlp"),
    ],
)
def test_lookahead_equals_the_naive_loop(
    lookahead: int, entry: str, stacks: tuple[str, ...], capacity: int, weights: str, start: int, gate: str
) -> None:
    """Outputs and gradients of a training step, with padding, capacity overflow and a router bias."""
    changes = {
        "num_layers": 8,
        "num_sparse_encoder_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_decoder_layers": 4,
        "expert_capacity": capacity,
        "router_bias": lookahead == 2,
    }
    settings: dict[str, Any] = {"weights": weights, "start": start, "gate": gate}
    model = pregated_model(3, lookahead, stacks, entry, **settings, **changes).train()
    naive = copy.deepcopy(model)
    inputs = batch(5, size=2, source=6, target=5)
    decoder_ids = model._shift_right(inputs["labels"])
    loss = model(**inputs).loss
    expected_logits = naive_logits(naive, inputs["input_ids"], inputs["attention_mask"], decoder_ids)
    expected_loss = torch.nn.functional.cross_entropy(expected_logits.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected_loss.backward()
    assert_gradients_close(gradients(model), gradients(naive), tolerance=1e-4)
    slopes: list[Any] = [parameter.grad for gate in model.gates() for parameter in gate.parameters()]
    assert sum(name.endswith(".nonlinear.down") for name in gradients(model)) == (6 if gate == "mlp" else 0)
    assert all(slope is not None and slope.abs().max() > 0 for slope in slopes)


@pytest.mark.parametrize(
    ("lookahead", "entry", "weights", "start"),
    [
        *((lookahead, entry, "early", 0) for lookahead in range(4) for entry in ("own", "embedding")),
        *((1, "own", "late", 0), (2, "embedding", "late", 1), (1, "embedding", "early", 2)),
    ],
)
def test_cached_generation_equals_the_naive_loop(lookahead: int, entry: str, weights: str, start: int) -> None:
    """Greedy decoding with a cache gives the tokens of a naive forward pass over the whole prefix."""
    blocks = {"num_layers": 4, "num_sparse_encoder_layers": 4, "num_decoder_layers": 8, "num_sparse_decoder_layers": 4}
    model = pregated_model(11, lookahead, entry=entry, weights=weights, start=start, **blocks)
    inputs = batch(2, size=2, source=6)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    prefix = torch.zeros(2, 1, dtype=torch.long)
    for step_logits in tokens.logits:
        expected = naive_logits(model, inputs["input_ids"], inputs["attention_mask"], prefix)[:, -1]
        torch.testing.assert_close(step_logits, expected, rtol=1e-4, atol=1e-5)
        prefix = torch.cat([prefix, expected.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens.sequences, prefix)


def test_generation_modes_do_not_mix_rows() -> None:
    """Beams and samples of a batch equal those of each row alone, so routes follow their rows."""
    model = pregated_model(7, 1)
    ids = batch(4, padded=False)["input_ids"]
    together = model.generate(ids, num_beams=3, max_new_tokens=5, eos_token_id=None)
    alone = torch.cat([model.generate(row[None], num_beams=3, max_new_tokens=5, eos_token_id=None) for row in ids])
    assert torch.equal(together, alone)
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, max_new_tokens=5, eos_token_id=None)
    assert sampled.shape == (3, 6)


@pytest.mark.parametrize(
    ("lookahead", "weights", "start"),
    [(0, "early", 0), (1, "early", 0), (2, "early", 0), (1, "late", 0), (1, "late", 1)],
)
@pytest.mark.parametrize("entry", ["own", "embedding"])
def test_gradient_checkpointing_gives_the_same_gradients(lookahead: int, weights: str, start: int, entry: str) -> None:
    settings: dict[str, Any] = {"entry": entry, "weights": weights, "start": start}
    model = pregated_model(1, lookahead, **settings, dropout_rate=0.1, router_jitter_noise=0.1).train()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    once, twice = layer_passes(model), layer_passes(checkpointed)
    for candidate in (model, checkpointed):
        torch.manual_seed(0)
        candidate(**batch(1), output_router_logits=True, use_cache=False).loss.backward()
    expected, actual = gradients(model), gradients(checkpointed)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    assert len(once) == 12 and set(once.values()) == {1} and set(twice.values()) == {2}


def test_reentrant_gradient_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="use_reentrant=False"):
        pregated_model().gradient_checkpointing_enable({"use_reentrant": True})


def test_two_models_in_one_process_do_not_share_routes() -> None:
    first, second = pregated_model(1, 1), pregated_model(2, 2)
    inputs = batch(0)
    expected = first(**inputs).logits
    reentered = []

    def reenter(stack: str, block: int, routing: Any) -> None:
        if not reentered:
            reentered.append(second(**inputs).logits)
            first_again = copy.deepcopy(first)
            first_again.set_listener(None)
            assert torch.equal(first_again(**inputs).logits, expected)

    first.set_listener(reenter)
    assert torch.equal(first(**inputs).logits, expected)
    assert torch.equal(reentered[0], second(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("entry", "weights"), [("own", "early"), ("embedding", "early"), ("embedding", "late")])
def test_saves_and_loads_bit_exactly(tmp_path: Any, dtype: torch.dtype, entry: str, weights: str) -> None:
    model = pregated_model(4, 2, ("decoder",), entry, weights=weights).to(dtype)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True, dtype=dtype)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.config.pregating == model.config.pregating
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    # the same numbers at other addresses: BLAS may pick another kernel for an unaligned matrix, so not bit-equal
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    inputs = batch(0)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **tolerance)


def test_gates_sit_where_the_lookahead_says() -> None:
    model = pregated_model(0, 2, ("decoder",))
    seats = {
        (block.stack, block.index): (block.module.router is not None, block.module.target)
        for block in model.moe_blocks()
    }
    assert seats == {
        ("encoder", 0): (True, None),
        ("encoder", 1): (True, None),
        ("encoder", 2): (True, None),
        ("decoder", 0): (True, 2),
        ("decoder", 1): (True, None),
        ("decoder", 2): (False, None),
    }


def test_late_weights_and_a_start_seat_gates_too() -> None:
    late = pregated_model(
        0, 1, ("encoder",), "embedding", weights="late", start=1, num_layers=8, num_sparse_encoder_layers=4
    )
    early = pregated_model(0, 1, ("decoder",), start=1)
    seats = {
        model: [
            (block.module.router is not None, block.module.weighs, block.module.target)
            for block in model.moe_blocks()
            if [block.stack] == model.config.pregate["stacks"]
        ]
        for model in (late, early)
    }
    assert seats[late] == [(True, False, None), (True, True, 2), (True, True, 3), (True, True, None)]
    assert list(late.encoder.entry_gates) == ["1"] and not early.decoder.entry_gates
    assert seats[early] == [(True, False, None), (True, False, 2), (False, False, None)]


def test_listener_hears_each_route_before_its_block_runs() -> None:
    model = pregated_model(0, 1, entry="embedding")
    heard: list[tuple[str, int]] = []
    ran: list[tuple[str, int]] = []
    model.set_listener(lambda stack, block, routing: heard.append((stack, block)))
    for block in model.moe_blocks():
        key = (block.stack, block.index)
        block.module.experts.register_forward_pre_hook(lambda *_, key=key: ran.append(key) or None)
        block.module.experts.register_forward_pre_hook(
            lambda *_, key=key: None if key in heard else pytest.fail(str(key))
        )
    model(**batch(0))
    assert ran == heard == [(s, b) for s in ("encoder", "decoder") for b in range(3)]


def test_a_block_with_an_entry_gate_announces_its_own_route_first() -> None:
    """An engine fetches in the order of announcement, and the block that runs now is served before a later one."""
    model = pregated_model(0, 2)
    heard: list[tuple[str, int]] = []
    model.set_listener(lambda stack, block, routing: heard.append((stack, block)))
    model(**batch(0))
    assert heard == [(stack, block) for stack in ("encoder", "decoder") for block in (0, 2, 1)]


def test_a_config_that_cannot_be_built_is_told_in_one_sentence() -> None:
    good = {**geometry(), "model_type": "switch_transformers"}
    with pytest.raises(UsageError, match="d_model"):
        config_of({**good, "d_model": "wide"})


def test_a_lookahead_without_room_is_refused() -> None:
    with pytest.raises(UsageError, match="needs at least 4 MoE blocks in the encoder, which has 3"):
        PreGatedSwitchTransformersConfig(**geometry(), pregate={"lookahead": 3})
    with pytest.raises(
        UsageError, match=r"pregate\.start=2 .* needs at least 4 MoE blocks in the encoder, which has 3"
    ):
        PreGatedSwitchTransformersConfig(**geometry(), pregate={"lookahead": 1, "start": 2})


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_conventional_directory_of_either_form_opens_as_lookahead_0(tmp_path: Any, form: str) -> None:
    make(tmp_path / form, form=form, **TINY)
    ours = load_resident(tmp_path / form)
    source = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / form).eval()
    assert ours.config.pregating.lookahead == 0
    assert ours.state_dict().keys() == source.state_dict().keys()
    inputs = batch(0, vocab=ours.config.vocab_size)
    torch.testing.assert_close(ours(**inputs).logits, source(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_lookahead_0_model_saves_as_a_conventional_checkpoint(tmp_path: Any) -> None:
    model = pregated_model(2, 0)
    model.save_pretrained(tmp_path)
    mark_conventional(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is SwitchTransformersForConditionalGeneration
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_pre_gated_model_is_not_passed_off_as_conventional(tmp_path: Any) -> None:
    pregated_model(2, 1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be opened by a conventional class"):
        mark_conventional(tmp_path)
