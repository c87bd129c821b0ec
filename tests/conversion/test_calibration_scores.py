"""Calibration of routers that do not choose their largest logits: sigmoid scores, groups, a correction bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from pregate.config import CalibrationConfig, Init, PreGateConfig, Run, Through
from pregate.conversion.calibrate import through_engine
from pregate.conversion.calibrate.examples import Batches
from pregate.conversion.calibrate.flow import calibrate
from pregate.conversion.calibrate.gate_fit import Regression
from pregate.models.family import family_of_model
from pregate.models.loading import load_resident
from pregate.models.routing import ScoreFunction
from pregate.tasks.tokens import Collator
from tests.training.copying import FirstWords, short_run, word_tokenizer

E, K, GROUPS = 8, 3, 4
BIAS = "e_score_correction_bias"
SHAPE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_group": GROUPS,
    "topk_group": 2,
    "n_shared_experts": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def deepseek_v2(directory: Path) -> None:
    torch.manual_seed(0)
    config = DeepseekV2Config(**SHAPE, topk_method="group_limited_greedy")
    DeepseekV2ForCausalLM(config).save_pretrained(directory)


def deepseek_v3(directory: Path) -> None:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE))
    for name, bias in model.named_buffers():
        if name.endswith(BIAS):
            bias.copy_(0.2 * torch.randn(E))
    model.save_pretrained(directory)


def limited(scores: list[float], group: list[float]) -> set[int]:
    """The K best experts of the two best groups."""
    size = E // GROUPS
    best = sorted(range(GROUPS), key=lambda g: -group[g])[:2]
    return set(sorted((e for e in range(E) if e // size in best), key=lambda e: -scores[e])[:K])


def chosen_v2(logits_E: Tensor, _: Tensor | None) -> set[int]:
    scores = logits_E.softmax(-1).tolist()
    return limited(scores, [max(scores[2 * g : 2 * g + 2]) for g in range(GROUPS)])


def chosen_v3(logits_E: Tensor, bias_E: Tensor | None) -> set[int]:
    assert bias_E is not None
    scores = (logits_E.sigmoid() + bias_E).tolist()
    return limited(scores, [sum(scores[2 * g : 2 * g + 2]) for g in range(GROUPS)])


def largest(logits_E: Tensor, _: Tensor | None) -> set[int]:
    return set(logits_E.topk(K).indices.tolist())


def settings(through: Through) -> Run:
    run = short_run()
    run.pregate = PreGateConfig(init=Init.calibrated)
    run.calibration = CalibrationConfig(steps=3, batch_size=14, through=through)
    return run


@pytest.mark.parametrize(
    ("make", "choose", "through"),
    [
        (deepseek_v3, chosen_v3, Through.engine),
        (deepseek_v3, chosen_v3, Through.memory),
        (deepseek_v2, chosen_v2, Through.engine),
    ],
)
def test_the_agreement_is_that_of_the_routes(make: Any, choose: Any, through: Through, tmp_path: Path) -> None:
    make(tmp_path / "source")
    run = settings(through)
    _, found = calibrate(run, str(tmp_path / "source"), tmp_path / "out", FirstWords(), word_tokenizer())  # type: ignore[arg-type]
    source, ahead = load_resident(tmp_path / "source"), load_resident(tmp_path / "out")
    biases = [getattr(block.gates.router.linear, BIAS, None) for block in source.moe_blocks()]
    collate = Collator.for_task(run.task, word_tokenizer(), family_of_model(source).objective)
    batches = Batches.of(FirstWords().examples("train"), collate, run.calibration, run.seed)
    shares: dict[Any, list[list[float]]] = {choose: [], largest: []}
    with torch.no_grad():
        for batch in batches.held_out:
            pair = [
                m(**batch.inputs, output_router_logits=True, use_cache=False).router_logits for m in (ahead, source)
            ]
            for row, t in batch.counted["decoder"].nonzero().tolist():
                for rule, told in shares.items():
                    routes = [[rule(b[row, t], bias) for b, bias in zip(m, biases, strict=True)] for m in pair]
                    told.append([len(a & b) / K for a, b in zip(*routes, strict=True)])
    naive, wrong = ([sum(block) / len(block) for block in zip(*told, strict=True)] for told in shares.values())
    assert found.after["decoder"] == pytest.approx(naive)
    assert found.after["decoder"] != pytest.approx(wrong) and 0.3 < sum(naive[1:]) < 2
    assert any(gate.fit.chosen != "copy" for gate in found.gates)


def test_correction_biases_stay_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the gates alone too, which a calibration through the engine asks."""
    deepseek_v3(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    stored = {n: t if n.endswith(BIAS) else t.bfloat16() for n, t in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    config = tmp_path / "source" / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    kept: list[Any] = []

    class Kept(through_engine.GatesAlone):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(through_engine, "GatesAlone", Kept)
    monkeypatch.setattr(through_engine, "fast_dtype", lambda dtype, _: dtype)  # as on a CPU that is fast in it
    run = settings(Through.engine)
    calibrate(run, str(tmp_path / "source"), tmp_path / "out", FirstWords(), word_tokenizer())  # type: ignore[arg-type]
    assert len(kept) == 2
    for gates in kept:
        for (_, block), each in gates.to_fit.items():
            bias, given = getattr(each.gate.linear, BIAS), stored[f"model.layers.{block + 1}.mlp.gate.{BIAS}"]
            assert bias.dtype is torch.float32 and torch.equal(bias, given) and not torch.equal(given, given.bfloat16())
            assert each.gate.linear.weight.dtype is torch.bfloat16


def test_sigmoid_fits_are_minima_of_their_own_losses() -> None:
    """The constant of a token counts, and each expert is a choice of its own."""
    draw = torch.Generator().manual_seed(0)
    states_TD, start_ED = torch.randn(300, 6, generator=draw), 0.1 * torch.randn(5, 6, generator=draw)
    logits_TE = torch.tanh(states_TD @ torch.randn(5, 6, generator=draw).T) + torch.randn(300, 1, generator=draw)
    regression, penalty = Regression(start_ED.double(), states_TD, logits_TE, ScoreFunction.sigmoid), 1e-2
    closed_ED = regression.ridge(penalty)
    found_ED = regression.refine(closed_ED, 1.0, penalty, 200)
    states, start, logits = states_TD.double(), start_ED.double(), logits_TE.double()

    def ridge(gate_ED: Tensor) -> Tensor:
        wrong = (states @ gate_ED.T - logits).square().sum(-1).mean()
        return wrong + penalty * states.square().mean() * (gate_ED - start).square().sum()

    def entropy(gate_ED: Tensor) -> Tensor:
        p, q = logits.sigmoid(), (states @ gate_ED.T).sigmoid()
        loss = -(p * q.log() + (1 - p) * (1 - q).log()).sum(-1).mean()
        return loss + penalty * states.square().mean() / 8 * (gate_ED - start).square().sum()

    for loss, gate_ED, tolerance in ((ridge, closed_ED, 1e-6), (entropy, found_ED, 1e-3)):
        slope_ED = torch.autograd.functional.jacobian(loss, gate_ED)
        begun_ED = torch.autograd.functional.jacobian(loss, start)
        assert slope_ED.abs().max() < tolerance < begun_ED.abs().max() / 10
    assert (found_ED - closed_ED).abs().max() > 1e-3
