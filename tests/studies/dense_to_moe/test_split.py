"""The MoE form equals the dense model where it should, and the losses by other routes are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import PreGateConfig, UsageError
from pregate.conversion.write import convert
from pregate.models.loading import load_resident, open_model
from studies.dense_to_moe.measure import BEST, BLOCKS_AHEAD, OWN, RANDOM, ROUTES, loss_of, losses_by_routes
from studies.dense_to_moe.moe import UPCYCLE, Form, choose_all, empty_moe, fill_split, open_moe
from studies.dense_to_moe.split import LayerFit, fit, missed_share, split, states_of
from studies.dense_to_moe.upcycle import upcycle
from tests.studies.dense_to_moe.llama import NEURONS, llama, rows

FORMS = {
    "qwen2_moe": Form(experts=4, top_k=4, shared=0.25),
    "mixtral": Form(experts=4, top_k=4, shared=0.0),
    "mixtral of copies": Form(UPCYCLE, experts=4, top_k=2, noise=0.0),
}


def made(dense: Any, form: Form) -> Any:
    return upcycle(dense, form) if form.kind == UPCYCLE else split(dense, rows(), form)


@torch.no_grad()
def logits(model: Any, rows_BT: Tensor) -> Tensor:
    return model(input_ids=rows_BT).logits


@pytest.mark.parametrize("name", FORMS)
def test_with_all_neurons_chosen_and_equal_weights_it_is_the_dense_model(name: str, tmp_path: Path) -> None:
    dense, form = llama(), FORMS[name]
    model = made(dense, form)
    if form.kind != UPCYCLE:
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.zero_()  # so that all weights are equal, and one each with the factor
    wanted = logits(dense, rows())
    assert wanted.isfinite().all() and wanted.std() > 0.1
    torch.testing.assert_close(logits(model, rows()), wanted, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    assert open_model(str(tmp_path)).config["model_type"] == name.split()[0]
    ours = load_resident(tmp_path)
    torch.testing.assert_close(logits(ours, rows()), wanted, rtol=0, atol=2e-5)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2] *= 1.5
    assert (logits(model, rows()) - wanted).abs().max() > 1e-3  # the experts are in use


@pytest.mark.parametrize("shared", [0.25, 0.0])
def test_a_model_that_chooses_all_is_the_dense_one(shared: float) -> None:
    dense, form = llama(), Form(experts=4, top_k=2, shared=shared)
    model, wanted = split(dense, rows(), form), logits(dense, rows())
    assert (logits(model, rows()) - wanted).abs().max() > 0.1
    choose_all(model, form)
    torch.testing.assert_close(logits(model, rows()), wanted, rtol=0, atol=2e-5)


@torch.no_grad()
def test_chosen_neurons_enter_with_weight_one() -> None:
    """With equal weights the block is the dense layer without the neurons of the experts that are not chosen."""
    dense = llama()
    form = Form(experts=4, top_k=2, shared=0.25)
    model = empty_moe(dense, form)
    layer, block = dense.model.layers[0].mlp, model.model.layers[0].mlp
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(0))
    shared_S, experts_EH = order[:32], order[32:].view(4, 24)
    # equal logits choose the first two experts
    fill_split(block, layer, shared_S, experts_EH, torch.zeros(4, 24), form)
    states_TD = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    chosen = block.gate(states_TD)[2].unique().tolist()
    assert len(chosen) == 2
    kept = torch.zeros(NEURONS).index_fill(0, torch.cat([shared_S, *experts_EH[chosen]]), 1.0)
    acts_TF = layer.act_fn(layer.gate_proj(states_TD)) * layer.up_proj(states_TD)
    wanted_TD = layer.down_proj(acts_TF * kept)
    torch.testing.assert_close(block(states_TD[None])[0], wanted_TD, rtol=0, atol=1e-5)
    assert (wanted_TD - layer.down_proj(acts_TF)).abs().max() > 1e-2


def test_every_neuron_is_in_one_place() -> None:
    dense, fits = llama(), []
    model = split(dense, rows(), Form(experts=4, top_k=2, shared=0.25), told=lambda number, found: fits.append(found))
    assert len(fits) == 3 and all(isinstance(found, LayerFit) for found in fits)
    for layer, new in zip(dense.model.layers, model.model.layers, strict=True):
        up_RD = torch.cat([*new.mlp.experts.gate_up_proj.chunk(2, dim=1)[1], new.mlp.shared_expert.up_proj.weight])
        wanted_FD = layer.mlp.up_proj.weight
        assert up_RD.shape == wanted_FD.shape
        assert torch.equal(up_RD[up_RD[:, 0].argsort()], wanted_FD[wanted_FD[:, 0].argsort()])


def test_neurons_that_cannot_be_parted_are_shared() -> None:
    for experts, shared, num_shared, width in ((5, 0.0, 8, 24), (4, 0.25, 32, 24), (4, 0.0, 0, 32)):
        form = Form(experts=experts, shared=shared)
        assert (form.num_shared(NEURONS), form.width(NEURONS)) == (num_shared, width)
    assert (Form().num_shared(1536), Form().width(1536)) == (0, 192)
    few = Form(shared=0.03125)
    assert (few.num_shared(1536), few.width(1536)) == (64, 184)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Form(experts=1, top_k=1), "at least 2 experts"),
        (Form(experts=4, top_k=5), "top-k"),
        (Form(experts=4, top_k=2, shared=0.95), "leaves too few neurons"),
    ],
)
def test_forms_that_cannot_be_are_refused(form: Form, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        empty_moe(llama(), form)


def test_copies_differ_by_the_noise_and_gates_choose_among_them() -> None:
    dense = llama()
    model = upcycle(dense, Form(UPCYCLE, experts=4, top_k=2, noise=0.05))
    first, second = (model.model.layers[0].mlp.experts.down_proj[expert] for expert in range(2))
    spread = dense.model.layers[0].mlp.down_proj.weight.std()
    assert (first - second).std().item() == pytest.approx(0.05 * spread.item() * 2**0.5, rel=0.1)
    off = (logits(model, rows()) - logits(dense, rows())).abs().max()
    assert 0 < off < logits(dense, rows()).std()


# --- gates ------------------------------------------------------------------------------------------------------------


def test_the_gate_finds_experts_whose_outputs_are_large() -> None:
    generator = torch.Generator().manual_seed(0)
    states_TD = torch.randn(400, 8, generator=generator)
    states_TD[:, 0] = 1.0
    # the norm of each output is a linear function of the state
    norms_TE = (4 * states_TD[:, :1] + states_TD[:, 1:5]).clamp_min(0)
    directions_ED = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=1)
    gate_ED, found = fit(states_TD, norms_TE[..., None] * directions_ED, top_k=2)
    assert found.agreement > 0.97
    logits_TE = states_TD @ gate_ED.T
    assert (logits_TE.topk(2).indices.sort().values == norms_TE.topk(2).indices.sort().values).double().mean() > 0.97
    assert found.error_best <= found.error_gate < 1.5 * found.error_best


def test_the_missed_share_against_a_naive_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs_TED, logits_TE = (torch.randn(shape, generator=generator) for shape in ((9, 4, 5), (9, 4)))
    for equal in (False, True):
        missed = whole = 0.0
        for outputs_ED, logits_E in zip(outputs_TED, logits_TE, strict=True):
            ids = sorted(range(4), key=lambda expert: -logits_E[expert])[:2]
            raw = [1.0, 1.0] if equal else logits_E[ids].exp().tolist()
            parts = [2 * weight / sum(raw) * outputs_ED[expert] for expert, weight in zip(ids, raw, strict=True)]
            missed += (outputs_ED.sum(0) - sum(parts)).square().sum().item()
            whole += outputs_ED.sum(0).square().sum().item()
        found = missed_share(outputs_TED @ outputs_TED.mT, logits_TE, 2, equal)
        assert found == pytest.approx(missed / whole, rel=1e-4)


# --- losses by routes -------------------------------------------------------------------------------------------------


def test_blocks_ahead_are_what_a_conversion_makes(tmp_path: Path) -> None:
    model = split(llama(num_hidden_layers=5), rows(), Form(experts=4, top_k=2, shared=0.25))
    model.save_pretrained(tmp_path / "source")
    reopened = open_moe(tmp_path / "source")
    found = losses_by_routes(reopened, rows())
    for routes, lookahead in BLOCKS_AHEAD.items():
        directory = tmp_path / ("pregated" + routes if lookahead else "source")
        if lookahead:
            convert(str(tmp_path / "source"), directory, PreGateConfig(lookahead=lookahead))
        with torch.no_grad():
            wanted = load_resident(directory)(input_ids=rows(), labels=rows()).loss.item()
        assert found[routes] == pytest.approx(wanted, abs=1e-5)
    assert len({round(loss, 4) for loss in found.values()}) == len(ROUTES) == 6
    assert loss_of(reopened, rows(), RANDOM) == found[RANDOM]  # the same routes again


@torch.no_grad()
def test_the_best_routes_have_the_largest_outputs() -> None:
    model = split(llama(num_hidden_layers=1), rows(), Form(experts=4, top_k=2, shared=0.25))
    block = model.model.layers[0].mlp
    [states_TD] = states_of(model, rows())
    outputs_TED = torch.stack(
        [
            block.experts(states_TD, torch.full((len(states_TD), 1), expert), torch.ones(len(states_TD), 1))
            for expert in range(4)
        ],
        dim=1,
    )
    ids_T2 = outputs_TED.norm(dim=-1).topk(2).indices
    block.gate.forward = lambda hidden: (None, torch.full(ids_T2.shape, 0.5), ids_T2)
    wanted = model(input_ids=rows(), labels=rows()).loss.item()
    del block.gate.forward
    assert loss_of(model, rows(), BEST, rows_at_once=6) == pytest.approx(wanted, abs=1e-6)
    assert abs(loss_of(model, rows(), OWN) - wanted) > 1e-4
