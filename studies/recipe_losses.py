"""What each recipe wins back of what moved gates lose on a text, in nats a token, and what it costs.

    python -m studies.recipe_losses results/NAME MOE --work WORK [--recipes own shifted calibrated]

MOE is a directory of `studies.dense_to_moe`: the source is MOE/checkpoint, the text MOE/text. A loss on a few thousand
tokens shows differences that the score of a task on a few hundred examples hides. A recipe that is measured already is
passed over, and one that was stopped goes on. Other settings than before need other directories. A trained model is
removed when it is measured. WORK takes, for SmolLM2-135M, half a GB for each conversion and 4 GB for the training that
runs.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from pregate.cli import ending_in_one_sentence
from pregate.config import UsageError
from pregate.conversion.manifest import MANIFEST
from pregate.measure.figure_style import COMPUTE, INK, QUIET, write_figure
from pregate.measure.intervals import bootstrap_interval
from pregate.measure.table_format import Row, Table, facts_line, number, signed, text
from pregate.models.family import family_of_model
from pregate.models.loading import load_resident
from pregate.models.routing import slot_agreement
from pregate.system.console import say
from pregate.system.durable import append_line, make_directory, read_lines, read_object, write_json, write_text
from pregate.system.machine import environment
from pregate.system.stopping import going_on, stoppable
from pregate.training.lora import check_installed
from pregate.training.run_dir_lock import CHECKPOINT, SUMMARY
from studies.accuracy.records import num_parameters
from studies.begun_with import SETTINGS, begun_alike
from studies.dense_to_moe import healing
from studies.dense_to_moe.healing_text import packed_rows, read_texts

ROWS = "recipes.jsonl"
OWN, SHIFTED = "own", "shifted"
SAMPLES = 10_000
"""Of the bootstrap."""
AHEAD = "pregate.lookahead=1"
CALIBRATED = (AHEAD, "pregate.init=calibrated")
GATES = "train.trainable=gates"
TAUGHT = ("train.distill_logits=1", "train.distill_routing=1")
"""By the source."""


@dataclass(frozen=True)
class Recipe:
    """`convert`: settings of `pregate.convert`, none for the source itself. `train`: those of `pregate.train`, behind
    the common ones; None where nothing is trained. `taught`: whether the source is the teacher."""

    label: str
    convert: tuple[str, ...] = ()
    train: tuple[str, ...] | None = None

    @property
    def moved(self) -> str | None:
        """The recipe whose loss it has to win back: gates that are moved as far, and nothing else."""
        ahead = self.convert[:1]
        return next((name for name, other in RECIPES.items() if other.convert == ahead and other.train is None), None)

    @property
    def taught(self) -> bool:
        return any(setting.startswith("train.distill") for setting in self.train or ())


RECIPES = {
    OWN: Recipe("the source"),
    SHIFTED: Recipe("(b) moved gates", (AHEAD,)),
    "calibrated": Recipe("(c) calibrated gates", CALIBRATED),
    "gates": Recipe("(f) calibrated gates, then trained", CALIBRATED, (GATES, *TAUGHT)),
    "pre_gated": Recipe("(d) all weights trained", (AHEAD,), ()),
    "conventional": Recipe("(a) the source, all weights trained", (), ()),
    "distilled": Recipe("(e) all weights trained, with a teacher", (AHEAD,), (TAUGHT[0], "train.distill_routing=0.1")),
    "calibrated_late": Recipe("(c) with the weights of the block's own router", (*CALIBRATED, "pregate.weights=late")),
    "pre_gated_calibrated": Recipe("(d) from calibrated gates", CALIBRATED, ()),
    "gates_rank": Recipe("(f) with a loss that ranks", CALIBRATED, (GATES, *TAUGHT, "train.distill_routing_loss=rank")),
    "gates_lora": Recipe(
        "(f) with low-rank adapters",
        CALIBRATED,
        ("train.trainable=lora", "train.lora.targets=[attention,experts]", *TAUGHT),
    ),
    "shifted_late": Recipe("(b) with the weights of the block's own router", (AHEAD, "pregate.weights=late")),
    "shifted_start": Recipe("(b) with the first block conventional", (AHEAD, "pregate.start=1")),
    "gates_mlp": Recipe("(f) with a small network in each gate", (*CALIBRATED, "pregate.gate=mlp"), (GATES, *TAUGHT)),
    "shifted_2": Recipe("(b) two blocks ahead", ("pregate.lookahead=2",)),
    "calibrated_2": Recipe("(c) two blocks ahead", ("pregate.lookahead=2", CALIBRATED[1])),
    "shifted_3": Recipe("(b) three blocks ahead", ("pregate.lookahead=3",)),
    "calibrated_3": Recipe("(c) three blocks ahead", ("pregate.lookahead=3", CALIBRATED[1])),
}
"""In the order of their worth."""


@dataclass(frozen=True)
class Study:
    """Where the source and its text are, where checkpoints go, and how much each recipe may use."""

    moe: Path
    work: Path
    steps: int
    calibration_tokens: int
    measure_tokens: int
    seed: int

    @property
    def source(self) -> Path:
        return self.moe / "checkpoint"

    def run_dir(self, name: str) -> Path:
        """Where a recipe is trained."""
        return self.work / "trained" / name

    @property
    def corpus(self) -> Path:
        return self.moe / "text"

    @cached_property
    def row_tokens(self) -> int:
        return int((read_object(self.moe / SETTINGS) or {})["row_tokens"])

    @cached_property
    def rows(self) -> Tensor:
        """Of the validation text (B, T)."""
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        return packed_rows(read_texts(self.corpus, "validation"), tokenizer, self.measure_tokens, self.row_tokens)

    @cached_property
    def source_routes(self) -> list[Tensor]:
        return losses_and_routes(self.source, self.rows)[1]

    def text_file(self) -> Path:
        """The text for calibration as a plain file: as many documents as hold the tokens several times over."""
        path = self.work / "calibration.txt"
        if not path.is_file():
            characters, kept = 0, []
            for document in read_texts(self.corpus, "train"):
                kept.append(document)
                characters += len(document)
                if characters > 16 * self.calibration_tokens:
                    break
            write_text(path, "\n".join(kept))
        return path


def check(study: Study) -> None:
    """Raises `UsageError` for a directory that `studies.dense_to_moe` has not finished, and for too few steps or
    tokens."""
    for needed in (study.source / "config.json", study.corpus / "train.parquet", study.moe / SETTINGS):
        if not needed.is_file():
            raise UsageError(f"{needed} is missing: make {study.moe} with python -m studies.dense_to_moe first.")
    if study.steps < 1 or study.calibration_tokens < 1:
        raise UsageError("--steps and --calibration-tokens must be at least 1.")
    if study.measure_tokens < study.row_tokens:
        raise UsageError(f"--measure-tokens must be at least {study.row_tokens}, the tokens of a row of {study.moe}.")


def claim(study: Study, results: Path) -> None:
    """Note in both directories what the study was begun with. Raises `UsageError` for other settings than before: the
    losses could not be compared, and a checkpoint in WORK would be another one than the settings say."""
    mine = {
        "moe": study.moe.resolve().name,
        "steps": study.steps,
        "calibration_tokens": study.calibration_tokens,
        "measure_tokens": study.measure_tokens,
        "seed": study.seed,
    }
    for place in (results, study.work):
        begun_alike(place, mine)
    for place in (results, study.work):
        make_directory(place)
        write_json(place / SETTINGS, mine)


# --- one recipe -------------------------------------------------------------------------------------------------------


def converted(study: Study, recipe: Recipe) -> Path:
    """The checkpoint of a recipe before training. Recipes that convert alike share it."""
    if not recipe.convert:
        return study.source
    place = study.work / "converted" / "_".join(setting.partition("=")[2] for setting in recipe.convert)
    if not (place / MANIFEST).is_file():
        calibration = [
            "calibration.data=text",
            f"calibration.text={study.text_file()}",
            f"calibration.tokens={study.calibration_tokens}",
            "calibration.batch_size=4",
        ]
        fitted = calibration if CALIBRATED[1] in recipe.convert else []
        places = [f"source={study.source}", f"output={place}"]
        call("pregate.convert", [*places, f"seed={study.seed}", *recipe.convert, *fitted])
    return place


def trained(study: Study, name: str, recipe: Recipe, start: Path) -> Path:
    """The run directory of a recipe that trains."""
    assert recipe.train is not None
    run_dir = study.run_dir(name)
    if read_object(run_dir / SUMMARY) is None:
        own = ["train.optimizer=adamw_scaled", "train.learning_rate=3e-3", "train.schedule=linear", "train.keep=last"]
        own += [f"train.eval_every={study.steps}", "train.eval_examples=4", f"train.save_every={-(-study.steps // 2)}"]
        teacher = [f"train.teacher={study.source}"] if recipe.taught else []
        gating = [setting for setting in recipe.convert if setting != CALIBRATED[1]]
        more = [f"name={name}", *own, *gating, *teacher, *recipe.train]
        places = start, study.corpus, run_dir
        call("pregate.train", healing.settings(*places, study.steps, study.row_tokens, study.seed, None, more))
    return run_dir


def call(module: str, settings: list[str]) -> None:
    """Run a command of the project. Ctrl-C and SIGTERM stop it in such a way that it saves its state. Raises
    `UsageError` if it fails."""
    command = [sys.executable, "-m", module, *settings]
    say(shlex.join(["python", *command[1:]]))
    # in its own session the terminal's Ctrl-C does not reach it as well, which would count as a second, hard one
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait()
            finally:
                process.kill()
            raise
    if process.returncode:
        raise UsageError(f"python -m {module} has failed, see above: the same command of the study goes on from there.")


def measured(study: Study, name: str, recipe: Recipe) -> dict[str, Any]:
    """What is known of a recipe: the loss of each row of text, routes, seconds, and weights."""
    start = converted(study, recipe)
    row: dict[str, Any] = {"recipe": name, "convert": list(recipe.convert), "steps": 0}
    calibration = (read_object(start / MANIFEST) or {}).get("calibration")
    if calibration is not None:
        row |= {"calibration_seconds": calibration["seconds"], "calibration_tokens": calibration["num_tokens"]}
    checkpoint = start
    if recipe.train is not None:
        run_dir = trained(study, name, recipe, start)
        summary = (read_object(run_dir / SUMMARY) or {})["train"]
        checkpoint = run_dir / CHECKPOINT
        row |= {"train": list(recipe.train), "steps": summary["steps"], "train_seconds": round(summary["seconds"], 1)}
    losses_B, routes = losses_and_routes(checkpoint, study.rows)
    agreement = [slot_agreement(mine, own) for mine, own in zip(routes, study.source_routes, strict=True)]
    return row | {
        "losses": [round(loss, 5) for loss in losses_B.tolist()],
        "agreement": statistics.mean(agreement),
        "parameters": num_parameters(checkpoint),
        "tokens": study.rows.numel(),
        "seed": study.seed,
        "environment": environment(),
    }


@torch.no_grad()
def losses_and_routes(checkpoint: Path, rows_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Nats per predicted token of each row (B), and the chosen experts of each block, (B * T, K). Raises `UsageError`
    for losses that are not finite."""
    model: Any = load_resident(checkpoint, dtype=torch.float32).eval()
    objective = family_of_model(model).objective
    losses, routes = [], []
    for row_T in rows_BT:
        output = model(input_ids=row_T[None], use_cache=False, output_router_logits=True)
        losses.append(cross_entropy(output.logits[0, :-1], row_T[1:]))
        routes.append([ids.flatten(0, -2) for blocks in objective.expert_ids(output).values() for ids in blocks])
    found = torch.stack(losses)
    if not found.isfinite().all():
        raise UsageError(f"The losses of {checkpoint} are NaN or infinite, so that nothing can be compared.")
    return found, [torch.cat(block) for block in zip(*routes, strict=True)]


# --- results ----------------------------------------------------------------------------------------------------------


def load_rows(folder: Path) -> dict[str, dict[str, Any]]:
    rows = {row["recipe"]: row for row in read_lines(folder / ROWS)}
    return {name: rows[name] for name in RECIPES if name in rows}


def with_differences(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """The rows with what the tables and the plot show: mean losses, and differences from the source of the same text
    with their 95 % intervals over the rows of text."""
    own = rows[OWN]["losses"] if OWN in rows else None
    found = []
    for name, row in rows.items():
        more: dict[str, Any] = {"label": RECIPES[name].label, "loss": statistics.mean(row["losses"])}
        if own is not None and name != OWN:
            differences = [mine - its for mine, its in zip(row["losses"], own, strict=True)]
            more |= {
                "difference": statistics.mean(differences),
                "interval": bootstrap_interval(differences, SAMPLES, seed=0),
            }
        moved = RECIPES[name].moved
        if own is not None and moved is not None and moved in rows and moved not in (OWN, name):
            lost = statistics.mean(rows[moved]["losses"]) - statistics.mean(own)
            more["won_back"] = 1 - more["difference"] / lost if lost > 0 else None
        if OWN in rows and row["parameters"] != rows[OWN]["parameters"]:
            more["added"] = row["parameters"] - rows[OWN]["parameters"]
        found.append({**row, **more})
    return found


def _difference(row: Row) -> str | None:
    if "difference" not in row:
        return None
    low, high = row["interval"]
    return f"{signed(row['difference'], 3)} [{signed(low, 3)}, {signed(high, 3)}]"


def _won_back(row: Row) -> str | None:
    return None if row.get("won_back") is None else f"{100 * row['won_back']:.0f}"


COLUMNS = {
    "recipe": text("label"),
    "loss": lambda row: f"{row['loss']:.3f}",
    "difference from the source": _difference,
    "won back, %": _won_back,
    "routing agreement, %": lambda row: f"{100 * row['agreement']:.0f}",
    "calibration, s": number("calibration_seconds"),
    "training, s": number("train_seconds"),
    "steps": lambda row: str(row["steps"]) if row["steps"] else None,
    "weights added": lambda row: f"{row['added']:,}" if row.get("added") else None,
}


def readme(name: str, rows: Sequence[Row], command: str) -> str:
    first = rows[0]
    tokens = f"{first['tokens']:,} tokens of text in {len(first['losses'])} rows"
    return f"""# {name}

What recipes win back of what moved gates lose. The loss is in nats a token, on {tokens} that no recipe has learnt from.

```bash
{command}
```

{Table.of(COLUMNS, rows).markdown()}

![The loss of each recipe](losses.png)

- The letters are those of the [accuracy study](../../docs/accuracy.md#which-recipe). Gates sit one block ahead where
  nothing else is said. The source is a conventional model, whose gates sit in their own blocks.
- The difference has a 95 % interval, which resamples the rows of text. It does not show how much depends on the
  seed: each recipe ran once.
- *Won back*: the share of the difference between the source and (b), as many blocks ahead. More than 100 % is
  possible where weights are trained, because training improves the source too: compare with (a).
- *Routing agreement*: the share of choices that the source has made for the same token, as a mean over all blocks.
- Trained recipes share text, steps, batch, schedule and seed. The seconds of a calibrated start stand beside those of
  training.

Settings and the losses of each row are in `{ROWS}`. Environment: {facts_line(first["environment"])}.
"""


def plot(rows: Sequence[Row], path: Path) -> bool:
    """A bar for each recipe, grey for the source and for moved gates, and a line at the loss of the source."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            untouched = row["recipe"] == OWN or row["recipe"] == RECIPES[row["recipe"]].moved
            axes.barh(place, row["loss"], 0.68, color=QUIET if untouched else COMPUTE)
            axes.annotate(f"{row['loss']:.3f}", (row["loss"], place), (4, 0), textcoords="offset points", va="center")
            if row["recipe"] == OWN:
                axes.axvline(row["loss"], color=INK, lw=0.9, ls=":")
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.set_title("Loss on text, nats a token")
        axes.margins(x=0.08)
        axes.grid(axis="x")

    return write_figure(path, draw, 0.8 + 0.34 * len(rows))


def render(folder: Path, command: str) -> None:
    rows = with_differences(load_rows(folder))
    if rows:
        command += "" if len(rows) == len(RECIPES) else f" --recipes {' '.join(row['recipe'] for row in rows)}"
        write_text(folder / "README.md", readme(folder.name, rows, command))
        plot(rows, folder / "losses.png")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.recipe_losses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("moe", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=16, help="of training")
    parser.add_argument("--calibration-tokens", type=int, default=12288)
    parser.add_argument("--measure-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    budget = given.steps, given.calibration_tokens, given.measure_tokens, given.seed
    study = Study(given.moe, given.work, *budget)
    check(study)
    if any("train.trainable=lora" in (RECIPES[name].train or ()) for name in given.recipes):
        check_installed()
    claim(study, given.results)
    limits = "--steps {} --calibration-tokens {} --measure-tokens {} --seed {}".format(*budget)
    command = f"python -m studies.recipe_losses results/{given.results.name} MOE --work WORK {limits}"
    render(given.results, command)  # a study that was stopped may not show its last row yet
    for name in given.recipes:
        if name not in load_rows(given.results):
            row = measured(study, name, RECIPES[name])
            say(f"{RECIPES[name].label}: {statistics.mean(row['losses']):.3f} nats a token.")
            append_line(given.results / ROWS, row)
            render(given.results, command)
        shutil.rmtree(study.run_dir(name), ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    with stoppable(), going_on(lambda: "the same command goes on."):
        ending_in_one_sentence(lambda: run(given))


if __name__ == "__main__":
    main()
