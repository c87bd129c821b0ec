"""Training speed beside stock transformers: same weights, same sequences in the same order, same dtype, one process.

    PREGATE_DATA=DIR python -m studies.training_speed --out results/training_speed_NAME

Blocks of a few steps of both sides take turns, so that what else the machine does meets both. Reads DIR/squad and
DIR/t5_tokenizer. A row that is in OUT already is skipped. Leaves training_speed.jsonl, training_speed.md and
training_speed.png in OUT.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from pregate.cli import compose_run
from pregate.config import Device, UsageError
from pregate.models.family import family_named
from pregate.system.durable import append_line, read_lines
from pregate.system.machine import environment, pick_device
from pregate.tasks.tokens import Collator
from studies.training_speed.compared_models import BATCH_SEQUENCES, LEARNING_RATE, Case, cases
from studies.training_speed.sides import Ours, compare, models, read_data
from studies.training_speed.tables import markdown, plot, summary

NAME = "training_speed"


DATA = ["task=squad", "task.max_target_tokens=32", "model.tokenizer=${data.root}/t5_tokenizer"]
DRY = ["task=generated", "task.generated.train=64"]


def settings(case: Case, precision: str, data: list[str]) -> list[str]:
    """What a user would write to train so with `pregate.train`."""
    geometry = json.dumps(case.geometry, separators=(",", ":")).replace('"', "")
    return [
        *data,
        f"model={'nano_switch' if case.family == 'switch' else 'nano_olmoe'}",
        f"model.geometry={geometry}",
        "pregate.lookahead=0",
        f"train.batch_sequences={BATCH_SEQUENCES}",
        "train.micro_batch_tokens=1000000",
        f"train.learning_rate={LEARNING_RATE}",
        f"train.precision={precision}",
        "train.balance_loss=0",
        "train.z_loss=0",
        "train.eval_examples=1",
        "tracking=jsonl",
    ]


def measure(
    case: Case, steps: int, block_steps: int, max_seconds: float, precision: str, data_settings: list[str]
) -> dict[str, object]:
    """One row: what both sides did."""
    count = f"data.max_train_examples={steps * BATCH_SEQUENCES}"
    run = compose_run([*settings(case, precision, data_settings), count])
    family = family_named(run.model.family)
    causal = not family.objective.closes_sources
    data = read_data(run, steps, lambda tokenizer: Collator.for_task(run.task, tokenizer, family.objective))
    mine, stock = models(run, case, data.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(mine, data, run, Path(folder))
        device = ours.device
        pairs = compare(
            ours,
            stock,
            data,
            causal=causal,
            block_steps=block_steps,
            max_seconds=max_seconds,
            bf16=precision == "bf16",
            out=Path(folder),
        )
    blocks = [[asdict(ours), asdict(stock)] for ours, stock in pairs]
    return {
        **asdict(case),
        "name": case.name,
        "precision": precision,
        "device": device.type,
        **summary(blocks),
        "blocks": blocks,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m studies.{NAME}", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rows", nargs="+", help="names of rows, such as switch_8_eager; all unless given")
    parser.add_argument("--steps", type=int, default=120, help="at most so many steps of each side a row")
    parser.add_argument("--seconds", type=float, default=90.0, help="no block of a row behind it, but three at least")
    parser.add_argument("--block-steps", type=int, default=3, help="steps of one side at a time")
    parser.add_argument("--layers", type=int, help="so many layers a stack, for a quick look")
    parser.add_argument("--dry", action="store_true", help="two layers, four steps and generated data: no figures")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    given = parser.parse_args(arguments)
    if given.dry:
        given.layers, given.steps, given.block_steps = 2, 4, 1
    wanted = cases(pick_device(Device.auto))
    if given.layers:
        wanted = [case.cut_to(given.layers) for case in wanted]
    if unknown := set(given.rows or ()) - {case.name for case in wanted}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; choose from {', '.join(c.name for c in wanted)}")
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"{NAME}.jsonl"
    try:
        for case in wanted:
            done = {record["name"] for record in read_lines(file)}
            if case.name in done or (given.rows and case.name not in given.rows):
                continue
            steps = given.steps - given.steps % given.block_steps
            data = DRY if given.dry else DATA
            record = measure(case, steps, given.block_steps, given.seconds, given.precision, data)
            record["environment"] = environment()
            append_line(file, record)
            report(given.out, file)
    except UsageError as error:
        parser.exit(2, f"pregate: {error}\n")
    print((given.out / f"{NAME}.md").read_text(), end="")


def report(out: Path, file: Path) -> None:
    """Write the table and the plot of all rows so far."""
    records = read_lines(file)
    (out / f"{NAME}.md").write_text(markdown(records, records[-1]["environment"]), encoding="utf-8")  # type: ignore[arg-type]
    plot(records, out / f"{NAME}.png")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
