"""The one typed schema of every entry point: what may be set, and which settings cannot work. Each section has a file.

YAML is merged into these dataclasses before any work starts; a `Run` refuses impossible values as it is made. Knows
nothing about Hydra's command line (`cli`), torch, models or data. What depends on a model, a checkpoint or a machine is
refused where that is opened. A `Run` is read-only by convention: nothing downstream writes to it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pregate.config.bench import BenchConfig
from pregate.config.calibration import CalibrationConfig
from pregate.config.choices import PRE_TRAINING, Experts, Init
from pregate.config.data import DataConfig
from pregate.config.engine import EngineConfig
from pregate.config.eval import EvalConfig
from pregate.config.model import ModelConfig
from pregate.config.pregate import PreGateConfig
from pregate.config.task import TaskConfig
from pregate.config.tracking import TrackingConfig
from pregate.config.train import TrainConfig
from pregate.config.validators import check_section, need
from pregate.system.durable import write_text

NAMED = {"empty": "give it a value, or leave it out"}


@dataclass
class Run:
    """Everything one command needs; built once by `entry_point`, never changed. `overrides`: the command line.

    `allow_changes`: what a resumed run may have otherwise than before although its result changes: names of settings or
    of sections, and `processes`, `data` and `source`.
    """

    name: str = field(default="run", metadata=NAMED)
    run_dir: str = field(default="runs/run", metadata=NAMED)
    seed: int = 0
    resume: bool = False
    allow_changes: list[str] = field(default_factory=list)
    then_eval: bool = True
    plan: bool = False
    source: str | None = None
    output: str | None = None
    checkpoint: str | None = None
    reference: str | None = None
    overrides: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    pregate: PreGateConfig = field(default_factory=PreGateConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    source_train: TrainConfig | None = None
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot work, before any work starts. Raises `UsageError`.

        A section does not check itself, because only the run knows its name: `train` and `source_train` share a class.
        """
        check_section(self, "")
        for name in ("run_dir", "source", "output", "checkpoint", "reference"):
            setattr(self, name, _at_home(getattr(self, name)))
        self.engine.pack_dir = _at_home(self.engine.pack_dir)

    def check(self, prefix: str) -> None:
        """What concerns several sections."""
        gate, source = self.pregate, self.source_train
        need(
            not (gate.init is Init.calibrated and gate.lookahead and self.task.kind in PRE_TRAINING),
            "pregate.init=calibrated fits the gates of a trained model, which pre-training has none of: leave it out.",
        )
        # a run may leave its converted model as it is, but a source must be trained
        need(source is None or source.steps > 0, "source_train.steps=0 must be at least 1.")
        need(
            source is None or source.experts is Experts.resident,
            "source_train.experts=offloaded leaves experts as they are, and a model that is trained from scratch has "
            "none on the disk: set source_train.experts=resident.",
        )


def _at_home(place: Any) -> Any:
    """Shells leave the ~ in key=~/place as it is."""
    return str(Path(place).expanduser()) if place and place.startswith("~") else place


def to_dict(run: Run) -> dict[str, Any]:
    """The `Run` as plain JSON-able values, as written to `config.yaml` and sent to trackers."""
    return json.loads(json.dumps(asdict(run)))


def save_run(run: Run, path: Path) -> None:
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(run))))
