"""The static steps by the names that families give them."""

from __future__ import annotations

from typing import Any

from pregate.config import UsageError
from pregate.engine.device.ops.expert_forms import check_activation
from pregate.engine.device.steps.base import StaticStep
from pregate.engine.device.steps.rotary import RotaryDecoder
from pregate.engine.device.steps.t5 import StaticDecoder
from pregate.models.family import experts_of, family_named

STEPS: dict[str, type[StaticStep]] = {"t5": StaticDecoder, "rotary": RotaryDecoder}


def step_of(config: Any) -> type[StaticStep]:
    """The step of the model that `config` describes. Raises `UsageError` where its family has none, or where no kernel
    computes its experts or its attention."""
    family = family_named(config.model_type)
    if family.step is None:
        raise UsageError(
            f"engine.drive=device has no decoding step for a {family.source_type!r} model: use engine.drive=host."
        )
    check_activation(experts_of(config).activation)
    STEPS[family.step].check(config)
    return STEPS[family.step]
