"""What a call of `generate` asks for, wherever it says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def asked_for(name: str, options: Mapping[str, Any], model: Any) -> Any:
    """The setting `name` as upstream's `generate` finds it: among the `options` of the call, else in the
    `generation_config` that is one of them, else in the model's own; a None in the second asks for nothing."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if given is None else given
