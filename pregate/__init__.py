"""Pre-gated Mixture-of-Experts: convert, fine-tune and serve checkpoints whose routers decide blocks ahead.

Importing the package registers its model classes, so that
`transformers.AutoModelForSeq2SeqLM.from_pretrained(directory)` opens a converted checkpoint.
"""

__version__ = "0.1.0"

from pregate.models.switch import PreGatedSwitchTransformersForConditionalGeneration
from pregate.models.switch_layers import PreGatedSwitchTransformersConfig

__all__ = ["PreGatedSwitchTransformersConfig", "PreGatedSwitchTransformersForConditionalGeneration", "__version__"]
