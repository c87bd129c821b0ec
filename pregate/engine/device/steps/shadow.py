"""A module with other parts, made without changing it.

A static step runs the model's own layers with attention and experts of its own, while the host goes on to drive the
same layers over prompts. Knows modules; knows nothing about what they compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


def shadow(module: nn.Module, **parts: Callable[..., Any]) -> Any:
    """A copy of `module` that shares all with it, parameters and settings included, but the named `parts`."""
    copied = copy.copy(module)
    # a callable that is no module may stand there too
    vars(copied)["_modules"] = {**module._modules, **parts}
    return copied
