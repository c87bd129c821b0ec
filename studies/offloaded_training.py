"""Training with the experts in the engine's store beside training with them in memory: memory, speed, waiting, losses.

    PREGATE_DATA=DIR python -m studies.offloaded_training results/NAME --work WORK \\
        [--forms offloaded resident] [--steps 20] [--note TEXT] [SETTING=VALUE ...]

Makes a checkpoint with random weights in bfloat16 (WORK/pregated, pre-gated by one block), trains it for a few steps on
SQuAD in each form, each in a process of its own, and writes what was measured. `DIR` holds squad/*.parquet and
t5_tokenizer. Nothing is saved of the training. WORK needs about three times the size of the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pregate.cli import compose_run
from pregate.config import Experts, PreGateConfig, Run
from pregate.conversion.write import convert
from pregate.measure.table_format import CellWriter, Table, facts_line, number, text
from pregate.models.loading import load_resident, open_model
from pregate.system.durable import write_json
from pregate.system.machine import environment, set_seed
from pregate.system.memory import PeakMemory
from pregate.system.process_group import join
from pregate.tasks.registry import build_training_task
from pregate.tasks.tokens import load_tokenizer
from pregate.training.checks import trained_config
from pregate.training.feeds import Share, build_feed
from pregate.training.loop import next_step, train_step
from pregate.training.memory_needs import needs_of
from pregate.training.offloaded import Offloaded, open_offloaded
from pregate.training.optimizer_and_schedule import optimizer_bytes
from pregate.training.session import Session, prepare
from pregate.training.stop_after_step import Interrupts

FORMS = tuple(map(str, Experts))
SETTINGS = (
    "model=switch_base_64",
    "task=squad",
    "tracking=jsonl",
    "then_eval=false",
    "engine.tier=disk",
    "engine.device_budget=25%",
    "train.trainable=all_but_experts",
    "train.precision=bf16",
    "train.batch_sequences=16",
    "train.micro_batch_tokens=4096",
)
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "random_checkpoint.py"
PREGATED = "pregated"
WARM_UP = 2
"""Steps that are left out of medians: the first one allocates and packs."""


class Silent:
    """A tracker that keeps nothing."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        return None

    def sync(self) -> None:
        return None


# --- one form, in its own process -------------------------------------------------------------------------------------


def settings_of(arguments: argparse.Namespace, form: str) -> list[str]:
    data = os.environ["PREGATE_DATA"]
    own = [f"train.experts={form}", f"model.source={arguments.work / PREGATED}", f"model.tokenizer={data}/t5_tokenizer"]
    return [*SETTINGS, *own, f"run_dir={arguments.work / form}", *arguments.settings]


@contextmanager
def opened(run: Run, form: str, device: torch.device) -> Iterator[tuple[Any, Offloaded | None]]:
    assert run.model.source is not None
    if form == Experts.resident:
        yield load_resident(run.model.source, dtype=torch.float32), None
        return
    with open_offloaded(run, open_model(run.model.source), device) as offloaded:
        yield offloaded.model, offloaded


def measured(arguments: argparse.Namespace, form: str) -> dict[str, Any]:
    run = compose_run(settings_of(arguments, form))
    device = join().device
    assert device is not None
    config, dtype = trained_config(run)
    needs = needs_of(run, config, dtype, device)
    task, tokenizer = build_training_task(run), load_tokenizer(run)
    set_seed(run.seed)
    steps: list[dict[str, float]] = []
    with PeakMemory(device) as peak, opened(run, form, device) as (model, offloaded):
        opening = peak.read()
        session = prepare(
            model,
            tokenizer,
            task,
            replace(run.train, steps=0),  # which is to save nothing, and needs no room on the disk
            run=run,
            out_dir=Path(run.run_dir),
            tracker=Silent(),  # type: ignore[arg-type]
            stage="train",
            carry=[],
            offloaded=offloaded,
        )
        share = Share(run, run.train, session.objective, session.batching, session.rank, pin_memory=False)
        session.feed = build_feed(task, tokenizer, share)
        session.micro_batches = session.feed.micro_batches(session.state)
        with Interrupts() as interrupts:
            for _ in range(arguments.steps):
                steps.append(one_step(session, interrupts))
                print(form, json.dumps(steps[-1]), flush=True)
        learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        account = {
            "weights": sum(p.nbytes for p in model.parameters()),
            "gradients": learning,
            "optimizer": optimizer_bytes(session.optimizer),
        }
        for engine in offloaded.engines if offloaded else ():
            account |= {name: size for name, size in engine.expected_bytes().items() if name != "non_expert"}
        peak_bytes = peak.read()
    return {
        "form": form,
        "steps": steps,
        "peak_bytes": peak_bytes,
        "peak_bytes_of_opening": opening,
        "account": account,
        "predicted": needs.device,
        "trained_parameters": learning // torch.float32.itemsize,
        "reader": offloaded.engines[0].host.mover.reader if offloaded else None,
    }


def one_step(session: Session, interrupts: Interrupts) -> dict[str, float]:
    began = time.perf_counter()
    batches, tokens, stop = next_step(session, interrupts)
    if stop:
        raise stop
    metrics = train_step(session, batches, tokens)
    session.state.step += 1
    session.feed.mark(session.state)
    seconds = time.perf_counter() - began
    chosen = {name: metrics[name] for name in ("loss", "grad_norm", "waited_ms", "bytes_moved") if name in metrics}
    return {"seconds": seconds, "tokens": tokens.source + tokens.target, **chosen}


# --- both -------------------------------------------------------------------------------------------------------------


def make_checkpoint(arguments: argparse.Namespace) -> None:
    """A random source in bfloat16, converted; the source itself goes again."""
    pregated, source = arguments.work / PREGATED, arguments.work / "source"
    if pregated.is_dir():
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    chosen = [given for given in (*SETTINGS, *arguments.settings) if given.startswith("model=")]
    subprocess.run([sys.executable, str(SCRIPT), str(source), chosen[-1]], check=True)
    convert(str(source), pregated, PreGateConfig(lookahead=1))
    shutil.rmtree(source)


def row_of(found: dict[str, Any]) -> dict[str, Any]:
    """Medians over the steps behind the first ones."""
    steps = found["steps"][WARM_UP:]

    def median(name: str, factor: float = 1.0) -> float | None:
        return statistics.median(step[name] for step in steps) * factor if name in steps[0] else None

    known = sum(found["account"].values())
    peak = found["peak_bytes"]
    return {
        "form": found["form"],
        "seconds": median("seconds"),
        "tokens_per_s": sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps),
        "waited_s": median("waited_ms", 1e-3),
        "moved": median("bytes_moved"),
        "peak": peak,
        "slots": found["account"].get("slots"),
        "state": sum(found["account"][name] for name in ("weights", "gradients", "optimizer")),
        "activations": None if peak is None else peak - known,
        "predicted": sum(found["predicted"].values()),
        "loss": found["steps"][-1]["loss"],
    }


COLUMNS: dict[str, CellWriter] = {
    "experts": text("form"),
    "s a step": number("seconds"),
    "tokens/s": number("tokens_per_s"),
    "s waited for experts, a step": number("waited_s"),
    "GB moved a step": number("moved", 1e9),
    "peak memory, GB": number("peak", 1e9),
    "of it slots": number("slots", 1e9),
    "weights, gradients, optimizer": number("state", 1e9),
    "the rest: activations, examples, libraries": number("activations", 1e9),
    "predicted before the run, GB": number("predicted", 1e9),
    "loss of the last step": number("loss"),
}


def page(arguments: argparse.Namespace, found: list[dict[str, Any]], command: str) -> str:
    rows = [row_of(one) for one in found]
    parts = [
        f"# {arguments.out.name}",
        "Training with the experts in the engine's store, beside training with the same frozen experts in memory: "
        f"{arguments.steps} steps on SQuAD, random weights in bfloat16. Medians leave out the first {WARM_UP} steps. "
        "Peak memory is what the process grew by.",
        f"```\nPREGATE_DATA=DIR {command}\n```",
        f"Settings: `{' '.join((*SETTINGS, *arguments.settings))}`.",
        Table.of(COLUMNS, rows).markdown(),
    ]
    if len(found) > 1:
        pairs = zip(*(one["steps"] for one in found), strict=True)
        off = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)
        parts.append(f"Largest relative difference of the two losses in a step: {off:.1e}.")
    if arguments.note:
        parts.append(arguments.note)
    parts.append(f"Environment: {facts_line(environment())}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["offloaded", "resident"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--note", default="")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    arguments, arguments.settings = parser.parse_known_args()
    if arguments.form:
        write_json(arguments.out, measured(arguments, arguments.form))
        return
    make_checkpoint(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = []
    for form in arguments.forms:
        file = arguments.out / f"{form}.json"
        given = [str(file), "--work", str(arguments.work), "--steps", str(arguments.steps), "--form", form]
        subprocess.run([sys.executable, "-m", __spec__.name, *given, *arguments.settings], check=True)
        found.append(json.loads(file.read_text()))
    said = ["WORK" if word == str(arguments.work) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", __spec__.name, *said])
    (arguments.out / "README.md").write_text(page(arguments, found, command))


if __name__ == "__main__":
    main()
