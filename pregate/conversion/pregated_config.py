"""Whether a model can be converted as asked for, and the config of the model that it becomes.

Knows `config.json` alone; opens no weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pregate.config import PreGateConfig, UsageError
from pregate.models.family import Family, families
from pregate.models.pregating import PreGating


@dataclass(frozen=True)
class Target:
    """The pre-gated model that a source becomes. json: its `config.json`. num_blocks: stack -> its MoE blocks."""

    family: Family
    json: dict[str, Any]
    config: Any
    num_blocks: dict[str, int]


def target_of(source: str, config: dict[str, Any], pregate: PreGateConfig) -> Target:
    """The target for a source with the `config.json` `config`. Raises `UsageError` if it cannot be converted so."""
    family = _family(source, config)
    try:
        conventional = family.config(config)
    except UsageError as error:
        raise UsageError(f"The config.json of {source}{str(error).removeprefix('The config.json')}") from error
    num_blocks = family.num_blocks(conventional)
    if not any(num_blocks.values()):
        raise UsageError(
            f"{source} is a dense model, none of its layers holds experts: give a Mixture-of-Experts checkpoint."
        )
    gating = PreGating.of_config(pregate).within(num_blocks)
    written = family.pregated_json(config, gating)
    return Target(family, written, family.config(written), num_blocks)


def _family(source: str, config: dict[str, Any]) -> Family:
    """Raises `UsageError` for a model that cannot be converted, or need not be."""
    kind = config.get("model_type")
    known = sorted(family.source_type for family in families())
    give = f"give a checkpoint of type {' or '.join(known)}."
    if kind is None:
        raise UsageError(f"The config.json of {source} names no model_type: {give}")
    for family in families():
        if kind == family.source_type:
            return family
        if kind == family.model_type:
            ahead = family.config(config).pregating.lookahead
            raise UsageError(f"{source} is already pre-gated (lookahead {ahead}): convert the model it was made from.")
    if any("expert" in key for key in config):
        raise UsageError(f"{source} is a {kind} model, which cannot be converted: {give}")
    raise UsageError(f"{source} is a dense {kind} model without experts: {give}")
