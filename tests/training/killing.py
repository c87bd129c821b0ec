"""Training commands that are killed: each attempt is a fork of this process, which has imported everything already.

    python -m tests.training.killing DIR [KILLS] [SEED]

kills runs of both recipes at random moments, KILLS times in all, and compares what they log and leave with undisturbed
runs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.pyplot  # noqa: F401
import torch

import pregate.measure.evaluation  # with what follows it: else every fork would import it again
import pregate.training.stages  # noqa: F401
from pregate.cli import compose_run, ending_in_one_sentence
from pregate.config import GeneratedConfig, Run
from pregate.system.stopping import stoppable
from pregate.tasks.generated import generated_tokenizer
from pregate.train import main
from tests.training.copying import write_olmoe

RECIPE = {
    "batch_sequences": 6,
    "micro_batch_tokens": 96,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "schedule": "cosine",
    "warmup_steps": 1,
    "dropout": 0.1,
    "log_every": 1,
    "eval_every": 4,
    "save_every": 3,
    "eval_examples": 4,
}
SHORT = [
    *("task=generated", "task.generated.train=80", "task.generated.validation=20", "tracking=jsonl"),
    *("task.max_source_tokens=40", "task.max_target_tokens=6", "resume=true"),
    *("engine.bench_new_tokens=2", "engine.bench_repeats=1", "engine.bench_prompts=1", "engine.policies=[pre_gated]"),
    *("eval.report=false", "eval.examples=4", "eval.bootstrap_samples=5"),
]
SWITCH = (
    "num_layers=2 num_decoder_layers=2 num_sparse_encoder_layers=2 num_sparse_decoder_layers=2 "
    "d_model=16 d_kv=8 d_ff=24 num_heads=2 num_experts=4"
)


def switch_run(*changes: str, steps: int = 10) -> Run:
    """A source from scratch, its conversion, fine-tuning and evaluation."""
    geometry = [f"model.geometry.{size}" for size in SWITCH.split()]
    source = [f"source_train.{key}={value}" for key, value in {**RECIPE, "steps": 4}.items()]
    train = [f"train.{key}={value}" for key, value in {**RECIPE, "steps": steps}.items()]
    return compose_run(["+experiment=quickstart", *SHORT, *geometry, *source, *train, *changes])


def olmoe_run(root: Path, *changes: str, steps: int = 10) -> Run:
    """A source in `root`, made if it is not there, its conversion, fine-tuning in packed rows and evaluation."""
    source = root / "source"
    if not source.exists():
        write_olmoe(source, generated_tokenizer(GeneratedConfig(train=200, validation=20)), 512, num_hidden_layers=2)
    train = [f"train.{key}={value}" for key, value in {**RECIPE, "steps": steps, "packing": True}.items()]
    return compose_run([*SHORT, f"model.source={source}", *train, *changes])


def start(run: Run, run_dir: Path, inside: Callable[[], None] | None = None) -> int:
    """Fork a process that trains; its output goes to `RUN_DIR.log`. `inside` is called there first."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        data = replace(run.data, cache=f"{run_dir}.tokens")
        _train(replace(run, run_dir=str(run_dir), data=data), inside)
    return child


def _train(run: Run, inside: Callable[[], None] | None) -> NoReturn:
    status = 1
    streams: list[Any] = []  # of the parent: let go, they would close what is the log now
    try:
        log = os.open(f"{run.run_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        streams.extend((sys.stdout, sys.stderr))
        sys.stdout, sys.stderr = (os.fdopen(handle, "w", buffering=1, closefd=False) for handle in (1, 2))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if inside:
            inside()
        with stoppable():
            ending_in_one_sentence(lambda: main(run))
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """The exit status of a forked process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(child: int, seconds: float) -> bool:
    """Kill it once `seconds` are over, and say whether it was killed, then or before. Raises if it failed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, -signal.SIGKILL), f"a run failed: {code}"
            return code != 0
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


class Killer:
    """An audit hook that sends its process a signal ahead of an operation on files below `directory`.

    Opening for writing, making, renaming and removing count. `at`: the number of the operation, or the name of an event
    and the end of its path. `count` is shared with the processes that are forked.
    """

    def __init__(self, directory: Path, at: int | tuple[str, str] | None = None, number: int = signal.SIGKILL) -> None:
        self.directory, self.at, self.number = str(directory), at, number
        self.count = torch.zeros(1, dtype=torch.int64).share_memory_()

    def install(self) -> None:
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            counts = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            counts = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link")
        path = str(arguments[0]) if counts else ""
        if not path.startswith(self.directory):
            return
        self.count += 1
        named = isinstance(self.at, tuple) and event == self.at[0] and path.endswith(self.at[1])
        if named or self.at == int(self.count):
            self.at = None
            os.kill(os.getpid(), self.number)


UNEQUAL = ("time", "tokens_per_s", "engine/")
"""Parts of the names of what two equal runs do not have in common."""


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of the log without what is measured; each must be whole."""
    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if not any(part in k for part in UNEQUAL)} for line in lines]


def files(run_dir: Path) -> set[str]:
    """All but what a pack notes beside it when its source has other times and the same content."""
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.name != "source.json"}


def undisturbed(run: Run, run_dir: Path) -> tuple[list[dict[str, Any]], float, int]:
    """What a run logs that nothing interrupts, its seconds, and its operations on files."""
    began, counter = time.monotonic(), Killer(run_dir)
    status = ended(start(run, run_dir, counter.install))
    assert status == 0, run_dir.with_name(f"{run_dir.name}.log").read_text()
    lines = logged(run_dir)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(set(losses)) == len(losses) >= 6 and all(0 < loss < float("inf") for loss in losses)
    assert int(counter.count) > 50
    return lines, time.monotonic() - began, int(counter.count)


def kill_at_random(run: Run, root: Path, kills: int, seed: int, told: Callable[[str], object] = lambda _: None) -> int:
    """Kill runs `kills` times, half of them at random times and half ahead of random operations on files, each started
    again with the same command, and compare every run that ends with an undisturbed one. Returns how many runs were
    compared."""
    expected, seconds, operations = undisturbed(run, root / "undisturbed")
    rng, done, runs = random.Random(seed), 0, 0
    while done < kills:
        runs += 1
        run_dir, ends = root / f"run_{runs}", False
        while not ends:
            after, at = rng.uniform(0.0, seconds), rng.randrange(1, operations + 1)
            if done == kills:
                moment, child, after = "never", start(run, run_dir), 3600.0
            elif done % 2:
                moment, child = f"{after:.2f} s after its start", start(run, run_dir)
            else:
                moment, after = f"ahead of operation {at}", 3600.0
                child = start(run, run_dir, Killer(run_dir, at).install)
            ends = not killed_after(child, after)
            done += not ends
            told(f"run {runs}, {moment}: " + ("ends" if ends else f"kill {done}"))
        assert logged(run_dir) == expected, run_dir
        assert files(run_dir) ^ files(root / "undisturbed") == set(), run_dir
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, kills, seed = Path(sys.argv[1]), *(int(word) for word in [*sys.argv[2:], "100", "0"][:2])
    for name, chosen in (("switch", switch_run()), ("olmoe", olmoe_run(place))):
        (place / name).mkdir(parents=True)
        began = time.monotonic()
        count = kill_at_random(chosen, place / name, kills // 2, seed, lambda text: print(text, flush=True))
        print(
            f"{name}: {kills // 2} kills, {count} runs equal to the undisturbed one, {time.monotonic() - began:.0f} s"
        )
