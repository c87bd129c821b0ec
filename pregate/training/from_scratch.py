"""The model that a training starts from where it has no source: its config, from the run's geometry and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pregate.config import Run, UsageError
from pregate.models.family import family_named
from pregate.models.pregating import PreGating
from pregate.system.console import reason_of

VOCABULARY_MULTIPLE = 64


def vocabulary_size(tokenizer: Any) -> int:
    """The number of embeddings of a model trained from scratch."""
    return -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids by which a model ends its answers and pads them: what training teaches by this tokenizer."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return {} if eos is None else {"eos_token_id": eos, "pad_token_id": eos if pad is None else pad}


def geometry_config(run: Run, gating: PreGating, vocab_size: int, special: Mapping[str, int] | None = None) -> Any:
    """The config of a model trained from scratch. `special`: the `special_tokens` of its tokenizer; what the geometry
    says comes before them. Raises `UsageError` for a geometry that cannot be built."""
    family = family_named(run.model.family)
    settings = family.from_scratch({**(special or {}), **run.model.geometry}, vocab_size)
    try:
        # alone first, so that the message names the one of the two that is wrong
        plain = family.config_class(**settings)
        return family.config_class(**settings, pregate=gating.within(family.num_blocks(plain)).to_dict())
    except UsageError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise UsageError(f"model.geometry of {run.model.name!r} cannot be built: {reason}.") from error
