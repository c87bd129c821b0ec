"""Nothing in a decoding step can ask the host or let its shapes depend on data: a capture would fail, or lie.

No GPU is needed to see that. The step runs on the meta device, where no number exists, while every operation is
watched; and the sources of what runs in a step are searched.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pregate.config import Policy
from pregate.engine import device
from pregate.engine.device import gates, moves
from pregate.engine.device.graph import InOrder
from pregate.engine.device.moves import BlockShape, SlabMemory, make_moves
from pregate.engine.device.ops import gather
from pregate.engine.device.sampling import StepKind, TokenChooser
from pregate.engine.device.slots import DeviceSlots
from pregate.engine.device.steps import static_attention
from pregate.engine.device.steps import t5 as static_step
from pregate.engine.device.steps.t5 import StaticDecoder
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.family import experts_of
from tests.tiny import pregated_model

BATCH = 3
ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "synchronize", "masked_select", "is_nonzero", "equal"}
SOURCES = [
    *("steps/t5.py", "steps/static_attention.py", "sampling.py", "moves.py"),
    *("slots.py", "ops/gather.py", "ops/experts.py", "gates.py", "ops/norms.py"),
]
FOLDER = Path(device.__file__).parent


class HostAskedError(AssertionError):
    pass


class Watch(TorchDispatchMode):
    """Fails at the first operation that a graph could not replay as it is."""

    forbidden = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        if set(func.tags) & set(self.forbidden):
            raise HostAskedError(f"{func} depends on data")
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        strangers = [tensor for tensor in tensors if tensor.device.type != "meta"]
        if strangers:
            raise HostAskedError(f"{func} has a tensor on {strangers[0].device}")
        return result


def decoder(policy: Policy, **options: Any) -> StaticDecoder:
    model = pregated_model(0, **options)
    family = experts_of(model.config)
    layout = SlabLayout.of(family, torch.float32)
    meta, keys = torch.device("meta"), family.keys()
    slots = len(keys) if policy is Policy.gpu_only else 4 * family.num_experts
    memory = SlabMemory(
        layout,
        torch.empty(slots, layout.slab_bytes, dtype=torch.uint8, device=meta),
        torch.empty(len(keys), dtype=torch.int64, device=meta),
        DeviceSlots.empty(len(keys), slots, meta),
        keep=True,
    )
    num_blocks = len(family.layers["decoder"])
    blocks = BlockShape(
        [len(keys) - (num_blocks - b) * family.num_experts for b in range(num_blocks)],
        family.num_experts,
        1,
        BATCH,
        model.config.d_model,
        "relu",
    )
    experts = make_moves(policy, memory, blocks, InOrder())
    return StaticDecoder(model.to(meta), experts, batch=BATCH, max_source_len=7, max_new_tokens=5)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """In the place of the three kernels, which are launches and nothing else, notes of them and of their arguments'
    addresses."""
    noted: list[tuple[str, tuple[int, ...]]] = []
    # it does not know this device, and switches nothing off here
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    def stand_in(name: str) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            noted.append((name, tuple(id(arg) for arg in args if not isinstance(arg, Tensor))))

        return note

    for name in ("assign_slots", "gather_slabs", "expert_outputs"):
        monkeypatch.setattr(moves, name, stand_in(name))
    return noted


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("kind", [StepKind(), StepKind(sample=True, penalise=True)])
@pytest.mark.parametrize("gating", [{"lookahead": 0}, {"lookahead": 1}, {"lookahead": 2, "entry": "embedding"}])
def test_a_step_asks_nothing(
    policy: Policy, kind: StepKind, gating: dict[str, Any], launches: list[tuple[str, tuple[int, ...]]]
) -> None:
    """And two steps are the same operations and the same launches, so one of them stands for all."""
    static = decoder(policy, **gating)
    runs = []
    for _ in range(2):
        launches.clear()
        with Watch() as watch:
            static.step(kind)
        runs.append((watch.operations, list(launches)))
    assert runs[0] == runs[1]
    names = [name for name, _ in runs[0][1]]
    assert names.count("expert_outputs") == 3
    assert names.count("assign_slots") == names.count("gather_slabs") == (0 if policy is Policy.gpu_only else 3)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """The real launchers; in the place of the kernels they launch, notes of their grids and constants."""
    pytest.importorskip("triton")
    from pregate.engine.device.ops import (
        kernels_attention,
        kernels_experts,
        kernels_gates,
        kernels_gather,
        kernels_norms,
        kernels_sampling,
        kernels_slots,
    )

    noted: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(type(size) is int for size in grid), grid
            return lambda *_, **constants: noted.append((self.name, grid, constants))

    for module, name in (
        (kernels_slots, "assign_kernel"),
        (kernels_gather, "gather_kernel"),
        (kernels_experts, "slot_linear_kernel"),
        (kernels_slots, "want_kernel"),
        (kernels_norms, "add_norm_kernel"),
        (kernels_gates, "first_choice_kernel"),
        (kernels_attention, "attention_kernel"),
        (kernels_gates, "gate_logits_kernel"),
        (kernels_sampling, "best_kernel"),
        (kernels_sampling, "choose_kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel(name))

    def gather_slabs(*args: Any) -> None:
        kernels_gather.launch_gather_slabs(*args, num_programs=gather.NUM_PROGRAMS, unroll=gather.UNROLL)

    monkeypatch.setattr(moves, "assign_slots", kernels_slots.launch_assign_slots)
    monkeypatch.setattr(moves, "gather_slabs", gather_slabs)
    monkeypatch.setattr(moves, "expert_outputs", kernels_experts.launch_expert_outputs)
    monkeypatch.setattr(moves, "want_slabs", kernels_slots.launch_want_slabs)
    monkeypatch.setattr(static_step, "add_norm", kernels_norms.launch_add_norm)
    monkeypatch.setattr(gates, "gate_logits", kernels_gates.launch_gate_logits)
    monkeypatch.setattr(gates, "first_choice", kernels_gates.launch_first_choice)
    monkeypatch.setattr(static_attention, "self_attention", kernels_attention.launch_self_attention)
    monkeypatch.setattr(static_attention, "cross_attention", kernels_attention.launch_cross_attention)
    monkeypatch.setattr(TokenChooser, "choose", TokenChooser.choose_greedily)
    return noted


@pytest.mark.parametrize("policy", list(Policy))
def test_launching_the_kernels_asks_nothing(
    policy: Policy, launched: list[tuple[str, tuple[int, ...], dict[str, Any]]]
) -> None:
    """Their grids and constants are plain numbers, the same at every step."""
    static = decoder(policy, lookahead=1)
    runs = []
    for _ in range(2):
        launched.clear()
        with Watch() as watch:
            static.step(StepKind())
        runs.append((watch.operations, list(launched)))
    assert runs[0] == runs[1]
    names = [name for name, _, _ in runs[0][1]]
    fetches = 0 if policy is Policy.gpu_only else 3
    assert names.count("assign_kernel") == names.count("gather_kernel") == fetches
    assert names.count("slot_linear_kernel") == 2 * 3, "up and down, in each of three blocks"
    assert names.count("first_choice_kernel") == names.count("gate_logits_kernel") == names.count("want_kernel") == 3
    layers = len(static._layers)
    assert names.count("attention_kernel") == 2 * layers and names.count("add_norm_kernel") == 3 * layers + 1
    assert names[-2:] == ["best_kernel", "choose_kernel"]
    for _, _, constants in runs[0][1]:
        assert not any(isinstance(value, Tensor) for value in constants.values()), constants


@pytest.mark.parametrize(
    "asks",
    [
        lambda table, *_, **__: int(table.tick),
        lambda table, *_, **__: float(table.counters.sum()),
        lambda table, *_, **__: table.slab_in_S.to("cpu"),
        lambda table, wanted_N, *_, **__: bool(wanted_N[0]),
    ],
    ids=["int", "float", "to cpu", "if"],
)
def test_a_launcher_that_asks_is_noticed(
    asks: Callable[..., Any], launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    static = decoder(Policy.pre_gated, lookahead=1)
    monkeypatch.setattr(moves, "assign_slots", asks)
    with Watch(), pytest.raises((HostAskedError, RuntimeError, NotImplementedError)):
        static.step(StepKind())


@pytest.mark.parametrize(
    "asks",
    [
        lambda hidden_BD: hidden_BD.sum().item(),
        lambda hidden_BD: hidden_BD.nonzero(),
        lambda hidden_BD: hidden_BD.cpu(),
        lambda hidden_BD: hidden_BD[hidden_BD > 0],
        lambda hidden_BD: hidden_BD + torch.ones(hidden_BD.shape[1]),
        lambda hidden_BD: hidden_BD.tolist(),
        lambda hidden_BD: bool((hidden_BD > 0).any()),
        lambda hidden_BD: (hidden_BD > 0).unique(),
    ],
    ids=["item", "nonzero", "cpu", "mask", "host tensor", "tolist", "bool", "unique"],
)
def test_what_asks_is_noticed(
    asks: Callable[[Tensor], Any], launches: list[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    static = decoder(Policy.pre_gated)
    monkeypatch.setattr(moves, "expert_outputs", lambda hidden_BD, *rest: asks(hidden_BD))
    said = "depends on data|has a tensor on cpu|meta tensor"
    with Watch(), pytest.raises((HostAskedError, RuntimeError, NotImplementedError), match=said):
        static.step(StepKind())


def questions(source: str) -> list[str]:
    """Calls of methods that read from the device, outside of functions for tensors in host memory (`…_twin`)."""
    found = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_twin"):
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ASKING:
            found.append(f"line {node.lineno}: .{node.func.attr}()")
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(source))
    return found


def test_the_sources_of_a_step_hold_no_question() -> None:
    files = [FOLDER / name for name in SOURCES] + sorted(FOLDER.glob("ops/kernels_*.py"))
    for file in files:
        assert questions(file.read_text()) == [], file.name


def test_a_question_in_a_source_is_found() -> None:
    assert questions("def f(x):\n    return x.sum().item()") == ["line 2: .item()"]
    assert questions("def f_twin(x):\n    return x.sum().item()") == []
