"""Peak memory of a training step by setting, each setting in a process of its own.

    python -m studies.training_memory results/NAME [--model switch_base_8] [--settings gates lora_attention]

Two steps of random tokens on a CPU in float32, random weights: what the second adds is the optimizer's state beside
the activations. Settings that are measured anew replace their rows; the others stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pregate.cli import compose_run
from pregate.config import Run
from pregate.measure.table_format import Table, facts_line, number
from pregate.models.family import family_named
from pregate.models.pregating import PreGating
from pregate.system.durable import read_object, write_json
from pregate.system.machine import environment, set_seed
from pregate.system.memory import PeakMemory
from pregate.training.losses import loss_share
from pregate.training.optimizer_and_schedule import build_optimizer, clip_gradients
from pregate.training.session import configure

ROWS, TOKENS, VOCABULARY, STEPS = 4, 128, 32128, 2
FILE = "memory.json"
CHECKPOINTING = "train.gradient_checkpointing=true"
LORA = "train.trainable=lora"
WITHOUT = {
    "gates": ["train.trainable=gates"],
    "lora_attention": [LORA, "train.lora.targets=[attention]"],
    "lora_experts": [LORA, "train.lora.targets=[experts]"],
    "lora_attention_experts": [LORA, "train.lora.targets=[attention,experts]"],
    "adafactor": ["train.optimizer=adafactor"],
    "adamw_8bit": ["train.optimizer=adamw_8bit"],
    "full": [],
}
SETTINGS = {
    name + suffix: [*overrides, *more]
    for suffix, more in (("", []), ("_checkpointing", [CHECKPOINTING]))
    for name, overrides in WITHOUT.items()
}
"""The smallest first."""
COLUMNS = {
    "settings": lambda row: " ".join(f"`{one}`" for one in row["overrides"]) or "none: AdamW on all weights",
    "learn, millions": number("num_trained", 1e6),
    "peak, GB": number("peak_bytes", 1e9),
}


def measure(run: Run) -> dict[str, Any]:
    """The peak of the steps, from before the model is made."""
    device = torch.device("cpu")
    with PeakMemory(device) as peak:
        set_seed(0)
        family = family_named(run.model.family)
        described = family.from_scratch(run.model.geometry, VOCABULARY)
        gating = PreGating.of_config(run.pregate)
        model: Any = family.model_class(family.config_class(**described, pregate=gating.to_dict()))
        configure(model, run.train)
        optimizer = build_optimizer(model, run.train)
        ids = torch.randint(2, VOCABULARY, (ROWS, TOKENS))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        objective = family.objective
        for _ in range(STEPS):
            inputs = objective.inputs(batch) | {"labels": batch["labels"], "loss_only": True}
            outputs = model(**inputs, output_router_logits=True, use_cache=False)
            share = loss_share(
                outputs,
                batch,
                objective.count(batch),
                objective=objective,
                balance_weight=run.train.balance_loss,
                z_weight=run.train.z_loss,
            )
            share.total.backward()
            norm = clip_gradients(model.parameters(), run.train.clip_norm)
            assert share.total.isfinite() and norm.isfinite() and norm > 0
            del outputs, share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"num_trained": learning, "peak_bytes": peak.num_bytes}


def readme(name: str, model: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"""# {name}

Peak memory of a training step of `model={model}` by setting: {ROWS} sequences of {TOKENS} source and {TOKENS} target
tokens, float32, lookahead 1, random weights, on a CPU.

```
python -m studies.training_memory results/{name} --model {model}
```

{Table.of(COLUMNS, rows).markdown()}

- The peak is the growth of the resident set (VmHWM) from before the model is made, over {STEPS} steps: forward pass,
  backward pass, clipping, optimizer. Each row is a process of its own. Loading, validation and saving are left out.
- Adapters have rank {Run().train.lora.rank}. Gates learn beside them.

Environment: {facts_line(environment())}.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.training_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--model", default="switch_base_8", help="a member of the config group model")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--one", choices=SETTINGS, help="this one, in this process")
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(measure(compose_run([f"model={given.model}", *SETTINGS[given.one]]))))
        return
    found = read_object(given.result / FILE) or {"rows": {}}
    for name in given.settings:
        command = [
            sys.executable,
            "-m",
            "studies.training_memory",
            str(given.result),
            "--model",
            given.model,
            "--one",
            name,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1]) | {"overrides": SETTINGS[name]}
        print(name, json.dumps(row), flush=True)
        found["rows"][name] = row
        given.result.mkdir(parents=True, exist_ok=True)
        write_json(given.result / FILE, {"model": given.model, "rows": found["rows"], "environment": environment()})
        rows = [found["rows"][name] for name in reversed(SETTINGS) if name in found["rows"]]
        (given.result / "README.md").write_text(readme(given.result.name, given.model, rows))


if __name__ == "__main__":
    main()
