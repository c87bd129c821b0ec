"""The settings of where data and their tokens lie."""

from __future__ import annotations

from dataclasses import dataclass

from pregate.config.validators import at_least, setting


@dataclass
class DataConfig:
    """`cache`: where the tokens of the training examples are kept; null is `PREGATE_CACHE`, or else a folder `pregate`
    in the cache of Hugging Face's libraries."""

    root: str | None = None
    cache: str | None = None
    max_train_examples: int | None = None
    num_workers: int = setting(0, at_least(0))
