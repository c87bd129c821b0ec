"""Gates with a network beside their linear map in every decoder-only family: against upstream's own rule, which is
given a router that reads the hidden numbers of the network beside the states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pregate.config import PreGateConfig, UsageError
from pregate.conversion.manifest import MANIFEST
from pregate.conversion.write import convert
from pregate.models.loading import load_resident
from pregate.models.nonlinear import Nonlinear
from pregate.models.pregating import PreGating
from pregate.models.upstream_routers import route_with
from tests.models.families.late import choosing_gates, hand_over, with_gates
from tests.models.families.test_decoder_only import (
    FAMILIES,
    LEFT,
    RIGHT,
    Row,
    assert_equal_states,
    batch,
    every_family,
    gradients,
    pregated,
    upstream_model,
)

WIDTH = 6
MLP: dict[str, Any] = {"gate": "mlp", "gate_width": WIDTH}
SETTINGS = {
    "ahead": (PreGating(1, **MLP), LEFT, True),
    "all": (PreGating(2, start=1, entry="embedding", weights="late", **MLP), RIGHT, False),
}
CASES = [*((name, "ahead") for name in FAMILIES), *((name, "all") for name in ("olmoe", "deepseek_v3", "gpt_oss"))]


def networks(model: Any) -> dict[str, Nonlinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Nonlinear)}


def stirred(model: Any, seed: int = 9) -> Any:
    """`model`, whose networks add something to the logits of its gates."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in networks(model).values():
            network.up.copy_(torch.randn(network.up.shape, generator=draw) * 0.5)
            network.down.copy_(torch.randn(network.down.shape, generator=draw))
    return model


def of_block(model: Any) -> dict[int, Nonlinear]:
    """The networks of the gates that decide for each block."""
    gates = [block.gates for block in model.moe_blocks()]
    ahead = {gate.target: gate.pre_gate for gate in gates if gate.pre_gate is not None}
    ahead |= {int(block): gate for block, gate in model.model.entry_gates.items()}
    return {block: gate.nonlinear for block, gate in ahead.items()}


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_upstreams_rule_applies_to_the_sum(name: str, setting: str) -> None:
    row, (gating, padding, recompute) = FAMILIES[name], SETTINGS[setting]
    upstream = upstream_model(row, 60)
    gates = choosing_gates(row, upstream, gating)
    linear = with_gates(row, pregated(row, upstream, PreGating(**{**vars(gating), "gate": "linear"})), gates)
    ours = pregated(row, upstream, gating)
    ours = stirred(with_gates(row, ours, gates))
    if recompute:
        ours.gradient_checkpointing_enable()
    logits, slopes = gradients(ours, batch(padding))
    ups = {block: nn.Parameter(network.up.detach().clone()) for block, network in of_block(ours).items()}
    D = upstream.config.hidden_size
    for block, gate in gates.items():
        gate.weight = nn.Parameter(torch.cat([gate.weight, of_block(ours)[block].down], 1).detach())
        gate.hidden_dim = D + WIDTH

    def read(block: int, states_TD: Tensor) -> Tensor:
        states_TD = states_TD.flatten(0, -2)
        product_TH = states_TD @ ups[block].T
        return torch.cat([states_TD, product_TH * product_TH.sigmoid()], 1)

    expected, theirs = gradients(hand_over(row, upstream, gates, gating, read), batch(padding))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, linear.train()(**batch(padding), use_cache=False).logits, atol=1e-2)
    assert of_block(ours).keys() == gates.keys() and len(gates) > 1
    for block, network in of_block(ours).items():
        wide = gates[block].weight.grad
        pairs = ((network.up.grad, ups[block].grad), (network.down.grad, wide[:, D:]))
        for mine, other in pairs:
            assert other.abs().max() > 0
            assert (mine - other).abs().max() <= 1e-3 * other.abs().max() + 1e-6, block
    for parameter, other in theirs.items():
        mine = slopes.get(parameter)
        if mine is not None and other is not None and "norm" not in parameter:
            assert (mine - other).abs().max() <= 1e-3 * other.abs().max() + 1e-6, parameter


def opened(directory: Path, auto: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory).eval() if auto else load_resident(directory)
    model.set_expert_path("reference")
    return model


def routes(model: Any) -> list[Tensor]:
    return list(model(**batch(LEFT), use_cache=False, output_router_logits=True).expert_ids)


@every_family
def test_a_conversion_changes_nothing_but_what_is_learnt_later(row: Row, tmp_path: Path) -> None:
    """Right after it the model computes what linear gates compute, bit for bit; in files and by the Auto class too."""
    upstream_model(row, 64).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    reports = {}
    for name, asked in (("linear", {}), ("mlp", MLP)):
        gate = PreGateConfig(lookahead=2, entry="embedding", **asked)  # type: ignore[arg-type]
        reports[name] = convert(str(tmp_path / "source"), tmp_path / name, gate)
    linear, mlp = (opened(tmp_path / name) for name in ("linear", "mlp"))
    inputs = batch(LEFT)
    assert torch.equal(linear(**inputs).logits, mlp(**inputs).logits) and linear(**inputs).logits.isfinite().all()
    found = networks(mlp)
    assert len(found) == sum(row.family.num_blocks(mlp.config).values()) and not networks(linear)
    assert all(network.up.dtype is torch.bfloat16 and not network.down.any() for network in found.values())
    D = mlp.config.hidden_size
    assert all(0.5 < network.up.float().std() * D**0.5 < 2 for network in found.values())
    E = next(iter(found.values())).down.shape[0]
    more = f"{len(found)} gates have {WIDTH} hidden numbers beside their linear map: {len(found) * WIDTH * (D + E):,}"
    assert more in reports["mlp"].told("source") and "hidden numbers" not in reports["linear"].told("source")
    assert reports["mlp"].output_bytes == reports["linear"].output_bytes + 2 * len(found) * WIDTH * (D + E)
    before = routes(mlp)
    stirred(mlp).save_pretrained(tmp_path / "again")
    assert any(not torch.equal(one, two) for one, two in zip(before, routes(mlp), strict=True))
    for again in (opened(tmp_path / "again", auto=True), opened(tmp_path / "again")):
        assert type(again) is row.family.model_class and again.config.pregating == mlp.config.pregating
        assert_equal_states(again, mlp)
        assert all(torch.equal(one, two) for one, two in zip(routes(again), routes(mlp), strict=True))


def test_a_seed_says_how_networks_start(tmp_path: Path) -> None:
    upstream_model(FAMILIES["mixtral"], 64).save_pretrained(tmp_path / "source")
    found = []
    for number, seed in enumerate((3, 3, 4)):
        convert(str(tmp_path / "source"), tmp_path / str(number), PreGateConfig(**MLP), seed=seed)
        assert json.loads((tmp_path / str(number) / MANIFEST).read_text())["seed"] == seed
        found.append(networks(load_resident(tmp_path / str(number))))
    one, same, other = found
    assert all(torch.equal(one[name].up, same[name].up) for name in one)
    assert not any(torch.equal(one[name].up, other[name].up) for name in one)
    assert len({network.up[0, 0].item() for network in one.values()}) == len(one) > 1


def test_a_model_from_scratch_starts_with_nothing_added() -> None:
    config = upstream_model(FAMILIES["qwen3_5_moe"], 0).config.to_dict()
    family = FAMILIES["qwen3_5_moe"].family
    model = family.model_class(family.config(family.pregated_json(config, PreGating(1, **MLP))))
    assert networks(model)
    for network in networks(model).values():
        assert network.up.std() > 0 and network.up.isfinite().all() and not network.down.any()


def test_a_router_without_one_linear_map_is_refused() -> None:
    class ByProduct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, hidden_TD: Tensor) -> Any:
            logits_TE = hidden_TD @ self.weight.T
            return logits_TE, *logits_TE.topk(2)

    with pytest.raises(UsageError, match=r"ByProduct does not: set pregate\.gate=linear"):
        route_with(ByProduct(), Nonlinear(8, 5, 3), torch.randn(3, 8))


@pytest.mark.parametrize("gating", [{"gate": "cubic"}, {**MLP, "lookahead": 0}, {**MLP, "gate_width": 0}])
def test_a_section_that_cannot_be_is_refused(gating: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be used"):
        PreGating.from_dict({"lookahead": 1, **gating})
