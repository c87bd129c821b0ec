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
from pregate.engine.device import fetching as policies
from pregate.engine.device.fetching import BlockShape, SlabMemory, make_experts
from pregate.engine.device.graph import InOrder
from pregate.engine.device.ops import (
    assign_slots,
    attention,
    expert_outputs,
    first_choice,
    gate_logits,
    gather_slabs,
    next_tokens,
    residual_and_norm,
    rotary_attention,
    want_slabs,
)
from pregate.engine.device.ops.registry import OPERATIONS
from pregate.engine.device.sampler_state import StepKind
from pregate.engine.device.slots import DeviceSlots
from pregate.engine.device.steps.registry import step_of
from pregate.engine.device.steps.rotary import RotaryDecoder
from pregate.engine.device.steps.t5 import StaticDecoder
from pregate.engine.storage.slabs import SlabLayout
from pregate.models.family import experts_of
from tests.engine.device.steps.test_rotary import CAPTURED
from tests.models.families.test_decoder_only import FAMILIES, gating, pregated, upstream_model
from tests.tiny import pregated_model

BATCH = 3
ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "synchronize", "masked_select", "is_nonzero", "equal"}
ROTARY = ["steps/rotary.py", "steps/static_rotary_attention.py", "steps/shadow.py"]
SOURCES = [
    "steps/t5.py",
    "steps/static_t5_attention.py",
    "sampler_state.py",
    "fetching.py",
    "slots.py",
    "steps/gates.py",
]
FOLDER = Path(device.__file__).parent
KERNELS = [
    *((assign_slots, "assign_kernel"), (gather_slabs, "gather_kernel"), (expert_outputs, "slot_linear_kernel")),
    *((want_slabs, "want_kernel"), (residual_and_norm, "add_norm_kernel"), (first_choice, "first_choice_kernel")),
    *((rotary_attention, "attend_kernel"), (rotary_attention, "join_kernel")),
    *((attention, "attention_kernel"), (gate_logits, "gate_logits_kernel")),
    *((next_tokens, "best_kernel"), (next_tokens, "choose_kernel")),
]


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
    return static_step(pregated_model(0, **options), policy)


def rotary(policy: Policy, name: str, lookahead: int) -> RotaryDecoder:
    row = FAMILIES[name]
    return static_step(pregated(row, upstream_model(row, 1), gating(lookahead)), policy)


def static_step(model: Any, policy: Policy) -> Any:
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
        family.top_k,
        BATCH,
        family.activation,
        family.constants,
    )
    experts = make_experts(policy, memory, blocks, InOrder())
    sizes = {"batch": BATCH, "max_source_len": 7, "max_new_tokens": 5}
    return step_of(model.config)(model.to(meta), experts, **sizes)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The reference implementations, whose operations are watched too; of the three that read addresses or slots,
    notes of the call and of its arguments' addresses."""
    noted: list[tuple[str, tuple[int, ...]]] = []
    # it does not know this device, and switches nothing off here
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    def stand_in(name: str) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            noted.append((name, tuple(id(arg) for arg in args if not isinstance(arg, Tensor))))

        return note

    for operation in OPERATIONS.values():
        monkeypatch.setattr(operation, "chosen", operation.reference)
    for name in ("assign_slots", "gather_slabs", "expert_outputs"):
        monkeypatch.setattr(policies, name, stand_in(name))
    return noted


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("kind", [StepKind(), StepKind(sample=True, penalise=True)])
@pytest.mark.parametrize(
    "gating",
    [{"lookahead": 0}, {"lookahead": 1}, {"lookahead": 2, "entry": "embedding"}, {"lookahead": 1, "gate": "mlp"}],
)
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
    noted: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(type(size) is int for size in grid), grid
            return lambda *_, **constants: noted.append((self.name, grid, constants))

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Kernel(name))
    for operation in OPERATIONS.values():
        monkeypatch.setattr(operation, "chosen", operation.kernel)
    return noted


@pytest.mark.parametrize("policy", list(Policy))
def test_a_step_is_operations_that_know_their_shapes(policy: Policy) -> None:
    """As `torch.compile` and fake tensors see it; every operation there is takes part."""
    static = decoder(policy, lookahead=1)
    with Watch() as watch:
        static.step(StepKind())
    found = {name.removeprefix("pregate.").removesuffix(".default") for name in watch.operations if "pregate." in name}
    absent = {"assign_slots", "gather_slabs"} if policy is Policy.gpu_only else set()
    assert found == OPERATIONS.keys() - absent - {"rotary_attention"}


@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("name", CAPTURED)
def test_a_rotary_step_asks_nothing(policy: Policy, name: str, launched: list[Any]) -> None:
    """Its routers, shared experts and residuals are upstream's own; they are watched with the rest."""
    static = rotary(policy, name, lookahead=1)
    runs = []
    for _ in range(2):
        launched.clear()
        with Watch() as watch:
            static.step(StepKind())
        runs.append((watch.operations, list(launched)))
    assert runs[0] == runs[1]
    names = [name for name, _, _ in runs[0][1]]
    layers, blocks = len(static._layers), len(list(static._model.moe_blocks()))
    fetches = 0 if policy is Policy.gpu_only else blocks
    assert names.count("assign_kernel") == names.count("gather_kernel") == fetches
    assert names.count("slot_linear_kernel") == 2 * blocks and names.count("want_kernel") == blocks
    assert names.count("attend_kernel") == names.count("join_kernel") == layers
    assert names.count("add_norm_kernel") >= 2 * layers + 1, "the norms are single launches"
    assert names[-2:] == ["best_kernel", "choose_kernel"]


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
        lambda *arguments: int(DeviceSlots(*arguments[:5]).tick),
        lambda *arguments: float(DeviceSlots(*arguments[:5]).counters.sum()),
        lambda *arguments: DeviceSlots(*arguments[:5]).slab_in_S.to("cpu"),
        lambda *arguments: bool(arguments[5][0]),
    ],
    ids=["int", "float", "to cpu", "if"],
)
def test_a_launcher_that_asks_is_noticed(
    asks: Callable[..., Any], launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    static = decoder(Policy.pre_gated, lookahead=1)
    monkeypatch.setattr(policies, "assign_slots", asks)
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
    monkeypatch.setattr(policies, "expert_outputs", lambda hidden_BD, *rest: asks(hidden_BD))
    said = "depends on data|has a tensor on cpu|meta tensor"
    with Watch(), pytest.raises((HostAskedError, RuntimeError, NotImplementedError), match=said):
        static.step(StepKind())


def questions(source: str) -> list[str]:
    """Calls of methods that read from the device, outside of what is for tensors in host memory alone."""
    found = []

    def walk(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef) and node.name == "gather_slabs":
            return
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ASKING:
            found.append(f"line {node.lineno}: .{node.func.attr}()")
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(source))
    return found


def test_the_sources_of_a_step_hold_no_question() -> None:
    files = [FOLDER / name for name in (*SOURCES, *ROTARY)] + sorted(FOLDER.glob("ops/*.py"))
    for file in files:
        assert questions(file.read_text()) == [], file.name


def test_a_question_in_a_source_is_found() -> None:
    assert questions("def f(x):\n    return x.sum().item()") == ["line 2: .item()"]
    assert questions("def gather_slabs(x):\n    return x.sum().item()") == []
