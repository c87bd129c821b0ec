"""Records of a study that nobody ran, with figures that follow from the seed and the arm alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from studies.accuracy.arms_and_seeds import CONVENTIONAL, PRETRAINING, SIZES, Cell, all_cells
from studies.accuracy.records import Record

EFFECT = {"shifted": -25.0, "calibrated": -9.0, "pre_gated": -0.6, "distilled": 0.4, "gates_only": -4.0}
AGREEMENT = {"shifted": 0.35, "calibrated": 0.72, "pre_gated": 0.55, "distilled": 0.68, "gates_only": 0.75}


def synthetic_record(cell: Cell, examples: int = 200) -> Record:
    generator = np.random.default_rng([cell.seed, len(cell.name)])
    record: Record = {
        **{key: getattr(cell, key) for key in ("arm", "variant", "task", "seed", "lookahead", "init", "entry")},
        "cell": cell.name,
        "stacks": list(cell.stacks),
        "steps": 400 if cell.trained else 0,
        "train_seconds": 80.0 if cell.trained else 0.0,
        "target_tokens": 1000,
        "command": f"python -m pregate.train +arm={cell.arm}",
        "commit": {"commit": "0123456789abcdef", "dirty": False},
        "environment": {"torch": "2.6", "cores": 2, "torch_threads": 1},
    }
    if cell.arm == PRETRAINING:
        return {**record, "curve": [{"step": 400, "loss": 3.2}]}
    metric = "accuracy" if cell.task == "sst2" else "rougeL"
    effect = EFFECT.get(cell.arm, 0.0) - 3.0 * max(0, cell.lookahead - 1)
    hard = np.random.default_rng([cell.seed, 99]).normal(70, 20, examples)
    scores = (hard + effect + generator.normal(0, 6, examples)).round(4)
    final = float(scores.mean())
    share = AGREEMENT.get(cell.arm, 1.0)
    blocks = {stack: [1.0, share, share - 0.05, share + 0.04] for stack in ("encoder", "decoder")}
    models = ["pre_gated"] if cell.arm == CONVENTIONAL else ["pre_gated", "reference"]
    alone = cell.arm == CONVENTIONAL and not cell.variant
    routing: dict[str, Any] = {} if alone else {"agreement": blocks, "gate_mass": blocks}
    routing |= {key: dict.fromkeys(models, blocks) for key in ("load_balance", "switch_rate")}
    extra = {"calibration_seconds": 3.1} if cell.init == "calibrated" else {}
    curve = [{"step": step, metric: final - 2000 / step, "loss": 1.0} for step in (100, 200, 300, 400)]
    return {
        **record,
        **extra,
        "curve": curve if cell.trained else [],
        "split": "validation",
        "num_examples": examples,
        "metric": metric,
        "scores": {metric: final, **({"rouge1": 30.0} if metric == "rougeL" else {})},
        "routing": routing,
        "example_scores": scores.tolist(),
    }


def synthetic_records(size: str = "nano") -> list[Record]:
    return [synthetic_record(cell) for cell in all_cells(SIZES[size])]
