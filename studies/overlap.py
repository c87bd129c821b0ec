"""The timeline of the README: the same decoding steps, experts fetched on demand and pre-gated.

    python -m studies.overlap measure --model switch_base_64 --out results/NAME
    python -m studies.overlap draw results/NAME docs/images/overlap.svg

`measure` serves random weights on the CPU, the experts on disk, and keeps the spans of a few steps of each policy.
`draw` needs these spans alone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pregate.cli import compose_run
from pregate.config import Entry, Policy, Tier
from pregate.engine.engine import OffloadEngine
from pregate.engine.opening import open_store
from pregate.engine.trace import Span
from pregate.measure.figure_style import COMPUTE, INK, TRANSFER, WAIT, write_figure
from pregate.models.family import family_named
from pregate.models.pregating import PreGating
from pregate.models.synthetic import synthetic_checkpoint
from pregate.system.machine import environment

POLICIES = {"on_demand": "Fetched on demand", "pre_gated": "Pre-gated: the block before decides"}
LIGHT = "#c3d5e4"
"""Computation outside of MoE blocks."""
STEPS = 2
REQUESTS, PROMPT_LEN, NEW_TOKENS = 5, 64, 16
FILE = "spans.json"

Spans = Sequence[Mapping[str, Any]]
Served = tuple[list[float], list[Span]]
"""When each token of a request was known, in milliseconds, and the spans of the request."""


# --- measure --------------------------------------------------------------------------------------------------------


class TokenTimes:
    """A streamer of `generate`: when each token was known, in milliseconds since it was made."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.ms: list[float] = []

    def put(self, _: Any) -> None:
        self.ms.append((time.perf_counter() - self._begun) * 1e3)

    def end(self) -> None:
        pass


def measure(model: str, out: Path) -> None:
    """Serve the same requests under each policy, and keep the steps whose length is nearest to the median of both."""
    described = compose_run([f"model={model}"]).model
    family = family_named(described.family)
    gating = PreGating(lookahead=1, entry=Entry.embedding)
    checkpoint = synthetic_checkpoint(family, described.geometry, gating, torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent) as folder,
        closing(open_store(checkpoint, tier=Tier.disk, pack_dir=folder)) as store,
    ):
        served = {}
        for policy in POLICIES:
            with OffloadEngine.open(checkpoint, policy=Policy(policy), device_budget="25%", store=store) as engine:
                served[policy] = [serve(engine, number) for number in range(REQUESTS + 1)][1:]
    lengths = {policy: [step_lengths(request) for request in requests] for policy, requests in served.items()}
    medians = {policy: statistics.median(chain.from_iterable(found)) for policy, found in lengths.items()}
    request, step = min(
        ((request, step) for request in range(REQUESTS) for step in range(len(lengths["pre_gated"][request]) - STEPS)),
        key=lambda at: max(
            abs(length / medians[policy] - 1)
            for policy, found in lengths.items()
            for length in found[at[0]][at[1] : at[1] + STEPS]
        ),
    )
    kept = {
        policy: {"median_ms": medians[policy], **window(requests[request], step)} for policy, requests in served.items()
    }
    found = {"model": described.name, "dtype": "bfloat16", "request": request, "step": step, "policies": kept}
    (out / FILE).write_text(json.dumps(found | {"environment": environment()}) + "\n", encoding="utf-8")
    print(", ".join(f"{policy} {ms:.1f} ms a token" for policy, ms in medians.items()))


def serve(engine: OffloadEngine, number: int) -> Served:
    """One request, with the same prompt for the same number."""
    ids = torch.randint(2, 32000, (1, PROMPT_LEN), generator=torch.Generator().manual_seed(number))
    engine.trace.start()
    times = TokenTimes()
    engine.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        no_repeat_ngram_size=1,  # random weights would repeat one token for ever
        streamer=times,
    )
    return times.ms[1:], engine.trace.stop()  # the first is the prompt


def step_lengths(request: Served) -> list[float]:
    times, _ = request
    return [end - begin for begin, end in pairwise(times)]


def window(request: Served, step: int) -> dict[str, Any]:
    """The spans of some steps from `step` on, and the ends of these steps, with the begin of the first as 0."""
    times, spans = request
    begin, end = times[step], times[step + STEPS]
    inside = [span.to_dict() for span in spans if span.end_ms > begin and span.start_ms < end]
    for span in inside:
        span["start_ms"] = round(max(span["start_ms"], begin) - begin, 3)
        span["end_ms"] = round(min(span["end_ms"], end) - begin, 3)
    return {"tokens_ms": [round(time - begin, 3) for time in times[step + 1 : step + STEPS + 1]], "spans": inside}


# --- draw -----------------------------------------------------------------------------------------------------------


def draw(folder: Path, path: Path) -> None:
    """One panel a policy, over the same milliseconds: computation with its waits, and transfers."""
    policies = json.loads((folder / FILE).read_text())["policies"]
    end_ms = max(steps["tokens_ms"][-1] for steps in policies.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, lambda figure: _panels(figure, policies, end_ms), height_inches=3.9)


def _panels(figure: Figure, policies: Mapping[str, Any], end_ms: float) -> None:
    panels = figure.subplots(len(POLICIES), 1, sharex=True)
    for axes, (policy, title) in zip(panels, POLICIES.items(), strict=True):
        _panel(axes, title, policies[policy], end_ms)
    panels[-1].set_xlabel("milliseconds; numbers are MoE blocks of the decoder")
    panels[0].legend(
        handles=[
            Patch(color=color, label=label)
            for color, label in (
                (COMPUTE, "layer with an MoE block"),
                (LIGHT, "other layers, head"),
                (WAIT, "waiting for an expert"),
                (TRANSFER, "expert on its way from disk"),
            )
        ],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=4,
        frameon=False,
        fontsize=8,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _panel(axes: Axes, title: str, steps: Mapping[str, Any], end_ms: float) -> None:
    last = steps["tokens_ms"][-1]
    axes.set_title(title)
    axes.broken_barh([(0, last)], (-0.4, 0.8), facecolors=LIGHT)
    for lane, color, y in (("layer", COMPUTE, 0), ("wait", WAIT, 0), ("transfer", TRANSFER, 1)):
        spans = [span for span in steps["spans"] if span["lane"] == lane]
        _bars(axes, spans, y, color, end_ms, numbered=lane != "wait")
    for token, at in enumerate(steps["tokens_ms"], start=1):
        axes.axvline(at, color=INK, linewidth=0.8)
        axes.annotate(
            f"token {token}",
            (at, -0.45),
            xytext=(-2, 1),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=7,
        )
    if last < 0.9 * end_ms:
        axes.text(last + 0.01 * end_ms, 0.5, f"{len(steps['tokens_ms'])} tokens in {last:.0f} ms", va="center")
    axes.set_yticks([0, 1], ["compute", "transfer"])
    axes.set_xlim(0, end_ms * 1.002)
    axes.set_ylim(1.5, -0.85)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bars(axes: Axes, spans: Spans, y: int, color: str, end_ms: float, numbered: bool) -> None:
    bars = [(span["start_ms"], span["end_ms"] - span["start_ms"]) for span in spans]
    axes.broken_barh(bars, (y - 0.4, 0.8), facecolors=color, edgecolors="white", linewidth=0.4)
    for span, (start, length) in zip(spans, bars, strict=True):
        block = re.search(r"block (\d+)", span["name"])
        if numbered and block and length > 0.012 * end_ms:
            axes.text(start + 0.003 * end_ms, y, block.group(1), va="center", fontsize=7, color="white")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m studies.overlap", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    measured = commands.add_parser("measure")
    measured.add_argument("--model", default="switch_base_64", help="a member of the config group model")
    measured.add_argument("--out", type=Path, required=True, help=f"folder for {FILE}")
    drawn = commands.add_parser("draw")
    drawn.add_argument("folder", type=Path, help=f"where {FILE} is")
    drawn.add_argument("picture", type=Path, help="file to write, .svg or .png")
    given = parser.parse_args(arguments)
    if given.command == "measure":
        measure(given.model, given.out)
    else:
        draw(given.folder, given.picture)


if __name__ == "__main__":
    main()
