"""Pre-gated Mixture-of-Experts: convert, fine-tune and serve checkpoints whose routers decide blocks ahead.

Importing the package registers its model classes, so that `from_pretrained(directory)` of transformers'
`AutoModelForCausalLM`, or of `AutoModelForSeq2SeqLM` for Switch, opens a converted checkpoint.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pregate.config import CacheRule, Drive, Policy, SlabDtype, Tier
    from pregate.engine.device.device_engine import DeviceEngine
    from pregate.engine.engine import OffloadEngine
    from pregate.models.families.switch_config import PreGatedSwitchTransformersConfig
    from pregate.models.families.switch_model import PreGatedSwitchTransformersForConditionalGeneration
    from pregate.models.family import register_family

__version__ = "0.1.0"

_EXPORTS = {
    "PreGatedSwitchTransformersConfig": "pregate.models.families.switch_config",
    "PreGatedSwitchTransformersForConditionalGeneration": "pregate.models.families.switch_model",
    "register_family": "pregate.models.family",
    "OffloadEngine": "pregate.engine.engine",
    "DeviceEngine": "pregate.engine.device.device_engine",
    "CacheRule": "pregate.config",
    "Drive": "pregate.config",
    "Policy": "pregate.config",
    "SlabDtype": "pregate.config",
    "Tier": "pregate.config",
}
__all__ = [
    "CacheRule",
    "DeviceEngine",
    "Drive",
    "OffloadEngine",
    "Policy",
    "PreGatedSwitchTransformersConfig",
    "PreGatedSwitchTransformersForConditionalGeneration",
    "SlabDtype",
    "Tier",
    "__version__",
    "register_family",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_own_command() -> bool:
    """Whether this import is the first step of `python -m pregate.…`, which checks its command line before the
    seconds that torch and transformers take to load, and registers the models when it needs them."""
    after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
    return bool(after) and after[0].startswith("pregate.")


if not _is_own_command():
    importlib.import_module("pregate.models.family").families()
