"""The settings of where metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field

from pregate.config.choices import Tracker, WandbMode


@dataclass
class TrackingConfig:
    """Where metrics go beside `metrics.jsonl`, which is always written. All but `kind` is for Weights & Biases.

    `mode: auto` is online after `wandb login`, and offline without. `group`: shows several runs as one.
    `log_checkpoint`: uploads the checkpoint too.
    """

    kind: Tracker = Tracker.wandb
    mode: WandbMode = WandbMode.auto
    project: str = "pregate"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False
