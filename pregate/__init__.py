"""Pre-gated Mixture-of-Experts: convert, fine-tune and serve checkpoints whose routers decide blocks ahead.

Importing the package registers its model classes, so that
`transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)` opens a converted checkpoint.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "PreGatedSwitchTransformersConfig": "pregate.models.switch_layers",
    "PreGatedSwitchTransformersForConditionalGeneration": "pregate.models.switch",
    "OffloadEngine": "pregate.engine.decode",
    "Policy": "pregate.config",
    "Tier": "pregate.config",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_own_command() -> bool:
    """Whether this import is the first step of `python -m pregate.…`, which checks its command line before the
    seconds that torch and transformers take to load, and registers the models when it needs them."""
    arguments = sys.orig_argv
    return (
        "-m" in arguments
        and arguments[arguments.index("-m") + 1 :][:1] != []
        and arguments[arguments.index("-m") + 1].startswith("pregate.")
    )


if not _is_own_command():
    importlib.import_module("pregate.models.switch")
