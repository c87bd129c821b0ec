"""What is particular to one kind of model, and the registry of all kinds. The rest of the package asks here.

A family is one file: the classes of its models, where blocks, gates and experts are, how an expert computes, and how
its checkpoints are named. Knows nothing about tasks, training loops or engines.

Letters: B batch, T tokens, D model width, F expert hidden width, E experts of a block, N tokens of one expert.
"""

from __future__ import annotations

import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import tokenization_auto

from pregate.config import UsageError
from pregate.models.checkpoint import QUANTISATION
from pregate.models.experts import ExpertSpec
from pregate.models.objectives import Objective
from pregate.models.pregating import PreGating
from pregate.models.routing import ScoreFunction
from pregate.system.console import reason_of


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a model. module: has `experts`, called with (hidden_TD, expert_ids_TK, weights_TK). gates: its
    `BlockGates`. layer_module: the whole transformer layer, number `layer` of its stack."""

    stack: str
    index: int
    layer: int
    module: Any = field(repr=False)
    gates: Any = field(repr=False)
    layer_module: Any = field(repr=False)


# --- names in checkpoints -------------------------------------------------------------------------------------------


class GateNames(NamedTuple):
    """Prefixes of the parameter names of gates that concern one MoE block. own: of the gate that decides for it and
    sits in it. ahead: of the gate that sits in it and decides for a later block. entry: of an entry gate for it.
    norm: the weight of the norm before the block. entry_norm: that of the norm of its entry gate."""

    own: str
    ahead: str
    entry: str
    norm: str
    entry_norm: str


class Count(NamedTuple):
    """A number in a config that the names of tensors must agree with. `pattern`: its first group tells apart what is
    counted."""

    setting: str
    what: str
    said: int
    pattern: re.Pattern[str]


# --- families -------------------------------------------------------------------------------------------------------


class Family(ABC):
    """One kind of Mixture-of-Experts model, conventional (`source_type`) and pre-gated (`model_type`, which is
    `pregated_` and the other)."""

    source_type: ClassVar[str]
    """`model_type` in the config.json of a conventional checkpoint."""
    source_class: ClassVar[str]
    """The class that a conventional config.json names under `architectures`."""
    stacks: ClassVar[tuple[str, ...]]
    """In the order of execution."""
    objective: ClassVar[Objective]
    """How examples become inputs, and what is learnt from them."""
    config_class: ClassVar[Any]
    model_class: ClassVar[Any]
    step: ClassVar[str | None] = None
    """The static decoding step among `pregate.engine.device.steps`; None where the family has none."""
    depth_settings: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)
    """The settings of a config that count layers."""
    experts_setting: ClassVar[str] = "num_experts"
    """The one that counts the experts of a block."""
    scores: ClassVar[ScoreFunction] = ScoreFunction.softmax
    """How its routers score experts."""
    gate_parts: ClassVar[tuple[str, ...]] = ("weight", "bias")
    """The tensors of a gate, all of which move with it; a model may have fewer."""
    input_tables: ClassVar[tuple[str, ...]]
    """The embedding tables. Older exports store one for several of them."""
    output_table: ClassVar[str] = "lm_head.weight"
    prefixes: ClassVar[tuple[str, ...]] = ()
    """What upstream's wrappers put before all names."""
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Parts of names in checkpoints and what they are in the model, as upstream renames them when it loads."""
    leftovers: ClassVar[frozenset[str]] = frozenset()
    """Tensors that some checkpoints hold and no model reads; a conversion leaves them out."""

    @property
    def model_type(self) -> str:
        """`model_type` in the config.json of a pre-gated checkpoint."""
        return self.config_class.model_type

    # -- configs

    def config(self, config: Mapping[str, Any]) -> Any:
        """The config object for the `config.json` of a pre-gated or a conventional checkpoint, which has lookahead 0.

        Raises `UsageError` for one that describes no model.
        """
        other = ("model_type", "architectures", "auto_map", QUANTISATION)  # no model is built quantised
        settings = {name: value for name, value in config.items() if name not in other}
        if config.get("model_type") == self.source_type:
            settings["pregate"] = PreGating().to_dict()
        try:
            return self.config_class(**settings)
        except Exception as error:  # strict validation brings exception types of its own
            reason = reason_of(error)
            raise UsageError(f"The config.json describes no model that can be built: {reason}.") from error

    def is_pregated(self, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is that of a pre-gated checkpoint, which may have lookahead 0."""
        return config.get("model_type") == self.model_type

    def pregated_json(self, config: Mapping[str, Any], gating: PreGating) -> dict[str, Any]:
        """The `config.json` of a conventional checkpoint as that of the pre-gated one."""
        # the code that auto_map points to is not part of what is written, and weights are written decoded
        kept = {name: value for name, value in config.items() if name not in ("auto_map", QUANTISATION)}
        names = {"model_type": self.model_type, "architectures": [self.model_class.__name__]}
        return {**kept, **names, "pregate": gating.to_dict()}

    def conventional_json(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The `config.json` of a pre-gated checkpoint with lookahead 0 as that of upstream's model. Raises `ValueError`
        if the model routes ahead."""
        if PreGating.from_dict(config.get("pregate")).lookahead:
            raise ValueError("A pre-gated model cannot be opened by a conventional class.")
        kept = {name: value for name, value in config.items() if name != "pregate"}
        return {**kept, "model_type": self.source_type, "architectures": [self.source_class]}

    def complete(self, source: str, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
        """`config` with what the model needs and its file leaves to others. Raises `UsageError` where that cannot be
        found."""
        return config

    def from_scratch(self, geometry: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
        """The settings of a model that is trained from scratch or has random weights."""
        return {"vocab_size": vocab_size, "pad_token_id": 0, "eos_token_id": 1, **geometry}

    @abstractmethod
    def moe_layers(self, config: Any, stack: str) -> list[int]:
        """The layer numbers of the MoE blocks of `stack`, in order."""

    def num_blocks(self, config: Any) -> dict[str, int]:
        return {stack: len(self.moe_layers(config, stack)) for stack in self.stacks}

    # -- tensors

    @abstractmethod
    def experts(self, config: Any) -> ExpertSpec:
        """The experts of the model that `config` describes."""

    @abstractmethod
    def gate_names(self, stack: str, layer: int, block: int) -> GateNames:
        """How the gates of MoE block `block` of `stack`, in layer `layer`, are named."""

    @abstractmethod
    def gate_std(self, config: Any) -> float:
        """The standard deviation of a gate's weights at initialisation."""

    def counts(self, config: Any) -> list[Count]:
        """Numbers that are compared before names are: one number says more than a thousand missing tensors."""
        return []

    def extras(self, config: Any) -> list[str]:
        """Patterns found in the names of tensors that other programs read and this model does not, such as those of
        layers that guess further tokens. A conversion carries them along."""
        return []

    def is_extra(self, name: str, config: Any) -> bool:
        """Whether the tensor `name` is one of `extras`."""
        return any(re.search(pattern, name) for pattern in self.extras(config))

    def smaller(self, config: Mapping[str, Any], depth: float, num_experts: int) -> dict[str, Any]:
        """A `config.json` like `config`, with the share `depth` of its layers and `num_experts` experts in a block. It
        describes a model whose layers can be timed where the whole model is too large."""
        depths = {key: max(1, round(depth * config[key])) for key in self.depth_settings if config.get(key)}
        return {**config, self.experts_setting: num_experts, **depths}

    def random_scale(self, name: str, config: Mapping[str, Any]) -> float | None:
        """The standard deviation of a random tensor that keeps activations near unit variance; None for ones."""
        raise UsageError(f"Models of type {self.source_type} have no random weights to measure: set checkpoint=DIR.")


BUILT_IN = {
    "deepseek_v2": "pregate.models.families.deepseek_v2",
    "deepseek_v3": "pregate.models.families.deepseek_v3",
    "glm4_moe": "pregate.models.families.glm4_moe",
    "gpt_oss": "pregate.models.families.gpt_oss",
    "granitemoe": "pregate.models.families.granitemoe",
    "mixtral": "pregate.models.families.mixtral",
    "olmoe": "pregate.models.families.olmoe",
    "qwen2_moe": "pregate.models.families.qwen2_moe",
    "qwen3_moe": "pregate.models.families.qwen3_moe",
    "qwen3_5_moe_text": "pregate.models.families.qwen3_5_moe",
    "switch_transformers": "pregate.models.families.switch",
}
"""`source_type` -> the module that registers its family."""
PRE_GATED = "pregated_"
"""What `model_type` has before `source_type`."""
PLUGINS = "pregate.families"
"""The entry point group in which another package names modules that register families."""
_registered: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to every command and to transformers' Auto classes."""
    assert family.model_type == PRE_GATED + family.source_type, (family.model_type, family.source_type)
    _registered.update({family.source_type: family, family.model_type: family})
    family.objective.auto_class.register(family.config_class, family.model_class, exist_ok=True)
    AutoConfig.register(family.model_type, family.config_class, exist_ok=True)
    conversions = get_checkpoint_conversion_mapping(family.source_type)
    if conversions:  # upstream reads and writes other tensors than its modules have; so do we
        register_checkpoint_conversion_mapping(family.model_type, conversions, overwrite=True)
    _share_tokenizers(family)


def _share_tokenizers(family: Family) -> None:
    """Have `AutoTokenizer` choose the same class beside a pre-gated model as beside the conventional one.

    Published tokenizer files name a wrong class for some models. transformers knows which, and what is right, by
    `model_type`. A wrong class splits texts differently.
    """
    # no public interface: a version of transformers without such a table corrects nothing by it
    names = getattr(tokenization_auto, "TOKENIZER_MAPPING_NAMES", {})
    if family.source_type in names:
        names[family.model_type] = names[family.source_type]
    misnamed = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", set())
    if family.source_type in misnamed:
        misnamed.add(family.model_type)
    # what it chooses where no file names a class
    classes, conventional = tokenization_auto.TOKENIZER_MAPPING, family.source_type in CONFIG_MAPPING
    if conventional and (chosen := classes.get(CONFIG_MAPPING[family.source_type], None)):
        classes.register(family.config_class, chosen, exist_ok=True)


def families() -> list[Family]:
    """All families, those of other packages included."""
    for module in dict.fromkeys(BUILT_IN.values()):
        importlib.import_module(module)
    _load_plugins()
    return list(dict.fromkeys(_registered.values()))


def family_named(model_type: str) -> Family:
    """The family of a `model_type`. Raises `UsageError` for one that is not known."""
    if model_type not in _registered:
        module = BUILT_IN.get(model_type.removeprefix(PRE_GATED))
        if module is None:
            _load_plugins()
        else:
            importlib.import_module(module)
    if model_type not in _registered:
        known = sorted({name for family in families() for name in (family.source_type, family.model_type)})
        raise UsageError(
            f"This is a {model_type!r} model: give a checkpoint, or model.family, of type {' or '.join(known)}."
        )
    return _registered[model_type]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model by its `config.json`. Raises `UsageError` for a model of no known family."""
    return family_named(str(config.get("model_type")))


def config_of(config: Mapping[str, Any]) -> Any:
    """The config object for a `config.json`, see `Family.config`."""
    return family_of(config).config(config)


def experts_of(config: Any) -> ExpertSpec:
    """The experts of the model that a config object describes."""
    return family_named(config.model_type).experts(config)


def family_of_model(model: Any) -> Family:
    """The family of a model in memory."""
    return family_named(model.config.model_type)


def _load_plugins() -> None:
    for plugin in entry_points(group=PLUGINS):
        plugin.load()


def dtype_name(dtype: torch.dtype) -> str:
    """As configs write it."""
    return str(dtype).removeprefix("torch.")
