"""The plan of the study: what it holds, in which order, and that its commands compose."""

from __future__ import annotations

import pytest

from pregate.cli import compose_run
from studies.accuracy.arms_and_seeds import (
    ARMS,
    CHANGES,
    PRETRAINING,
    SIZES,
    TAUGHT,
    all_cells,
    overrides_of,
    tiny_overrides,
)


def test_the_plan_holds_the_main_comparison_and_goes_by_worth() -> None:
    cells = all_cells(SIZES["nano"])
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert names[0] == PRETRAINING
    assert names[1:7] == [f"sst2_{arm}_s1" for arm in ARMS]
    main = {(c.task, c.arm, c.seed) for c in cells if not c.variant and c.arm != PRETRAINING}
    assert main == {(task, arm, seed) for task in ("sst2", "web_questions") for arm in ARMS for seed in (1, 2, 3)}
    ahead = {(c.task, c.lookahead, c.seed) for c in cells if c.arm == "pre_gated" and c.variant in ("", "n2", "n3")}
    assert ahead == {(task, n, seed) for task in ("sst2", "web_questions") for n in (1, 2, 3) for seed in (1, 2, 3)}
    assert (
        names.index("sst2_gates_only_s3")
        < names.index("sst2_pre_gated_n2_s1")
        < names.index("sst2_pre_gated_encoder_s1")
    )
    taught = {(c.task, c.seed) for c in cells if (c.arm, c.variant) == TAUGHT and c.lookahead == 0}
    assert taught == {(task, seed) for task in ("sst2", "web_questions") for seed in (1, 2, 3)}
    others = {"n0", "n2", "n3", "other_seed", "init_random", "init_calibrated", "entry_embedding", "encoder", "decoder"}
    others |= {"late", "start", "mlp", "own_answers"}
    assert {c.variant for c in cells} == {"", *others}


def test_a_candidate_runs_like_an_arm_and_once() -> None:
    size = SIZES["smollm2_moe"]
    names = [cell.name for cell in all_cells(size)]
    assert len(set(names)) == len(names)
    for arm, variant in size.candidates:
        wanted = {f"{task}_{arm}_{variant}_s{seed}" for task in ("web_questions", "sst2") for seed in (1, 2, 3)}
        wanted |= {f"{task}_{arm}_{variant}_s1" for task in ("squad", "dialogsum")}
        assert {name for name in names if f"_{arm}_{variant}_s" in name} == wanted
    tried = {f"{task}_{arm}_{variant}_s1" for task, (arm, variant) in size.tried}
    assert tried == {"squad_calibrated_start_s1"} < set(names) and "web_questions_calibrated_start_s1" not in names
    once = {f"web_questions_{arm}_{variant}_s1" for arm, variant in size.changes}
    assert once <= set(names) and "sst2_gates_only_lora_s1" not in names


def test_what_a_cell_needs_comes_before_it() -> None:
    for size in SIZES.values():
        seen: set[str] = set()
        for cell in all_cells(size):
            assert set(cell.needs) <= seen, cell
            seen.add(cell.name)
    assert all(PRETRAINING not in cell.needs for cell in all_cells(SIZES["switch_base_8"]))


@pytest.mark.parametrize("size", SIZES)
def test_every_command_composes_to_its_cell(size: str) -> None:
    """Arms and variants differ in the same way on every task, so of later tasks the first cell will do."""
    cells = all_cells(SIZES[size])
    first = [next(cell for cell in cells if cell.task == task) for task in SIZES[size].tasks]
    main = [cell for cell in cells if cell.task == SIZES[size].tasks[0] and cell.seed == 1]
    for cell in [*cells[:1], *main, *first[1:]]:
        from_others = [name for name in cell.needs if name != PRETRAINING]
        reference = "some/reference" if from_others else None
        overrides = overrides_of(cell, size, f"runs/x/{cell.name}", "some/source", reference)
        run = compose_run(["data.root=some/data", *overrides, *tiny_overrides(cell)])
        assert run.run_dir == f"runs/x/{cell.name}"
        if cell.arm == PRETRAINING:
            continue
        assert (run.task.name, run.seed) == (cell.task, cell.seed)
        assert (run.pregate.lookahead, run.pregate.init, run.pregate.entry) == (cell.lookahead, cell.init, cell.entry)
        assert (run.pregate.weights, run.pregate.start, run.pregate.gate) == (cell.weights, cell.start, cell.gate)
        assert tuple(run.pregate.stacks or SIZES[size].stacks) == cell.stacks
        starts_from_reference = cell.arm in ("shifted", "calibrated", "gates_only")
        source = "some/dense_as_moe" if cell.variant == "dense" else "some/source"
        assert run.model.source == ("some/reference" if starts_from_reference else source)
        assert (run.train.distill_data == "generations") == (cell.variant == "own_answers" and cell.arm != "calibrated")
        assert run.train.teacher == ("some/reference" if cell.arm in ("distilled", "gates_only") else None)
        assert (run.train.steps == 0) == (not cell.trained)
        assert run.tracking.group == f"accuracy_{size}"


def test_a_study_that_repeats_few_arms_goes_by_worth_too() -> None:
    cells = all_cells(SIZES["smollm2_moe"])
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and PRETRAINING not in names
    assert names[:6] == [f"web_questions_{arm}_s1" for arm in ARMS]
    again = {(cell.task, cell.arm) for cell in cells if cell.seed > 1}
    tasks = ("sst2", "web_questions")
    assert again == {(task, arm) for task in tasks for arm in ("conventional", "pre_gated", "distilled")}
    controls = {cell.task for cell in cells if cell.variant in ("n0", "n2", "n3", "other_seed")}
    assert controls == set(tasks)
    for task in ("squad", "dialogsum"):
        assert {f"{task}_{arm}_s1" for arm in ARMS} < set(names)
    as_it_is = [cell for cell in cells if cell.variant in ("source", "dense")]
    assert len(as_it_is) == 8 and not any(cell.needs or cell.trained for cell in as_it_is)
    changes = {(cell.arm, cell.variant) for cell in cells if (cell.arm, cell.variant) in CHANGES}
    assert {("gates_only", "lora"), ("distilled", "rank"), ("calibrated", "own_answers"), ("shifted", "late")} < changes
    assert names.index("web_questions_gates_only_lora_s1") < names.index("web_questions_conventional_s2")


def test_arms_of_a_task_differ_in_nothing_but_the_arm() -> None:
    def shared(arm: str) -> tuple[object, ...]:
        run = compose_run(["+experiment=accuracy_nano_sst2", f"+arm={arm}", "reference=r"])
        train = run.train
        return train.steps, train.batch_sequences, train.learning_rate, train.schedule, train.warmup_steps, run.eval

    assert shared("conventional") == shared("pre_gated") == shared("distilled") == shared("gates_only")
