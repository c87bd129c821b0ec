"""The engine for training: losses and gradients are those of the resident model that holds the slabs' weights."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pregate.config import SlabDtype, Tier, UsageError
from pregate.engine.io.base import Move
from pregate.engine.offloaded_backward import DifferentiableExperts
from pregate.engine.offloaded_experts import Arithmetic
from pregate.engine.training_engine import TrainingEngine
from pregate.models.expert_math import Factor
from pregate.models.experts import ExpertKey
from pregate.models.loading import load_resident
from tests.engine.hostile import poison_slots
from tests.engine.olmoe import olmoe, prompts
from tests.engine.serving import SLAB, Served, as_stored, saved
from tests.tiny import batch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def switch(root: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Served:
    return Served(*saved(root, tuple(options.items()), dtype))


def passed(model: Any, seed: int = 0, **inputs: Tensor) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step, with the seed of its dropout, and all gradients."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = model(**(inputs or batch()), use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def frozen(served: Served, engine: TrainingEngine) -> Any:
    """The resident model in float32, its experts those of the engine's slabs, without gradients and computed one after
    the other: upstream's grouped products do not follow autocast."""
    model = as_stored(load_resident(served.directory, dtype=torch.float32), engine.layout)
    model.set_expert_path("reference")
    for block in model.moe_blocks():
        block.module.experts.requires_grad_(False)
    return model


def assert_same(got: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], rtol: float) -> None:
    assert got[0] == pytest.approx(expected[0], rel=rtol)
    assert got[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert got[1][name].isfinite().all(), name
        off = (got[1][name] - wanted).norm() / wanted.norm().clamp_min(1e-9)
        assert off <= rtol, f"{name}: off by {off} of its norm"


@pytest.mark.parametrize("slab_dtype", list(SlabDtype))
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_step_is_that_of_the_resident_model(root: Path, slab_dtype: SlabDtype, lookahead: int) -> None:
    served = switch(root, lookahead=lookahead)
    with TrainingEngine.open(served.directory, slab_dtype=slab_dtype, device_budget="20%") as engine:
        poison_slots(engine)  # type: ignore[arg-type]
        with engine.step():
            got = passed(engine.model)
        assert_same(got, passed(frozen(served, engine)), rtol=1e-6)
        gates = [got[1][name] for name in got[1] if "classifier" in name]
        assert len(gates) == 6 and all(gate.any() for gate in gates)
        assert engine.counters.bytes_moved > 0


def test_slots_that_are_filled_meanwhile_disturb_no_gradient(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU's reading threads do: torch copies into other slots between an expert's result and its gradient."""
    with TrainingEngine.open(switch(root).directory, tier=Tier.dram, device_budget="50%") as engine:
        with engine.step():
            expected = passed(engine.model)
        mover: Any = engine.host.mover
        slots: dict[int, Tensor] = {}
        filled: list[int] = []
        start, arithmetic = mover.start, DifferentiableExperts._arithmetic

        def noted(moves: Sequence[Move]) -> Any:
            slots.update((slot.data_ptr(), slot) for _, slot in moves)
            return start(moves)

        def beside(experts: DifferentiableExperts) -> Arithmetic:
            compute = arithmetic(experts)

            def result(key: ExpertKey, matrices: Sequence[Factor], hidden_ND: Tensor) -> Tensor:
                result_ND = compute(key, matrices, hidden_ND)
                if torch.is_grad_enabled():
                    mover.drain()
                    for slot in slots.values():
                        slot.copy_(slot.clone(), non_blocking=True)
                    filled.append(len(slots))
                return result_ND

            return result

        monkeypatch.setattr(mover, "start", noted)
        monkeypatch.setattr(DifferentiableExperts, "_arithmetic", beside)
        with engine.step():
            got = passed(engine.model)
        assert_same(got, expected, rtol=1e-6)
        assert all(grad.any() for name, grad in got[1].items() if "classifier" in name)
        assert len(filled) > 6 and min(filled) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("tier", [Tier.dram, Tier.disk])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_on_a_gpu_is_that_of_the_resident_model(root: Path, tier: Tier, recomputed: bool) -> None:
    """Its backward pass runs in a thread of its own."""
    served, inputs = switch(root), {name: tensor.cuda() for name, tensor in batch().items()}
    with TrainingEngine.open(served.directory, tier=tier, device="cuda", device_budget="20%") as engine:
        poison_slots(engine)  # type: ignore[arg-type]
        resident = frozen(served, engine).cuda()
        if recomputed:
            for model in (engine.model, resident):
                model.gradient_checkpointing_enable()
        expected = passed(resident, **inputs)
        for _ in range(3):
            with engine.step():
                got = passed(engine.model, **inputs)
            assert_same(got, expected, rtol=1e-3)
        assert engine.counters.bytes_moved > 0


@pytest.mark.parametrize("tier", [Tier.dram, Tier.disk])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_top_k_step_with_one_slot_in_two_micro_batches(tmp_path: Path, tier: Tier, recomputed: bool) -> None:
    """Slabs of bfloat16, in a model that computes in float32 or under autocast."""
    served = Served(tmp_path, olmoe().bfloat16())
    served.model.save_pretrained(tmp_path)
    with TrainingEngine.open(tmp_path, tier=tier, device_budget="5%") as engine:
        assert engine.num_slots == 1
        poison_slots(engine)  # type: ignore[arg-type]
        resident = frozen(served, engine)
        if recomputed:
            for model in (engine.model, resident):
                model.gradient_checkpointing_enable()
        for dtype, rtol in ((None, 1e-5), (torch.bfloat16, 2e-2)):
            for seed in range(2):
                inputs = prompts(3, seed=seed)
                inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    expected = passed(resident, **inputs)
                    with engine.step():
                        got = passed(engine.model, **inputs)
                assert_same(got, expected, rtol)
        assert engine.counters.misses > 4 * 3 * 8


class Dropped(torch.nn.Module):
    """Half of the activations of one expert are dropped, by the generator that the block's seed and the expert give."""

    def __init__(self, seed: int, expert: int) -> None:
        super().__init__()
        self.seed = seed + expert

    def forward(self, active_NF: Tensor) -> Tensor:
        kept_NF = torch.empty_like(active_NF).bernoulli_(0.5, generator=torch.Generator().manual_seed(self.seed))
        return active_NF * kept_NF * 2


@pytest.mark.parametrize("recomputed", [False, True])
def test_dropout_inside_of_experts_is_the_same_in_both_passes(root: Path, recomputed: bool) -> None:
    """Experts arrive in another order each time; the seed of a block is drawn from torch's generator."""
    served = switch(root)
    with TrainingEngine.open(served.directory, device_budget="30%") as engine:
        resident = frozen(served, engine)
        torch.manual_seed(4)
        for block in resident.moe_blocks():
            seed = int(torch.randint(2**62, ()))
            for name, expert in block.module.experts.items():
                expert.dropout = Dropped(seed, int(name.removeprefix("expert_")))
        expected = passed(resident)
        for block in engine.model.moe_blocks():
            block.module.experts.dropout.p = 0.5
        if recomputed:
            engine.model.gradient_checkpointing_enable()
        for _ in range(2):
            with engine.step():
                assert_same(passed(engine.model, seed=4), expected, rtol=1e-6)
        with engine.step():
            assert passed(engine.model, seed=5)[0] != expected[0]
        with engine.step(), torch.no_grad():
            assert engine.model.eval()(**batch()).loss.item() == pytest.approx(served.model(**batch()).loss.item())


def test_the_backward_pass_fetches_the_block_before_ahead_of_its_turn(root: Path) -> None:
    """Slots for two blocks: each block's slabs are asked for while the block behind it computes."""
    served = switch(root)
    with TrainingEngine.open(served.directory, device_budget=f"{10 * SLAB}B") as engine:
        scheduler: Any = engine.host.scheduler
        asked: list[tuple[str, ExpertKey]] = []
        request, acquire = scheduler.request, scheduler.acquire
        scheduler.request = lambda keys, urgent=False: (
            asked.extend(("ask", key) for key in keys) or request(keys, urgent)
        )
        scheduler.acquire = lambda key: asked.append(("use", key)) or acquire(key)
        with engine.step():
            torch.manual_seed(0)
            engine.model.train()
            loss = engine.model(**batch()).loss
            asked.clear()
            loss.backward()
        uses = [key for what, key in asked if what == "use"]
        order = list(dict.fromkeys((key.stack, key.block) for key in uses))
        assert order == [(stack, block) for stack in ("decoder", "encoder") for block in (2, 1, 0)]
        first_asked = {key: at for at, (_, key) in reversed(list(enumerate(asked)))}
        for behind, here in pairwise(order):
            last_use = max(at for at, (what, key) in enumerate(asked) if what == "use" and key[:2] == behind)
            mine = [key for key in uses if key[:2] == here]
            assert mine and all(first_asked[key] < last_use for key in mine), (behind, here)


def test_a_step_that_was_cut_short_leaves_a_usable_engine(root: Path) -> None:
    served = switch(root)
    with TrainingEngine.open(served.directory, device_budget="20%") as engine:
        with engine.step():
            expected = passed(engine.model)
        for where in ("forward", "backward"):
            with pytest.raises(KeyboardInterrupt), engine.step():
                loss = engine.model(**batch()).loss
                if where == "backward":
                    scheduler: Any = engine.host.scheduler
                    scheduler.release, release = _interrupt, scheduler.release
                    try:
                        loss.backward()
                    finally:
                        scheduler.release = release
                raise KeyboardInterrupt
            with engine.step():
                assert_same(passed(engine.model), expected, rtol=0)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_trained_is_refused(root: Path, tmp_path: Path) -> None:
    served = switch(root)
    with pytest.raises(UsageError, match=r"engine.device_budget=100B is 100 B, less than one expert of 8.19 kB"):
        TrainingEngine.open(served.directory, device_budget="100B")
    with TrainingEngine.open(served.directory) as engine:
        with pytest.raises(UsageError, match="cannot be saved, because an engine holds its experts"):
            engine.model.save_pretrained(tmp_path)
        assert engine.num_slots == 10, "two blocks"
        other = switch(root, seed=1)
        assert engine.teacher(other.directory, torch.float32) is None
        assert engine.teacher(served.directory, torch.float32) is not None
