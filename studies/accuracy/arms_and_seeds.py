"""Which cells the accuracy study has, in the order of their worth, and the command of each.

Knows names of tasks, arms and settings; knows nothing about how a cell is run or what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
TAUGHT = ("distilled", "n0")
"""The conventional model taught as arm (e) is, as (arm, variant): what (e) owes to its teacher alone."""
OTHER_SEED = "other_seed"
"""The variant that compares the routes of a conventional model with those of the one of the next seed, untouched."""
SOURCE, DENSE = "source", "dense"
AS_IT_IS = (SOURCE, DENSE)
"""Variants of the conventional arm that train nothing: the source, and the dense model that it was made from."""
NOT_TRAINED = (OTHER_SEED, *AS_IT_IS)
UNTOUCHED = ("train.steps=0", "train.warmup_steps=0")
THREADS = "OMP_NUM_THREADS"
"""The environment's variable for how many threads a cell computes with."""


@dataclass(frozen=True)
class Change:
    """What differs in a variant of an arm: settings `pregate.…`, which are fields of `Cell` too, and any others."""

    label: str
    pregate: dict[str, object] = field(default_factory=dict)
    others: tuple[str, ...] = ()


LATE = Change("weights of the block's own router", {"weights": "late"})
START = Change("first block conventional", {"start": 1})
MLP = Change("gates with a small network", {"gate": "mlp"})
RANK = Change("a routing loss that ranks", others=("train.distill_routing_loss=rank",))
OWN_ANSWERS = Change("on the teacher's answers", others=("train.distill_data=generations",))
CHANGES: dict[tuple[str, str], Change] = {
    ("pre_gated", "init_random"): Change("random gates", {"init": "random"}),
    ("pre_gated", "init_calibrated"): Change("calibrated gates", {"init": "calibrated"}),
    ("pre_gated", "entry_embedding"): Change("entry gate on the embeddings", {"entry": "embedding"}),
    ("pre_gated", "encoder"): Change("encoder only", {"stacks": ("encoder",)}),
    ("pre_gated", "decoder"): Change("decoder only", {"stacks": ("decoder",)}),
    ("pre_gated", "late"): LATE,
    ("pre_gated", "start"): START,
    ("pre_gated", "mlp"): MLP,
    ("shifted", "late"): LATE,
    ("calibrated", "late"): LATE,
    ("calibrated", "start"): START,
    ("calibrated", "own_answers"): Change(
        "calibrated on the model's own answers", others=("calibration.data=generations",)
    ),
    ("distilled", "late"): LATE,
    ("distilled", "rank"): RANK,
    ("distilled", "own_answers"): OWN_ANSWERS,
    ("gates_only", "late"): LATE,
    ("gates_only", "mlp"): MLP,
    ("gates_only", "rank"): RANK,
    ("gates_only", "own_answers"): OWN_ANSWERS,
    ("gates_only", "lora"): Change(
        "low-rank adapters trained too", others=("train.trainable=lora", "train.lora.targets=[attention,experts]")
    ),
}
"""(arm, variant) of every change to an arm, one at a time, in the order of worth."""
SWITCH_CHANGES = tuple(key for key in CHANGES if key[0] == "pre_gated" or key[1] == "own_answers")
NOT_DECODER_ONLY = {("pre_gated", name) for name in ("init_random", "entry_embedding", "encoder", "decoder")}
DECODER_ONLY_CHANGES = tuple(key for key in CHANGES if key not in NOT_DECODER_ONLY | {("calibrated", "start")})


@dataclass(frozen=True)
class Size:
    """What differs between the sizes of the study.

    `pretraining`: the experiment that makes the model that cells start from, or `source`: its checkpoint, and
    `make_source`: the command that makes that. `dense`: the directory beside `source` with the dense model that it was
    made from, in the source's form. `threads`: on a CPU, those of pre-training and of the other cells, since the sums,
    and so the scores, depend on it. `repeated`: the arms of the second and third seed. `others`: the seeds of lookahead
    2 and 3, controls and `changes`, none for a study of the arms alone. `changes` are of the first task. `candidates`:
    those that may be the best recipe, which are run like an arm: on every task, with every seed. `one_seed`: the
    tasks with one seed, and with neither other lookaheads nor controls. `tried`: changes by task, tried with one seed
    against a loss that the arms of the task leave.
    """

    tasks: tuple[str, ...]
    pretraining: str | None = None
    source: str | None = None
    make_source: str | None = None
    dense: str | None = None
    threads: tuple[int, int] | None = None
    arms: tuple[str, ...] = ARMS
    stacks: tuple[str, ...] = BOTH
    repeated: tuple[str, ...] = ARMS
    others: tuple[int, ...] = (1, 2, 3)
    changes: tuple[tuple[str, str], ...] = SWITCH_CHANGES
    candidates: tuple[tuple[str, str], ...] = ()
    one_seed: tuple[str, ...] = ()
    tried: tuple[tuple[str, tuple[str, str]], ...] = ()


SIZES = {
    "nano": Size(("sst2", "web_questions"), pretraining="pretrain_nano", threads=(2, 1)),
    "nano_olmoe": Size(
        ("sst2", "web_questions"),
        pretraining="pretrain_nano_olmoe",
        threads=(2, 1),
        arms=tuple(arm for arm in ARMS if arm != "distilled"),
        stacks=("decoder",),
        others=(),
    ),
    "mini": Size(("squad", "dialogsum", "sst2"), pretraining="pretrain_mini"),
    "switch_base_8": Size(("squad", "xsum", "web_questions"), source="google/switch-base-8"),
    "smollm2_moe": Size(
        ("web_questions", "sst2", "squad", "dialogsum"),
        source="runs/smollm2_moe/checkpoint",
        make_source="python -m studies.dense_to_moe runs/smollm2_moe --teach --steps 120",
        dense="dense_as_moe",
        threads=(2, 1),
        stacks=("decoder",),
        repeated=(CONVENTIONAL, "pre_gated", "distilled"),
        others=(1,),
        changes=DECODER_ONLY_CHANGES,
        candidates=(("pre_gated", "init_calibrated"),),
        one_seed=("squad", "dialogsum"),
        tried=(("squad", ("calibrated", "start")),),
    ),
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
        return self.arm not in UNTRAINED and self.variant not in NOT_TRAINED

    @property
    def from_source(self) -> bool:
        """Whether its command names the model that it starts from, and its arm does not."""
        return self.arm in (CONVENTIONAL, "pre_gated", "distilled")


def all_cells(size: Size) -> list[Cell]:
    """All cells, most valuable first: pre-training, the arms and candidates of one seed, what the source gives as it
    is, changes to arms where most are of one seed, and those tried on another task. Then, of tasks with all seeds: the
    other seeds, lookahead, what the teacher of arm (e) gives without pre-gating, how far apart the routes of two seeds
    are. At the end changes to arms where they have all seeds."""
    cells = (
        [Cell(PRETRAINING, PRETRAINING, PRETRAINING, 0, lookahead=0, stacks=size.stacks)] if size.pretraining else []
    )
    first, others = SEEDS
    cells += [cell for task in size.tasks for seed in first for cell in _recipes(size, size.arms, task, seed)]
    if size.dense:
        cells += [_untouched(size, task, 1, variant, ()) for task in size.tasks for variant in AS_IT_IS]
    single = [key for key in size.changes if key not in size.candidates]
    changes = [_change(size, key, size.tasks[0], seed) for key in single for seed in size.others]
    all_seeds = (*first, *others)
    cells += changes if size.others != all_seeds else []
    cells += [_change(size, key, task, 1) for task, key in size.tried]
    repeated = [arm for arm in size.arms if arm in size.repeated]
    tasks = [task for task in size.tasks if task not in size.one_seed]
    cells += [cell for task in tasks for seed in others for cell in _recipes(size, repeated, task, seed)]
    for task in tasks:
        cells += [_variant(size, "pre_gated", task, s, f"n{n}", {"lookahead": n}) for n in (2, 3) for s in size.others]
    if "distilled" in size.arms:
        cells += [_taught(size, task, seed) for task in tasks for seed in size.others]
    cells += [_other_seed(size, task, seed, all_seeds) for task in tasks for seed in size.others]
    return cells + (changes if size.others == all_seeds else [])


def _recipes(size: Size, arms: Sequence[str], task: str, seed: int) -> list[Cell]:
    """`arms`, and the candidates beside them."""
    return [
        *(_arm(size, arm, task, seed) for arm in arms),
        *(_change(size, key, task, seed) for key in size.candidates),
    ]


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


def _variant(
    size: Size, arm: str, task: str, seed: int, variant: str, change: dict[str, object], more: tuple[str, ...] = ()
) -> Cell:
    base = _arm(size, arm, task, seed)
    return replace(
        base,
        name=cell_name(task, arm, seed, variant),
        variant=variant,
        overrides=(*(f"pregate.{key}={_written(value)}" for key, value in change.items()), *more),
        **change,  # type: ignore[arg-type]
    )


def _change(size: Size, key: tuple[str, str], task: str, seed: int) -> Cell:
    arm, variant = key
    return _variant(size, arm, task, seed, variant, CHANGES[key].pregate, CHANGES[key].others)


def _taught(size: Size, task: str, seed: int) -> Cell:
    arm, variant = TAUGHT
    return _variant(size, arm, task, seed, variant, {"lookahead": 0})


def _untouched(size: Size, task: str, seed: int, variant: str, needs: tuple[str, ...]) -> Cell:
    cell = _arm(size, CONVENTIONAL, task, seed)
    name = cell_name(task, CONVENTIONAL, seed, variant)
    return replace(cell, name=name, variant=variant, needs=needs, overrides=UNTOUCHED)


def _other_seed(size: Size, task: str, seed: int, seeds: tuple[int, ...]) -> Cell:
    after = seeds[(seeds.index(seed) + 1) % len(seeds)]
    needs = tuple(cell_name(task, CONVENTIONAL, number) for number in (seed, after))
    return _untouched(size, task, seed, OTHER_SEED, needs)


def _written(value: object) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)


def cell_name(task: str, arm: str, seed: int, variant: str = "") -> str:
    return "_".join(part for part in (task, arm, variant, f"s{seed}") if part)


def start_of(cell: Cell, size_name: str, source: str) -> str:
    """The checkpoint that a cell starts from: `source`, or the dense model beside it."""
    dense = SIZES[size_name].dense if cell.variant == DENSE else None
    return str(Path(source).parent / dense) if dense else source


def overrides_of(cell: Cell, size_name: str, run_dir: str, source: str | None, reference: str | None) -> list[str]:
    """The settings of a cell's command. `source`: the checkpoint that it starts from, for the arms that do not start
    from `reference` by themselves; `reference`: arm (a)'s of the same task and seed, None for (a) itself."""
    if cell.arm == PRETRAINING:
        return [f"+experiment={SIZES[size_name].pretraining}", f"run_dir={run_dir}"]
    given = [f"+experiment=accuracy_{size_name}_{cell.task}", f"+arm={cell.arm}", f"seed={cell.seed}", *cell.overrides]
    if source is not None and cell.from_source:
        given.append(f"model.source={start_of(cell, size_name, source)}")
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
