"""Which cells the accuracy study has, in the order of their worth, and the command of each.

Knows names of tasks, arms and settings; knows nothing about how a cell is run or what it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PRETRAINING = "pretrain"
CONVENTIONAL = "conventional"
TASK_LABELS = {
    "sst2": "SST-2",
    "dialogsum": "DialogSum",
    "squad": "SQuAD",
    "xsum": "XSum",
    "web_questions": "WebQuestions",
}
ARMS = (CONVENTIONAL, "shifted", "calibrated", "pre_gated", "distilled", "gates_only")
"""Members of the config group `arm`, in the order (a) to (f)."""
CALIBRATED = ("calibrated", "gates_only")
UNTRAINED = ("shifted", "calibrated")
SEEDS = ((1,), (2, 3))
"""The first is run for all tasks before the others are."""
BOTH = ("encoder", "decoder")
THREADS = "OMP_NUM_THREADS"
"""The environment's variable for how many threads a cell computes with."""


@dataclass(frozen=True)
class Size:
    """What differs between the sizes of the study: tasks, where the pre-trained model comes from, and on a CPU how many
    threads pre-training and the other cells compute with, since the sums, and so the scores, depend on it."""

    tasks: tuple[str, ...]
    pretraining: str | None = None
    source: str | None = None
    threads: tuple[int, int] | None = None
    arms: tuple[str, ...] = ARMS
    stacks: tuple[str, ...] = BOTH
    main_only: bool = False
    """Whether the study ends with the arms at lookahead 1."""


SIZES = {
    "nano": Size(("sst2", "web_questions"), pretraining="pretrain_nano", threads=(2, 1)),
    "nano_olmoe": Size(
        ("sst2", "web_questions"),
        pretraining="pretrain_nano_olmoe",
        threads=(2, 1),
        arms=tuple(arm for arm in ARMS if arm != "distilled"),
        stacks=("decoder",),
        main_only=True,
    ),
    "mini": Size(("squad", "dialogsum", "sst2"), pretraining="pretrain_mini"),
    "switch_base_8": Size(("squad", "xsum", "web_questions"), source="google/switch-base-8"),
}


@dataclass(frozen=True)
class Cell:
    """One command of the study. `variant`: what it changes in its arm, "" for nothing; `needs`: the cells whose
    checkpoints it reads; `overrides`: the settings of the variant."""

    name: str
    arm: str
    task: str
    seed: int
    variant: str = ""
    lookahead: int = 1
    init: str = "source"
    entry: str = "own"
    weights: str = "early"
    start: int = 0
    gate: str = "linear"
    stacks: tuple[str, ...] = BOTH
    needs: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def trained(self) -> bool:
        return self.arm not in UNTRAINED and self.variant != OTHER_SEED

    @property
    def from_source(self) -> bool:
        """Whether its command names the model that it starts from, and its arm does not."""
        return self.arm in (CONVENTIONAL, "pre_gated", "distilled")


def all_cells(size: Size) -> list[Cell]:
    """All cells, most valuable first: pre-training, the arms of one seed, of the others, lookahead, what the teacher of
    arm (e) gives without pre-gating, how far apart the routes of two seeds are, ablations."""
    cells = (
        [Cell(PRETRAINING, PRETRAINING, PRETRAINING, 0, lookahead=0, stacks=size.stacks)] if size.pretraining else []
    )
    for seeds in SEEDS:
        cells += [_arm(size, arm, task, seed) for task in size.tasks for seed in seeds for arm in size.arms]
    if size.main_only:
        return cells
    seeds = [seed for group in SEEDS for seed in group]
    for task in size.tasks:
        cells += [_variant(size, "pre_gated", task, seed, f"n{n}", lookahead=n) for n in (2, 3) for seed in seeds]
    cells += [_variant(size, TAUGHT[0], task, seed, TAUGHT[1], lookahead=0) for task in size.tasks for seed in seeds]
    cells += [_other_seed(size, task, seed, seeds) for task in size.tasks for seed in seeds]
    first = size.tasks[0]
    for variant, change in ABLATIONS.items():
        cells += [_variant(size, "pre_gated", first, seed, variant, **change) for seed in seeds]
    return cells


ABLATIONS: dict[str, dict[str, object]] = {
    "init_random": {"init": "random"},
    "init_calibrated": {"init": "calibrated"},
    "entry_embedding": {"entry": "embedding"},
    "encoder": {"stacks": ("encoder",)},
    "decoder": {"stacks": ("decoder",)},
    "late": {"weights": "late"},
    "start": {"start": 1},
    "mlp": {"gate": "mlp"},
}
"""What is changed in arm (d), one at a time."""
TAUGHT = ("distilled", "n0")
"""The conventional model taught as arm (e) is, as (arm, variant): what (e) owes to its teacher alone."""
OTHER_SEED = "other_seed"
"""The variant that compares the routes of a conventional model with those of the one of the next seed, untouched."""


def _arm(size: Size, arm: str, task: str, seed: int) -> Cell:
    cell = Cell(
        cell_name(task, arm, seed),
        arm,
        task,
        seed,
        lookahead=0 if arm == CONVENTIONAL else 1,
        init="calibrated" if arm in CALIBRATED else "source",
        stacks=size.stacks,
    )
    needs = [PRETRAINING] if cell.from_source and size.pretraining else []
    needs += [] if arm == CONVENTIONAL else [cell_name(task, CONVENTIONAL, seed)]
    return replace(cell, needs=tuple(needs))


def _variant(size: Size, arm: str, task: str, seed: int, variant: str, **change: object) -> Cell:
    base = _arm(size, arm, task, seed)
    return Cell(
        cell_name(task, arm, seed, variant),
        arm,
        task,
        seed,
        variant,
        needs=base.needs,
        overrides=tuple(f"pregate.{key}={_written(value)}" for key, value in change.items()),
        **{"stacks": size.stacks, **change},  # type: ignore[arg-type]
    )


def _other_seed(size: Size, task: str, seed: int, seeds: list[int]) -> Cell:
    after = seeds[(seeds.index(seed) + 1) % len(seeds)]
    return Cell(
        cell_name(task, CONVENTIONAL, seed, OTHER_SEED),
        CONVENTIONAL,
        task,
        seed,
        OTHER_SEED,
        lookahead=0,
        needs=(cell_name(task, CONVENTIONAL, seed), cell_name(task, CONVENTIONAL, after)),
        overrides=("train.steps=0", "train.warmup_steps=0"),
    )


def _written(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def cell_name(task: str, arm: str, seed: int, variant: str = "") -> str:
    return "_".join(part for part in (task, arm, variant, f"s{seed}") if part)


def overrides_of(cell: Cell, size_name: str, run_dir: str, source: str | None, reference: str | None) -> list[str]:
    """The settings of a cell's command. `source`: the checkpoint that it starts from, for the arms that do not start
    from `reference` by themselves; `reference`: arm (a)'s of the same task and seed, None for (a) itself."""
    if cell.arm == PRETRAINING:
        return [f"+experiment={SIZES[size_name].pretraining}", f"run_dir={run_dir}"]
    given = [f"+experiment=accuracy_{size_name}_{cell.task}", f"+arm={cell.arm}", f"seed={cell.seed}", *cell.overrides]
    if source is not None and cell.from_source:
        given.append(f"model.source={source}")
    if reference is not None:
        given.append(f"reference={reference}")
    return [*given, f"name=accuracy_{size_name}_{cell.name}", f"run_dir={run_dir}"]


def threads_of(cell: Cell, size_name: str) -> int | None:
    """How many threads a cell computes with; None for what torch chooses."""
    threads = SIZES[size_name].threads
    return None if threads is None else threads[0] if cell.arm == PRETRAINING else threads[1]


TINY = (
    *("train.eval_every=2", "train.eval_examples=4", "train.save_every=2", "train.batch_sequences=4"),
    *("eval.examples=6", "eval.agreement_examples=3", "eval.batch_size=6", "eval.bootstrap_samples=50"),
)


def tiny_overrides(cell: Cell) -> list[str]:
    """Settings that make any cell a matter of seconds and its figures meaningless."""
    steps = ["train.steps=2", "train.warmup_steps=0"] if cell.trained else []
    steps += ["calibration.examples=8", "calibration.steps=2"] if cell.init == "calibrated" else []
    if cell.arm == PRETRAINING:
        return [*steps, *TINY[:4], "train.micro_batch_tokens=2048"]
    return [*steps, *TINY]
