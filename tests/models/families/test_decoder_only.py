"""Every decoder-only family against upstream's own model and against a naive hand-over of routes between its blocks.

A family is one row of `FAMILIES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    Glm4MoeForCausalLM,
    GptOssForCausalLM,
    GraniteMoeForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from pregate import OffloadEngine
from pregate.config import Policy, PreGateConfig
from pregate.conversion.tensor_plan import plan_moves
from pregate.conversion.write import convert
from pregate.engine.storage.slabs import SlabLayout
from pregate.engine.training_engine import TrainingEngine
from pregate.models.decoder_only import TopKGate
from pregate.models.family import Family, family_named
from pregate.models.loading import load_resident
from pregate.models.objectives import predicting
from pregate.models.pregated_models import Gate
from pregate.models.pregating import PreGating
from pregate.models.synthetic import synthetic_checkpoint

VOCABULARY, STACK = 61, "decoder"
LEFT, RIGHT = "left", "right"
ASKS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
}


class Row(NamedTuple):
    """upstream: its model class. settings: those of a random small model, beside `geometry`."""

    upstream: Any
    settings: Callable[[random.Random], dict[str, Any]]

    @property
    def family(self) -> Family:
        return family_named(self.upstream.config_class.model_type)


def geometry(draw: random.Random) -> dict[str, Any]:
    heads = draw.choice([2, 4])
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads,
        "intermediate_size": draw.choice([12, 20]),
        "num_hidden_layers": draw.choice([4, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([1, heads]),
        "num_experts_per_tok": draw.choice([2, 3]),
        "tie_word_embeddings": draw.random() < 0.5,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def olmoe(draw: random.Random) -> dict[str, Any]:
    return {
        "num_experts": draw.choice([4, 7]),
        "norm_topk_prob": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
        "clip_qkv": draw.choice([None, 0.5]),
    }


def mixtral(draw: random.Random) -> dict[str, Any]:
    return {
        "num_local_experts": draw.choice([4, 7]),
        "sliding_window": draw.choice([None, 4]),
        "head_dim": draw.choice([None, 12]),
        "router_jitter_noise": draw.choice([0.0, 0.2]),
    }


def granitemoe(draw: random.Random) -> dict[str, Any]:
    return {
        "num_local_experts": draw.choice([4, 7]),
        "attention_bias": draw.random() < 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": draw.choice([1.0, 1.7]),
    }


def with_dense_layers(draw: random.Random) -> dict[str, Any]:
    """For lookahead 3 four layers with experts remain."""
    dense = draw.choice([{}, {"mlp_only_layers": [1, 4]}, {"decoder_sparse_step": 2, "num_hidden_layers": 8}])
    return {"num_hidden_layers": 6, "num_experts": draw.choice([4, 7]), "moe_intermediate_size": 12, **dense}


def qwen2_moe(draw: random.Random) -> dict[str, Any]:
    return {
        "shared_expert_intermediate_size": 14,
        "norm_topk_prob": draw.random() < 0.5,
        "qkv_bias": draw.random() < 0.5,
        "use_sliding_window": draw.random() < 0.5,
        "sliding_window": 4,
        "max_window_layers": 3,
        **with_dense_layers(draw),
    }


def qwen3_moe(draw: random.Random) -> dict[str, Any]:
    return {
        "head_dim": 12,
        "norm_topk_prob": draw.random() < 0.5,
        "attention_bias": draw.random() < 0.5,
        "use_sliding_window": draw.random() < 0.5,
        "sliding_window": 4,
        **with_dense_layers(draw),
    }


def qwen3_5_moe(draw: random.Random) -> dict[str, Any]:
    return {
        "num_hidden_layers": 4,
        "full_attention_interval": draw.choice([2, 3]),
        "head_dim": 8,
        "linear_conv_kernel_dim": draw.choice([2, 4]),
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": draw.choice([2, 4]),
        "num_experts": draw.choice([4, 7]),
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 14,
    }


def dense_first(draw: random.Random) -> dict[str, Any]:
    dense = draw.choice([1, 2])
    return {
        "first_k_dense_replace": dense,
        "num_hidden_layers": dense + 4,
        "n_routed_experts": 8,
        "n_shared_experts": draw.choice([1, 2]),
        "moe_intermediate_size": 12,
        "routed_scaling_factor": 1.3,
        "n_group": draw.choice([2, 4]),
        "topk_group": 2,
        "attention_bias": draw.random() < 0.5,
    }


def latent_attention(draw: random.Random) -> dict[str, Any]:
    ranks = {"q_lora_rank": draw.choice([None, 12]), "kv_lora_rank": 10, "num_key_value_heads": None}
    return {**dense_first(draw), **ranks, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}


def deepseek_v2(draw: random.Random) -> dict[str, Any]:
    return {**latent_attention(draw), "topk_method": draw.choice(["greedy", "group_limited_greedy"])}


def deepseek_v3(draw: random.Random) -> dict[str, Any]:
    choices = {"norm_topk_prob": draw.random() < 0.5, "rope_interleave": draw.random() < 0.5}
    return {**latent_attention(draw), **choices}


def glm4_moe(draw: random.Random) -> dict[str, Any]:
    choices = {"norm_topk_prob": draw.random() < 0.5, "use_qk_norm": draw.random() < 0.5}
    return {**dense_first(draw), **choices, "head_dim": 12}


def gpt_oss(draw: random.Random) -> dict[str, Any]:
    clamp = {"swiglu_alpha": draw.choice([1.0, 1.702]), "swiglu_limit": draw.choice([0.3, 7.0])}
    return {**clamp, "num_local_experts": draw.choice([4, 7]), "head_dim": 12, "sliding_window": 4}


FAMILIES = {
    "olmoe": Row(OlmoeForCausalLM, olmoe),
    "mixtral": Row(MixtralForCausalLM, mixtral),
    "deepseek_v2": Row(DeepseekV2ForCausalLM, deepseek_v2),
    "deepseek_v3": Row(DeepseekV3ForCausalLM, deepseek_v3),
    "glm4_moe": Row(Glm4MoeForCausalLM, glm4_moe),
    "gpt_oss": Row(GptOssForCausalLM, gpt_oss),
    "granitemoe": Row(GraniteMoeForCausalLM, granitemoe),
    "qwen2_moe": Row(Qwen2MoeForCausalLM, qwen2_moe),
    "qwen3_moe": Row(Qwen3MoeForCausalLM, qwen3_moe),
    "qwen3_5_moe": Row(Qwen3_5MoeForCausalLM, qwen3_5_moe),
}
every_family = pytest.mark.parametrize("row", FAMILIES.values(), ids=FAMILIES)


# --- models ---------------------------------------------------------------------------------------------------------


def upstream_model(row: Row, seed: int) -> Any:
    """Upstream's model with random settings and weights, its biases and norms included."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = row.upstream(row.upstream.config_class(**{**geometry(draw), **row.settings(draw)}))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 1 or name.endswith("bias"):
                tensor += torch.empty_like(tensor).uniform_(-0.4, 0.4)
    model.set_experts_implementation("eager")
    return model.eval()


def gating(lookahead: int, entry: str = "own") -> PreGating:
    return PreGating(lookahead, entry=entry)


def moves(row: Row, upstream: Any, gating: PreGating) -> tuple[dict[str, str], dict[str, str]]:
    """What gates and norms of entry gates are called, and the tensors of upstream's model that they are from."""
    found = plan_moves(row.family, {STACK: row.family.moe_layers(upstream.config, STACK)}, gating)
    return (
        {name: origin for move in found for name, origin in move.renamed.items()},
        {name: origin for move in found for name, origin in move.copied.items()},
    )


def pregated(row: Row, upstream: Any, gating: PreGating) -> Any:
    """The pre-gated model with the weights of upstream's, as a conversion with copied gates gives it."""
    config = row.family.config(row.family.pregated_json(upstream.config.to_dict(), gating))
    model, state = row.family.model_class(config), dict(upstream.state_dict())
    for move in plan_moves(row.family, {STACK: row.family.moe_layers(upstream.config, STACK)}, gating):
        for name, origin in move.renamed.items():
            if origin in state:
                state[name] = state.pop(origin) if move.leaves else state[origin]
        state |= {name: state[origin] for name, origin in move.copied.items()}
    state |= {name: tensor for name, tensor in model.state_dict().items() if ".nonlinear." in name}
    model.load_state_dict(state)
    model.set_expert_path("reference")
    return model.eval()


def look_ahead(row: Row, upstream: Any, gating: PreGating) -> Any:
    """Give upstream's routers the recorded input of an earlier block, or of a norm of the embeddings."""
    N = gating.lookahead
    seen: list[Tensor] = []
    layers = [upstream.model.layers[number] for number in row.family.moe_layers(upstream.config, STACK)]
    upstream.model.register_forward_pre_hook(lambda *_: seen.clear())
    embedded: list[Tensor] = []

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        embedded[:] = [args[0] if args else kwargs["hidden_states"]]

    upstream.model.layers[0].register_forward_pre_hook(begin, with_kwargs=True)
    for block, layer in enumerate(layers):

        def decide(router: Any, args: Any, _: Any, block: int = block, layer: Any = layer) -> Any:
            seen.append(args[0])
            if block >= N:
                states = seen[block - N]
            elif gating.entry == "embedding":
                states = layer.get_submodule(row.family.norm)(embedded[0]).flatten(0, 1)
            else:
                states = args[0]
            return type(router).forward(router, states)

        layer.get_submodule(row.family.router).register_forward_hook(decide)
    return upstream


def batch(padding: str, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Random ids; all rows but the first are padded."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        cut = slice(0, row + 1) if padding == LEFT else slice(length - row - 1, None)
        ids[row, cut], mask[row, cut] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The logits in training mode, and the gradients of a random weighted sum of them."""
    model.train()
    torch.manual_seed(1)  # of jitter
    logits = model(**inputs, use_cache=False).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert logits.isfinite().all()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def generated(model: Any, padding: str, ask: str) -> Any:
    torch.manual_seed(3)
    asked = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True, **ASKS[ask]}
    return model.generate(**batch(padding), **asked)


def assert_same(one: Any, other: Any) -> None:
    """Of two generations: tokens and scores."""
    assert torch.equal(one.sequences, other.sequences) and one.sequences.shape[1] == 15
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.scores, other.scores, strict=True))


# --- what they compute ----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("seed", range(4))
def test_lookahead_0_is_upstream(row: Row, seed: int) -> None:
    upstream = upstream_model(row, seed)
    ours = pregated(row, upstream, gating(0))
    inputs = batch(LEFT if seed % 2 else RIGHT)
    logits, slopes = gradients(ours, inputs)
    expected, theirs = gradients(upstream, inputs)
    assert torch.equal(logits, expected)
    assert set(slopes) == set(theirs)
    for name, slope in theirs.items():
        assert slope is not None and torch.equal(slopes[name], slope), name
    assert theirs[f"model.layers.{row.family.moe_layers(ours.config, STACK)[1]}.{row.family.router}.weight"].any()


@every_family
@pytest.mark.parametrize(
    ("lookahead", "padding", "recompute"),
    [(1, RIGHT, True), (2, LEFT, True), (2, RIGHT, False), (3, LEFT, False)],
)
def test_gates_decide_ahead(row: Row, lookahead: int, padding: str, recompute: bool) -> None:
    upstream, ahead = upstream_model(row, lookahead), gating(lookahead)
    ours = pregated(row, upstream, ahead)
    if recompute:
        ours.gradient_checkpointing_enable()
    logits, slopes = gradients(ours, batch(padding))
    conventional = upstream(**batch(padding)).logits
    expected, theirs = gradients(look_ahead(row, upstream, ahead), batch(padding))
    assert torch.equal(logits, expected) and not torch.allclose(logits, conventional, atol=1e-2)
    renamed, _ = moves(row, upstream, ahead)
    for name, slope in slopes.items():
        other = theirs[renamed.get(name, name)]
        assert (slope - other).abs().max() <= 1e-4 * other.abs().max(), name  # added up in another order
    assert all(slopes[name].abs().max() > 0 for name in renamed if name in slopes)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
@torch.no_grad()
def test_autocast_leaves_routers_that_compute_in_float32_as_they_are(name: str) -> None:
    """Routers, pre-gates and entry gates, and routers that weigh: all that a training step in bf16 asks of them."""
    row = FAMILIES[name]
    late = PreGating(2, entry="embedding", weights="late", gate="mlp", gate_width=5)
    ours = pregated(row, upstream_model(row, 50), late)
    hidden = torch.randn(2, 40, ours.config.hidden_size, generator=torch.Generator().manual_seed(7))

    def asked(gate: Gate) -> list[Tensor]:
        routing = gate(hidden)
        parts = [*routing, gate.choices(routing.logits_BTE.flatten(0, 1))]
        return parts if isinstance(gate, TopKGate) else [*parts, gate.weigh(hidden, routing.expert_ids_BTK)]

    kinds = set()
    for gate in ours.gates():
        expected = asked(gate)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.mm(hidden[0], hidden[0].T).dtype is torch.bfloat16
            found = asked(gate)
        assert gate(hidden).logits_BTE.dtype is torch.float32 and all(map(torch.equal, found, expected))
        kinds.add(type(gate))
    assert len(kinds) == 2
    with torch.autocast("cpu", torch.bfloat16):
        seen = ours(**batch(RIGHT), output_router_logits=True).router_logits
    assert all(logits.dtype is torch.float32 and logits.isfinite().all() for logits in seen)


@every_family
@pytest.mark.parametrize(
    ("lookahead", "entry", "padding"),
    [(0, "own", LEFT), (1, "own", RIGHT), (2, "embedding", LEFT), (3, "own", LEFT)],
)
def test_generation(row: Row, lookahead: int, entry: str, padding: str) -> None:
    upstream, ahead = upstream_model(row, 10 + lookahead), gating(lookahead, entry)
    ours, naive = pregated(row, upstream, ahead), look_ahead(row, upstream, ahead)
    for ask in ASKS:
        assert_same(generated(ours, padding, ask), generated(naive, padding, ask))


@every_family
def test_every_way_to_the_loss_agrees(row: Row) -> None:
    """With upstream's loss, and with each other: all logits, those of some positions, and none at all."""
    upstream = upstream_model(row, 20)
    ours, inputs = pregated(row, upstream, gating(0)), batch(RIGHT)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    at, count = predicting(labels), int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        whole, expected = ours(**inputs, labels=labels), upstream(**inputs, labels=labels)
        torch.testing.assert_close(whole.loss, expected.loss)
        torch.testing.assert_close(ours(**inputs, labels=labels, loss_only=True).loss / count, expected.loss)
        torch.testing.assert_close(ours(**inputs, logits_at=at).logits, expected.logits[at])
        assert torch.equal(ours(**inputs, logits_to_keep=2).logits, upstream(**inputs, logits_to_keep=2).logits)
        seen = {"output_hidden_states": True, "output_router_logits": True}
        mine, theirs = ours(**inputs, **seen), upstream(**inputs, **seen)
    assert all(map(torch.equal, mine.hidden_states, theirs.hidden_states))
    assert len(mine.router_logits) == len(theirs.router_logits) == len(row.family.moe_layers(ours.config, STACK))
    for one, other in zip(mine.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(one.flatten(0, 1), other)


@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if row.family.objective.packs])
@pytest.mark.parametrize(("lookahead", "entry"), [(0, "own"), (2, "embedding")])
@torch.no_grad()
def test_packed_texts_do_not_see_each_other(name: str, lookahead: int, entry: str) -> None:
    """Both are longer than any sliding window."""
    row = FAMILIES[name]
    ours = pregated(row, upstream_model(row, 40), gating(lookahead, entry))
    first, second = torch.randint(2, VOCABULARY, (2, 1, 9), generator=torch.Generator().manual_seed(6))
    texts, places = torch.cat([first, second], 1), torch.arange(9).repeat(2)[None]
    alone = ours(second, use_cache=False).logits
    packed = ours(texts, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed[:, :9], ours(first, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[:, 9:], alone, rtol=1e-4, atol=1e-4)
    one_text = ours(texts, use_cache=False).logits
    assert packed.isfinite().all() and not torch.allclose(one_text[:, 9:], alone, atol=1e-2)


@every_family
@pytest.mark.parametrize("first", ["upstream", "ours"])
def test_experts_are_computed_as_by_upstreams_default(row: Row, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream keeps in a class whether its experts can be computed in several ways, and classes inherit it."""
    settings = geometry(draw := random.Random(0)) | row.settings(draw)
    models = {"upstream": row.upstream, "ours": row.family.model_class}
    for base in {*row.family.model_class.__mro__, *row.family.model_class.stack_class.__mro__}:
        if "_can_set_experts_implementation_cached_value" in vars(base):
            monkeypatch.delattr(base, "_can_set_experts_implementation_cached_value")
    found = {}
    for name in sorted(models, key=lambda name: name != first):
        config = models[name].config_class(**settings)
        found[name] = models[name](config).config._experts_implementation
    assert found == {"upstream": "grouped_mm", "ours": "grouped_mm"}


# --- how they are stored --------------------------------------------------------------------------------------------


def assert_opens_and_saves_again(row: Row, converted: Path, again: Path, expected: Any) -> None:
    """`converted` holds the model `expected` in bfloat16, and so does what upstream saves of it to `again`."""
    assert_equal_states(load_resident(converted), expected)
    opened = AutoModelForCausalLM.from_pretrained(converted)
    assert type(opened) is row.family.model_class and opened.dtype is torch.bfloat16
    assert_equal_states(opened, expected)
    opened.save_pretrained(again)
    assert_equal_states(AutoModelForCausalLM.from_pretrained(again), expected)


def stored_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


def assert_equal_states(one: Any, other: Any) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in theirs)


@every_family
@pytest.mark.parametrize(("layout", "shards"), [("hub", True), ("fused", False)])
def test_every_layout_is_converted_bit_by_bit(row: Row, layout: str, shards: bool, tmp_path: Path) -> None:
    """`hub`: as upstream saves, which is as the files of the hub are named. `fused`: as models in memory are."""
    upstream, size = upstream_model(row, 30 + shards).to(torch.bfloat16), 20_000 if shards else 10**9
    source, converted, again = (tmp_path / name for name in ("source", "converted", "again"))
    upstream.save_pretrained(source, save_original_format=layout == "hub", max_shard_size=size)
    convert(str(source), converted, PreGateConfig(lookahead=2), max_shard_bytes=size)
    assert all((len(list(place.glob("*.safetensors"))) > 1) == shards for place in (source, converted))
    expected = pregated(row, upstream, gating(2))
    assert_opens_and_saves_again(row, converted, again, expected)
    # named as upstream names them, but for the gates that are in other blocks
    before, after = stored_names(source), stored_names(converted)
    moved = [origin for origin in moves(row, upstream, gating(2))[0].values() if origin in upstream.state_dict()]
    assert len(before - after) == len(after - before) == len(moved) > 0
    assert all("pre_gate" in name for name in after - before)
    assert stored_names(again) == after
    expected.save_pretrained(again)  # a model that was never on disk is saved as the hub has it
    one_layout = len(row.family.experts(expected.config).layouts) == 1
    assert (stored_names(again) == after) == (layout == "hub" or one_layout)


@every_family
def test_random_weights_keep_activations_sane(row: Row, tmp_path: Path) -> None:
    """Those of benchmarks: every layer adds something, and no layer drowns the rest."""
    config = upstream_model(row, 60).config.to_dict() | {"hidden_size": 64, "tie_word_embeddings": False}
    source = synthetic_checkpoint(row.family, config, gating(1), torch.float32)
    with OffloadEngine.open(source, policy=Policy.gpu_only, pack_dir=tmp_path / "pack") as engine:
        output = engine.forward(**batch(RIGHT), output_hidden_states=True)
    states = [layer.std().item() for layer in output.hidden_states]
    assert all(0.3 < deviation < 3 for deviation in states), states
    assert 0.1 < output.logits.std() < 10


@every_family
def test_a_smaller_model_can_be_built(row: Row) -> None:
    """With fewer layers, and fewer experts than a token uses."""
    config = upstream_model(row, 70).config
    built = row.family.config(row.family.smaller(config.to_dict(), 0.75, 2))
    with torch.no_grad():
        model = row.family.model_class(built).eval()
        assert model(**batch(LEFT)).logits.isfinite().all()
    # dense layers that come first are all kept
    dense = getattr(config, "first_k_dense_replace", 0)
    assert len(model.model.layers) == dense + round(0.75 * (config.num_hidden_layers - dense))
    assert [len(block.module.experts.down_proj) for block in model.moe_blocks()] == [2] * len(list(model.moe_blocks()))


@every_family
def test_gradients_through_offloaded_experts_are_those_of_the_resident_model(row: Row, tmp_path: Path) -> None:
    """With fewer slots than a block uses, frozen experts, and routes of a block before."""
    model = pregated(row, upstream_model(row, 3), gating(1))
    model.save_pretrained(tmp_path)
    for block in model.moe_blocks():
        block.module.experts.requires_grad_(False)
    expected, theirs = gradients(model, batch(RIGHT))
    theirs = {name: slope for name, slope in theirs.items() if slope is not None}
    budget = f"{3 * SlabLayout.of(row.family.experts(model.config), torch.float32).slab_bytes}B"
    with TrainingEngine.open(tmp_path, device_budget=budget) as engine, engine.step():
        logits, slopes = gradients(engine.model, batch(RIGHT))
        assert engine.counters.bytes_moved > 0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert slopes.keys() == theirs.keys()
    for name, slope in theirs.items():
        found = slopes[name]
        assert found is not None and found.isfinite().all()
        torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()) + 1e-6, msg=name)
    assert all(slope.any() for name, slope in theirs.items() if "pre_gate" in name)
