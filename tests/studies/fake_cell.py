"""Stands in for `python -m pregate.train`: leaves a run directory at once, or misbehaves where its name says so."""

import json
import os
import sys
import time
from pathlib import Path

given = dict(item.lstrip("+").split("=", 1) for item in sys.argv[1:])
run_dir, name = Path(given["run_dir"]), Path(given["run_dir"]).name
log = Path(os.environ["FAKE_LOG"])
with log.open("a") as file:
    file.write(f"{name}\n")
for key in ("model.source", "reference"):
    if key in given and not Path(given[key]).is_dir() and given[key] != "hub/source":
        sys.exit(f"{key} is gone")
if name in os.environ.get("FAKE_FAIL", "").split():
    print("what went wrong")
    sys.exit(2)
run_dir.mkdir(parents=True, exist_ok=True)
if name in os.environ.get("FAKE_SLOW", "").split() and not (run_dir / "half").exists():
    try:
        print("train: step 1/2  loss 1.0", flush=True)
        (run_dir / "half").touch()  # from here on it is stopped as it should be
        time.sleep(250)
        sys.exit("nobody has stopped it")
    except KeyboardInterrupt:
        print("saved")
        sys.exit(130)
(run_dir / "checkpoint").mkdir(exist_ok=True)
(run_dir / "checkpoint" / "config.json").write_text("{}")
as_ever = name != os.environ.get("FAKE_OTHER")
train = {"steps": 2, "seconds": 1.5, "target_tokens": 8}
(run_dir / "metrics.jsonl").write_text(
    json.dumps({"step": 2, "train/eval/accuracy": 50.0, "train/eval/loss": 1.0 if as_ever else 2.0}) + "\n"
)
if name != "pretrain":
    evaluation = {
        "split": "validation",
        "num_examples": 2,
        "primary_metric": "accuracy",
        "scores": {"pre_gated": {"accuracy": 50.0}},
        "environment": {
            "torch": "1",
            "torch_threads": os.environ.get("OMP_NUM_THREADS"),
            "git": {"commit": "c0ffee", "dirty": False},
        },
        "routing": {"switch_rate": {"pre_gated": {"encoder": [0.123456]}}},
    }
    (run_dir / "eval.json").write_text(json.dumps(evaluation))
    scores = [json.dumps({"scores": {"accuracy": value}}) for value in (100.0, 0.0)]
    (run_dir / "predictions.jsonl").write_text("\n".join(scores) + "\n")
(run_dir / "summary.json").write_text(json.dumps({"train": train}))
