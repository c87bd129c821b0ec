"""What the rest of the project may ask of any MoE family: where its blocks and gates are.

A family (`switch.py`) supplies modules with these attributes; conversion, engine and measurement use only
what is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from pregate.config import PreGateConfig, Run, UsageError
from pregate.models.experts import Factor
from pregate.models.head import IGNORED
from pregate.models.routing import Routing

STACKS = ("encoder", "decoder")

RouteListener = Callable[[str, int, Routing], None]
"""Told (stack, block, routing) at the moment the route of that block is committed."""

GATE_SETTINGS = ("lookahead", "stacks", "entry", "init")


def settings_asked_for(run: Run) -> set[str]:
    """The names of the `pregate` settings that the user named on the command line, one by one or as a group."""
    given = {override.lstrip("+").partition("=")[0] for override in run.overrides}
    # a group member says how far ahead gates decide; how they start is said by name
    as_group = set(GATE_SETTINGS) - {"init"} if "pregate" in given else set()
    return as_group | {name for name in GATE_SETTINGS if f"pregate.{name}" in given}


def settings_chosen(run: Run) -> set[str]:
    """`settings_asked_for`, and what an experiment has set: whatever is not the default, and what an arm of the study
    stands for."""
    by_arm = {"lookahead", "init"} if any(override.lstrip("+").startswith("arm=") for override in run.overrides) else ()
    default = PreGating.of_config(PreGateConfig())
    return settings_asked_for(run).union(by_arm, default.differences(PreGating.of_config(run.pregate)))


def _shown(value: Any) -> str:
    """As it is written on the command line."""
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


@dataclass(frozen=True)
class PreGating:
    """How far ahead the gates of a model decide; the `pregate` section of its config."""

    lookahead: int = 0
    stacks: tuple[str, ...] = STACKS
    entry: str = "own"
    init: str = "source"

    @classmethod
    def from_dict(cls, section: dict[str, Any] | None) -> PreGating:
        section = dict(section or {})
        unknown = set(section) - {"lookahead", "stacks", "entry", "init"}
        if unknown:
            raise ValueError(f"the pregate section of config.json has unknown keys {sorted(unknown)}")
        gating = cls(**{**section, "stacks": tuple(section.get("stacks", STACKS))})
        if gating.lookahead < 0 or not set(gating.stacks) <= set(STACKS) or gating.entry not in ("own", "embedding"):
            raise ValueError(f"the pregate section of config.json cannot be used: {section}")
        return gating

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "stacks": list(self.stacks)}

    @classmethod
    def of_config(cls, gate: PreGateConfig) -> PreGating:
        """What the `pregate` settings of a run ask for."""
        return cls(gate.lookahead, tuple(gate.stacks or STACKS), str(gate.entry), str(gate.init))

    def differences(self, other: PreGating) -> list[str]:
        """The names of the settings in which two gatings differ; the order of stacks means nothing, and for
        conventional models, lookahead 0, nothing else does."""
        if not self.lookahead and not other.lookahead:
            return []
        mine, theirs = ({**asdict(gating), "stacks": set(gating.stacks)} for gating in (self, other))
        return [name for name, value in mine.items() if value != theirs[name]]

    def refuse_other(self, asked: PreGating, names: Collection[str], whose: str, advice: str) -> None:
        """Raises `UsageError` for the first setting among `names` in which this gating, of the model `whose`, is not
        what was asked for; `advice` may name it as {name} and what it is as {has}."""
        for name in self.differences(asked):
            if name in names:
                has, wanted = (_shown(getattr(gating, name)) for gating in (self, asked))
                raise UsageError(
                    f"{whose} has {name} {has}, but pregate.{name}={wanted} was asked for: "
                    f"{advice.format(name=name, has=has)}."
                )

    def lookahead_of(self, stack: str) -> int:
        return self.lookahead if stack in self.stacks else 0

    def gates_at(self, stack: str, block: int, num_blocks: int) -> GateSeats:
        """Which gates sit in MoE block `block` of `stack` (DESIGN: G_i lives in block i - N)."""
        ahead = self.lookahead_of(stack)
        own = block < ahead and self.entry == "own" if ahead else True
        target = block + ahead if ahead and block + ahead < num_blocks else None
        return GateSeats(own, target)

    def embedding_entries(self, stack: str, num_blocks: int) -> range:
        """The blocks whose route is decided from the stack's input embeddings."""
        ahead = self.lookahead_of(stack) if self.entry == "embedding" else 0
        return range(min(ahead, num_blocks))


class GateSeats(NamedTuple):
    """own: the block decides its own route. target: the later block it decides for, or None."""

    own: bool
    target: int | None


@dataclass(frozen=True)
class MoEBlock:
    """One sparse feed-forward layer of a loaded model."""

    stack: str
    index: int
    layer: int
    module: Any = field(repr=False)
    """Has `experts` (called with hidden_TD, expert_ids_TK, weights_TK) and `listener`."""
    layer_module: Any = field(repr=False)


class ExpertKey(NamedTuple):
    """One expert of one MoE block of one stack."""

    stack: str
    block: int
    expert: int

    @property
    def label(self) -> str:
        """As traces and messages name it."""
        return f"{self.stack} block {self.block} expert {self.expert}"


@dataclass(frozen=True)
class ExpertFamily:
    """How the experts of a checkpoint are stored and applied, known from its config alone.

    matrices: name and shape of each matrix of one expert. layers: the layer numbers of each stack's MoE blocks.
    tensor_name: (stack, layer, expert, matrix) to the checkpoint's tensor name. apply: (its matrices, hidden_ND) to
    hidden_ND, the same arithmetic as the resident expert in evaluation.
    """

    num_experts: int
    top_k: int
    lookahead: int
    matrices: dict[str, tuple[int, ...]]
    layers: dict[str, list[int]]
    tensor_name: Callable[[str, int, int, str], str]
    apply: Callable[[Sequence[Factor], Tensor], Tensor]

    def keys(self) -> list[ExpertKey]:
        """All experts, in the order of execution."""
        return [
            ExpertKey(stack, block, expert)
            for stack, layers in self.layers.items()
            for block in range(len(layers))
            for expert in range(self.num_experts)
        ]

    def tensor_names(self, key: ExpertKey) -> list[str]:
        layer = self.layers[key.stack][key.block]
        return [self.tensor_name(key.stack, layer, key.expert, matrix) for matrix in self.matrices]


def moe_blocks(model: Any) -> Iterator[MoEBlock]:
    """All MoE blocks of a model, stack by stack, in the order of execution."""
    yield from model.moe_blocks()


def real_tokens(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which positions of a collated batch are no padding: stack -> mask (B, S) or (B, T)."""
    return {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != IGNORED}


def block_logits(outputs: Any) -> dict[str, tuple[Tensor, ...]]:
    """The router logits in a model's outputs: stack -> one (B, S or T, E) a MoE block."""
    return {stack: getattr(outputs, f"{stack}_router_logits") or () for stack in STACKS}


def gates(model: Any) -> Iterator[Any]:
    """All gates of a model as modules, norms of theirs included: own routers, pre-gates and entry gates."""
    yield from model.gates()
