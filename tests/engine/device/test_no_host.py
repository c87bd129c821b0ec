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
from pregate.engine.device import moves
from pregate.engine.device.graph import InOrder
from pregate.engine.device.moves import BlockShape, SlabMemory, make_moves
from pregate.engine.device.sampling import StepKind
from pregate.engine.device.slots import DeviceSlots
from pregate.engine.device.static_step import StaticDecoder
from pregate.engine.slabs import SlabLayout
from pregate.models.switch_layers import switch_expert_family
from tests.tiny import pregated_model

BATCH = 3
ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "synchronize", "masked_select", "is_nonzero", "equal"}
SOURCES = ["static_step.py", "static_attention.py", "sampling.py", "moves.py", "slots.py", "gather.py", "experts.py"]
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
    family = switch_expert_family(model.config)
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
    files = [FOLDER / name for name in SOURCES] + sorted(FOLDER.glob("kernels_*.py"))
    for file in files:
        assert questions(file.read_text()) == [], file.name


def test_a_question_in_a_source_is_found() -> None:
    assert questions("def f(x):\n    return x.sum().item()") == ["line 2: .item()"]
    assert questions("def f_twin(x):\n    return x.sum().item()") == []
