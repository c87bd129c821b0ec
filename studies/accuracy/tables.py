"""The report of a study: README.md with verdicts, tables and plots, made from its records alone.

Knows records and what `statistics` says of them; knows nothing about how cells were run. A figure that no record has
does not appear, and what is missing is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pregate.measure.report.evaluation_tables import METRIC_LABELS, metric_label
from pregate.measure.table_format import ABSENT, signed
from pregate.system.console import first_of
from pregate.system.durable import read_object
from studies.accuracy.arms_and_seeds import (
    AS_IT_IS,
    CHANGES,
    CONVENTIONAL,
    DENSE,
    OTHER_SEED,
    PRETRAINING,
    SIZES,
    SOURCE,
    TASK_LABELS,
    TAUGHT,
    THREADS,
    Cell,
)
from studies.accuracy.plots import plot_study
from studies.accuracy.records import STUDY, load_baselines, load_records
from studies.accuracy.statistics import (
    ArmSummary,
    by_block,
    difference,
    overall,
    recovery,
    summaries,
    tasks_of,
    verdict,
)

LETTERS = {
    "conventional": "(a) conventional",
    "shifted": "(b) shifted, untrained",
    "calibrated": "(c) shifted and calibrated",
    "pre_gated": "(d) pre-gated",
    "distilled": "(e) pre-gated, distilled",
    "gates_only": "(f) gates only, distilled",
}
LABELS = {
    TAUGHT: "(a) conventional, distilled",
    (CONVENTIONAL, OTHER_SEED): "(a) of another seed",
    (CONVENTIONAL, SOURCE): "the source, not fine-tuned",
    (CONVENTIONAL, DENSE): "the dense model that it was made from, not fine-tuned",
}
"""Of variants that are no change to their arm as the others are."""
SHORT = {(arm, ""): name.split()[0] for arm, name in LETTERS.items()} | {TAUGHT: "(a) distilled"}
"""What differences are taken from, in the heads of tables."""
MOST_COLUMNS = 16
"""The most MoE blocks that a table shows one by one."""
AHEAD = {"n2": "lookahead 2", "n3": "lookahead 3"}
PLOTS = {
    "lookahead": "Score of the arms against how far ahead the gates decide",
    "agreement": "Routing agreement with the conventional model, block by block",
    "curves": "Validation during fine-tuning",
}


def render(folder: Path, size: str, cells: Sequence[Cell]) -> None:
    """Write README.md and plots/ into `folder` from its cells.jsonl and baselines.json."""
    records, baselines = load_records(folder), load_baselines(folder)
    arms = {task: summaries(records, task) for task in tasks_of(records)}
    drawn = plot_study(arms, folder / "plots")
    source = (read_object(folder / STUDY) or {}).get("source")
    text = study_markdown(records, arms, baselines, size, cells, drawn, told_place(folder), source)
    (folder / "README.md").write_text(text, encoding="utf-8")


def told_place(folder: Path) -> str:
    """As a person in the current directory writes it."""
    here = Path.cwd()
    whole = folder.resolve()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else folder)


def study_markdown(
    records: Sequence[Mapping[str, Any]],
    arms: Mapping[str, Sequence[ArmSummary]],
    baselines: Mapping[str, Any],
    size: str,
    cells: Sequence[Cell],
    plots: Sequence[str] = (),
    place: str = "DIR",
    source: str | None = None,
) -> str:
    """`source`: the model that cells start from, where it is not the size's own."""
    names = {record["cell"] for record in records}
    missing = [cell.name for cell in cells if cell.name not in names]
    done = f"{len(cells) - len(missing)} of {len(cells)} cells."
    if missing:
        done += f" Missing: {first_of(missing, 8)}."
    parts = [f"# Accuracy study, {size}", "Does it cost accuracy to decide a block ahead? " + done]
    parts += ["## Verdict", *(part for task in arms for part in verdicts(task, arms[task]))]
    parts.append(how_to_repeat(records, size, place if missing else None, source))
    for task, found in arms.items():
        parts += task_section(task, found, baselines.get(task, {}), SIZES[size].candidates)
    for name in plots:
        parts.append(f"![{PLOTS[name]}](plots/{name}.png)")
    parts += [pretraining_line(records), NOTES, machine(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdicts(task: str, arms: Sequence[ArmSummary]) -> list[str]:
    """One line an arm, and what calibration wins back."""
    lines = [f"- {label(arm)}: {verdict(arm)}" for arm in arms if arm.arm != CONVENTIONAL]
    found = recovery(arms)
    if found is not None:
        line = f"- Calibration: routing agreement {100 * found.shifted:.1f} % shifted"
        line += f", {100 * found.calibrated:.1f} % calibrated"
        line += f", {100 * found.share:.0f} % of what the shift lost" if found.share is not None else ""
        line += f", in {100 * found.time_share:.1f} % of fine-tuning's time" if found.time_share is not None else ""
        lines.append(line)
    return [f"**{TASK_LABELS.get(task, task)}**", "\n".join(lines)] if lines else []


def task_section(
    task: str,
    arms: Sequence[ArmSummary],
    trivial: Mapping[str, Mapping[str, float]],
    candidates: Sequence[tuple[str, str]],
) -> list[str]:
    """`candidates`: changes that stand beside the arms, see `Size`."""
    named = {(arm.arm, arm.variant): arm for arm in arms}
    first = arms[0].records[0]
    parts = [
        f"## {TASK_LABELS.get(task, task)}",
        f"{first['num_examples']} examples of the {first['split']} split, in percent.",
    ]
    main = [arm for arm in arms if not arm.variant]
    ahead = [arm for arm in main if arm.arm == CONVENTIONAL]
    ahead += [arm for arm in arms if arm.arm == "pre_gated" and (arm.variant in AHEAD or not arm.variant)]
    conventional, pre_gated, distilled = (CONVENTIONAL, ""), ("pre_gated", ""), ("distilled", "")

    def present(*keys: tuple[str, str]) -> list[ArmSummary]:
        return [named[key] for key in keys if key in named]

    main = [*main, *present(*candidates, *((CONVENTIONAL, variant) for variant in AS_IT_IS))]
    parts.append(score_table(main, present(conventional), trivial))
    if any(arm.variant for arm in ahead):
        parts += ["How far ahead:", score_table(ahead, present(conventional), first="lookahead")]
    for base in ((arm, "") for arm in LETTERS):
        changed = present(*(key for key in CHANGES if key[0] == base[0]))
        if base not in named:
            told = f"One change to {SHORT[base]} at a time, without {SHORT[base]} itself, which has not been run:"
            parts += [told, score_table(changed, present(conventional))] if changed else []
            continue
        beside = present(base, distilled) if base == pre_gated else present(base)
        if len(beside) + len(changed) > 1:
            parts += [f"One change to {SHORT[base]} at a time:", score_table([*beside, *changed], beside[:1])]
    if TAUGHT in named:
        parts += [
            "What the teacher of (e) gives a model that is not pre-gated, and what is left of the difference:",
            score_table(present(conventional, TAUGHT, distilled), present(conventional, TAUGHT)),
        ]
    return [*parts, *routing_tables(arms)]


def score_table(
    arms: Sequence[ArmSummary],
    bases: Sequence[ArmSummary],
    trivial: Mapping[str, Mapping[str, float]] | None = None,
    first: str = "arm",
) -> str:
    """A row an arm with mean, spread and its difference from each of `bases`, trivial predictions below."""
    metric = arms[0].metric
    others = [name for name in next(iter(arms[0].by_seed.values())) if name != metric]
    headers = [first, "seeds", metric_label(metric), "lowest to highest"]
    for base in bases:
        headers += [f"difference from {SHORT[base.arm, base.variant]}", "of each seed"]
    headers += [*(metric_label(name) for name in others), "training, s"]
    added = _weights_added(arms, bases[0]) if bases else {}
    added = added if any(added.values()) else {}
    headers += [f"weights added to {SHORT[bases[0].arm, bases[0].variant]}"] if added else []
    rows = []
    for arm in arms:
        name = label(arm)
        row = [
            f"{arm.lookahead}, {name}" if first == "lookahead" else name,
            str(len(arm.by_seed)),
            f"{arm.mean(metric):.1f}",
        ]
        row.append(f"{min(arm.primary):.1f} to {max(arm.primary):.1f}")
        for base in bases:
            row += _difference(arm, base)
        row += [*(f"{arm.mean(other):.1f}" for other in others), _seconds(arm)]
        row += [_count(added.get(name))] if added else []
        rows.append(row)
    for name, scores in (trivial or {}).items():
        dashes = [ABSENT] * (1 + 2 * len(bases))
        extra = [f"{scores[other]:.1f}" if other in scores else ABSENT for other in others]
        row = [f"*{name}*", ABSENT, f"{scores[metric]:.1f}", *dashes, *extra]
        rows.append([*row, *[ABSENT] * (len(headers) - len(row))])
    return table(headers, rows)


def _difference(arm: ArmSummary, base: ArmSummary) -> list[str]:
    """The difference with its interval, and that of each seed."""
    if arm is base:
        return [ABSENT, ABSENT]
    from_conventional = (base.arm, base.variant) == (CONVENTIONAL, "")
    change = arm.difference if from_conventional else difference(arm.records, base.records)
    if change is None:
        return [ABSENT, ABSENT]
    interval = f"{signed(change.mean)} [{signed(change.low)}, {signed(change.high)}]"
    return [interval, " ".join(signed(value) for value in change.by_seed.values())]


def _weights_added(arms: Sequence[ArmSummary], base: ArmSummary) -> dict[str, int]:
    """How many more weights the checkpoint of each arm has than that of `base`, as far as the records say."""
    counts = {label(arm): arm.records[0].get("parameters") for arm in (*arms, base)}
    least = counts[label(base)]
    return {name: count - least for name, count in counts.items() if count is not None and least is not None}


def _count(weights: int | None) -> str:
    return ABSENT if weights is None else f"{weights:,}"


def _seconds(arm: ArmSummary) -> str:
    trained = f"{arm.train_seconds:.0f}" if arm.train_seconds else "0"
    return trained if arm.calibration_seconds is None else f"{trained} + {arm.calibration_seconds:.1f} calibration"


def routing_tables(arms: Sequence[ArmSummary]) -> list[str]:
    """Agreement and mass of every block, then load and switches as means over the blocks."""
    parts = []
    for figure, title in (
        ("agreement", "Routing agreement with (a) of the same seed, % of choices:"),
        ("gate_mass", "Gate mass, % of what (a)'s routers give to their own choice:"),
    ):
        found = {label(arm): by_block(arm.records, figure) for arm in arms}
        found = {name: blocks for name, blocks in found.items() if blocks}
        if found:
            stacks = next(iter(found.values()))
            of_blocks = _each if sum(map(len, stacks.values())) <= MOST_COLUMNS else _extremes
            heads = [f"{stack} {head}" for stack, blocks in stacks.items() for head in of_blocks(blocks)]
            rows = [
                [name, *(v for stack in stacks for v in of_blocks(blocks[stack]).values()), _percent(overall(blocks))]
                for name, blocks in found.items()
            ]
            parts += [title, table(["arm", *heads, "mean"], rows)]
    rows = []
    for arm in arms:
        cells = [
            _percent(overall(by_block(arm.records, figure, model)))
            for figure in ("load_balance", "switch_rate")
            for model in ("pre_gated", "reference")
        ]
        if any(cell != ABSENT for cell in cells):
            rows.append([label(arm), *cells])
    if rows:
        heads = ["arm", "load balance", "of its (a)", "switch rate, %", "of its (a)"]
        parts += ["Load of the experts (100 is even) and switches between neighbouring tokens, mean of all blocks:"]
        parts.append(table(heads, rows))
    return parts


def _each(blocks: Sequence[float | None]) -> dict[str, str]:
    return {str(number): _percent(value) for number, value in enumerate(blocks)}


def _extremes(blocks: Sequence[float | None]) -> dict[str, str]:
    """Of a stack with many blocks. The plot shows every one."""
    known = {number: value for number, value in enumerate(blocks) if value is not None}
    least, most = (f(known, key=known.__getitem__, default=None) for f in (min, max))
    ends = {"least (block)": least, "most (block)": most}
    return {head: ABSENT if at is None else f"{_percent(known[at])} ({at})" for head, at in ends.items()}


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.0f}"


def how_to_repeat(records: Sequence[Mapping[str, Any]], size: str, place: str | None, source: str | None = None) -> str:
    """The commands that give these results again. `place`: this folder, if cells are missing in it. `source`: what
    SOURCE was set to."""
    own = "" if source is None else f"SOURCE={'DIR' if Path(source).is_absolute() else source} "
    whole = f"{own}./scripts/reproduce_accuracy.sh {size}"
    told, lines = ["all of it"], [whole]
    if place is not None:
        told.append("what is missing here")
        lines.append(f"OUT={place} {whole}")
    cells = [record for record in records if record["cell"] != PRETRAINING]
    if cells:
        told.append("one cell and what it needs, apart from these results")
        lines.append(f"OUT=runs/repeat/results WORK=runs/repeat ONLY={cells[0]['cell']} {whole}")
        told.append("that cell alone, where the checkpoints that it names are there")
        lines.append(command_of(cells[0], size, source))
    commands = "\n".join(f"PREGATE_DATA=DIR {line}" for line in lines)
    named = "; ".join(told)
    return (
        f"## Repeat it\n\n{named[0].upper()}{named[1:]}. The command of every cell is in cells.jsonl.\n\n"
        f"```bash\n{commands}\n```"
    )


def command_of(record: Mapping[str, Any], size: str, source: str | None = None) -> str:
    """A cell's command with the threads that it computed with where its digits depend on them, and with `source` in
    place of the size's own, which may be another model by now."""
    threads = record.get("environment", {}).get("torch_threads")
    given = record["command"]
    if source is not None:
        given = given.replace(f" model.source={SIZES[size].source} ", f" model.source={source} ")
    if SIZES[size].threads is None or threads is None or given.startswith(THREADS):
        return given
    return f"{THREADS}={threads} {given}"


def pretraining_line(records: Sequence[Mapping[str, Any]]) -> str:
    found = next((record for record in records if record["cell"] == PRETRAINING), None)
    if found is None:
        return ""
    end = found["curve"][-1] if found.get("curve") else {}
    figures = ", ".join(f"{METRIC_LABELS.get(k, k)} {v:.2f}" for k, v in end.items() if k != "step")
    told = f" Validation at the end: {figures}." if figures else ""
    return f"Pre-training: {found['steps']} steps in {found['train_seconds']:.0f} s.{told}"


NOTES = (
    "**Difference**: the score minus that of the other arm, in points, for models of the same seed and on the same "
    "examples. Its 95 % interval comes from a bootstrap that resamples seeds and examples together, 10,000 times "
    "(`studies.accuracy.statistics.paired_bootstrap`). With three seeds, this bootstrap multiplies the variance "
    "between seeds by 2/3, the variance between examples by 1, and the remaining variance (of single predictions) by "
    "7/3. So the interval is too narrow if seeds differ much. It is too wide if they hardly differ. With one seed, it "
    "does not show how much the score depends on the seed. “Not worse beyond its interval” means that the interval "
    "contains zero or lies above zero. It does not mean that the two are equal: the lower end is the largest loss that "
    "is not excluded. The intervals are not corrected for the number of comparisons.\n\n"
    "Rows in italics need no model. All trained arms of a task have the same data, steps, batch, schedule and seeds. "
    "The score of an arm is that of its last state, so no score has chosen a checkpoint. Agreement, gate mass, load "
    "and switches are measured on the first `eval.agreement_examples` examples. Training seconds do not include "
    "loading or the training of a teacher. Cells that ran at the same time slowed one another."
)


def machine(records: Sequence[Mapping[str, Any]]) -> str:
    """Every distinct environment and commit among the records."""
    environments = list(
        dict.fromkeys(
            ", ".join(f"{k} {v}" for k, v in r["environment"].items()) for r in records if r.get("environment")
        )
    )
    commits = dict.fromkeys(
        f"{r['commit']['commit'][:12]}{' with changes' if r['commit'].get('dirty') else ''}"
        for r in records
        if r.get("commit")
    )
    lines = [f"Environment: {environment}." for environment in environments]
    return "\n\n".join([*lines, *([f"Commit: {', '.join(commits)}."] if commits else [])])


def label(arm: ArmSummary) -> str:
    if (arm.arm, arm.variant) in LABELS:
        return LABELS[arm.arm, arm.variant]
    name = LETTERS.get(arm.arm, arm.arm)
    if not arm.variant:
        return name
    change = CHANGES.get((arm.arm, arm.variant))
    return f"{name}, {change.label if change else AHEAD.get(arm.variant, arm.variant)}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, rule, *rows])
