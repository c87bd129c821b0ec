"""The settings of where metrics go."""

from __future__ import annotations

from dataclasses import dataclass, field

from pregate.config.choices import Tracker, WandbMode


@dataclass
class TrackingConfig:
    kind: Tracker = Tracker.wandb
    mode: WandbMode = WandbMode.auto
    project: str = "pregate"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False
