"""The settings of adapters (`pregate.training.lora`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from pregate.config.choices import LoraTarget
from pregate.config.validators import Limit, above, at_least, need, setting


@dataclass
class LoraConfig:
    """What learns beside the gates with `train.trainable: lora`: two matrices of `rank` for each matrix of `targets`.

    Their product, times `alpha` / `rank`, is added to the matrix (Hu et al. 2021). `dropout` acts on what they read.
    """

    rank: int = setting(16, at_least(1))
    alpha: float = setting(32.0, above(0))
    dropout: float = setting(0.0, Limit(lambda rate: 0 <= rate < 1, "must lie in [0, 1)"))
    targets: list[LoraTarget] = field(
        default_factory=lambda: [LoraTarget.attention],
        metadata={"empty": "name at least one of " + ", ".join(LoraTarget)},
    )

    def check(self, prefix: str) -> None:
        named = ",".join(self.targets)
        need(len(set(self.targets)) == len(self.targets), f"{prefix}targets=[{named}] must name each part once.")
