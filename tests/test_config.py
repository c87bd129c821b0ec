"""The schema and the command line: every experiment composes, and nonsense is refused in one sentence."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pregate.cli import compose_run
from pregate.config import Policy, Run, UsageError, save_run, to_dict
from pregate.config.groups import config_dir
from pregate.overrides import composed, parsed

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
COMMANDS = {
    "train": [],
    "eval": ["checkpoint=some/checkpoint", "reference=some/source"],
    "convert": ["source=some/source", "output=some/output"],
    "bench": [],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_for_every_command(experiment: str, command: str, tmp_path: Path) -> None:
    run = compose_run([f"+experiment={experiment}", "data.root=some/data", *COMMANDS[command]])
    assert run.run_dir == f"runs/{run.name}"
    if command == "eval":  # it has the most settings, and to write and read a file takes time
        assert saved_and_read(run, tmp_path / "config.yaml") == to_dict(run)
        assert (tmp_path / "config.yaml").read_text().startswith(f"name: {run.name}\n")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_begins_with_the_command_that_runs_it(experiment: str) -> None:
    lines = (config_dir() / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    command = re.fullmatch(
        rf"# .*python -m pregate\.(train|bench) \+experiment={experiment}( \+arm=conventional( \\)?)?", lines[1]
    )
    assert command, lines[1]
    assert ("bench:" in lines) == (command[1] == "bench")


@pytest.mark.parametrize(
    "group", sorted(p.name for p in config_dir().iterdir() if p.is_dir() and p.name != "experiment")
)
def test_every_group_member_composes(group: str) -> None:
    """Those that a command always has by their name, the others added to it."""
    always = any(f"- {group}: " in line for line in (config_dir() / "config.yaml").read_text().splitlines())
    for path in sorted((config_dir() / group).glob("*.yaml")):
        extra = ["task.labels=[a,b]"] if path.stem == "classification" else []
        extra += ["reference=some/reference"] if group == "arm" else []
        assert compose_run([f"{'' if always else '+'}{group}={path.stem}", *extra]).run_dir.startswith("runs/")


def test_the_papers_recipe_is_the_papers() -> None:
    train = compose_run(["+experiment=switch_base_squad"]).train
    assert (train.batch_sequences, train.steps, train.learning_rate, train.schedule) == (256, 2048, 1e-4, "constant")
    assert compose_run(["+experiment=switch_base_squad"]).task.max_source_tokens == 256


def test_larger_models_are_one_override_away() -> None:
    run = compose_run(["+experiment=switch_base_xsum", "model=switch_base_128"])
    assert (run.model.source, run.task.name, run.name) == ("google/switch-base-128", "xsum", "switch-base-128_xsum")


def test_settings_survive_the_file(tmp_path: Path) -> None:
    """Also texts that look like a number, a list or another setting."""
    run = compose_run(["engine.policies=[pre_gated]", "train.clip_norm=null"])
    assert run.engine.policies == [Policy.pre_gated] and run.train.clip_norm is None
    run.task.labels = [*AWKWARD, "null", "yes", "0x1f", "1:30", "2026-11-28", "${name}", " a ", "a\nb", "ä"]
    read = saved_and_read(run, tmp_path / "config.yaml")
    assert read == to_dict(run) and read["task"]["labels"] == run.task.labels
    assert read["engine"]["policies"] == ["pre_gated"] and read["train"]["clip_norm"] is None


def saved_and_read(run: Run, path: Path) -> Any:
    save_run(run, path)
    return OmegaConf.to_container(OmegaConf.load(path))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepss=3", "no setting 'train.stepss'; did you mean train.steps?"),
        ("trian.steps=3", "no setting 'trian.steps'; did you mean train.steps?"),
        ("+engine.polcy=pre_gated", "did you mean engine.policy?"),
        ("foo=1", "no setting 'foo'"),
        ("train.steps=many", "train.steps: Value 'many'"),
        ("engine.policy=fast", "expected one of [gpu_only, on_demand, prefetch_all, pre_gated]"),
        ("+experiment=switch_base_sqad", "no experiment named 'switch_base_sqad'"),
        ("model=switch_base_9", "no model named 'switch_base_9': choose one of"),
        ("pregate.lookahead=4", "outside 0 to 3"),
        ("pregate.stacks=[decoder,decoder]", "each once"),
        ("pregate.gate=deep", "expected one of [linear, mlp]"),
        ("pregate.gate_width=0", "pregate.gate_width=0 must be at least 1"),
        ("train.steps=-1", "train.steps=-1 must be at least 0"),
        ("train.distill_logits=-1", "must be 0 or above"),
        ("train.distill_routing=nan", "must be 0 or above"),
        ("train.distill_temperature=0", "must be above 0"),
        ("train.distill_temperature=inf", "must be above 0"),
        ("train.distill_logits=1", "need a teacher: set train.teacher=DIR_OR_ID"),
        ("train.teacher=some/model", "teaches nothing: set train.distill_logits"),
        ("train.trainable=experts", "expected one of [all, all_but_experts, gates, lora]"),
        ("train.keep=first", "expected one of [best, last]"),
        ("train.warmup_steps=9999", "between 0 and train.steps"),
        ("train.learning_rate=-1", "above 0"),
        ("train.dropout=1.5", "must lie in [0, 1)"),
        ("eval.examples=0", "must be at least 1, or null"),
        ("bench.new_tokens=1", "bench.new_tokens=1 must be at least 2"),
        ("bench.caches=[]", "bench.caches is empty"),
        ("bench.num_blocks=0", "must be at least 1, or null for all"),
        ("bench.max_seconds_per_row=0", "must be at least 1"),
        ("engine.bench_repeats=0", "engine.bench_repeats=0 must be at least 1"),
        ("engine.bench_prompts=0", "engine.bench_prompts=0 must be at least 1"),
        ("engine.io_threads=0", "engine.io_threads=0 must be at least 1"),
        ("eval.bootstrap_samples=0", "eval.bootstrap_samples=0 must be at least 1"),
        ("eval.max_new_tokens=0", "must be at least 1, or null"),
        ("train.clip_norm=0", "above 0, or null"),
        ("engine.policies=[]", "engine.policies is empty"),
        ("task=classification", "needs task.labels"),
        ("calibration.examples=1", "at least 2"),
        ("calibration.tokens=0", "at least 1"),
        ("calibration.held_out=1", "between 0 and 1"),
        ("calibration.steps=-1", "the closed form alone"),
        ("calibration.batch_size=0", "at least 1"),
        ("calibration.memory=4GB", "is for calibration.through=engine: set both, or leave it out"),
        ("calibration.data=text", "belong together"),
        ("calibration.text=FILE", "belong together"),
        ("task.noise_density=1", "must lie between 0 and 1"),
        ("task.mean_span_tokens=0.5", "must be at least 1"),
        ("train.steps=[1", "cannot be read"),
        ("source_train.steps=3", "+experiment=quickstart"),
        ("task.generated.seed=3", "task.generated, which is empty here: choose an experiment or a group member that"),
        ("experiment=quickstart", "experiment=quickstart needs a plus: write +experiment=quickstart."),
        ("arm=shifted", "arm=shifted needs a plus: write +arm=shifted."),
        ("+model=switch_base_8", "takes no plus: write model=switch_base_8."),
        ("+seed=3", "takes no plus: write seed=3."),
        ("task.files.extra=a.jsonl", "needs a plus: write +task.files.extra=a.jsonl."),
        ("~train.clip_norm", "deletes a setting, and all must be there: set train.clip_norm=VALUE."),
        ("~pregate", "deletes a setting, and all must be there: set pregate=VALUE."),
        ("model.geometry={num_heads: 0}", "model.geometry.num_heads=0 must be at least 1."),
        ("model.geometry={d_ff: -4}", "model.geometry.d_ff=-4 must be at least 1."),
        ("+model.geometry.dropout_rate=2", "model.geometry.dropout_rate=2 must lie between 0 and 1."),
        ("name=", "name is empty: give it a value, or leave it out."),
        ("run_dir=", "run_dir is empty: give it a value, or leave it out."),
        ("train.steps=1,2", "holds several values: give one, or add --multirun for one run with each."),
        ("engine.policies=pre_gated,on_demand", "write 'engine.policies=[pre_gated,on_demand]' for a list"),
        ("task=squad,sst2", "holds several values: give one, or add --multirun"),
        ("resume", "'resume' cannot be read: a setting is written resume=VALUE."),
        ("trian.steps=a=b", "no setting 'trian.steps'; did you mean train.steps?"),
        ("model.revision=1234e5", "would become 123400000.0: write 'model.revision=\"1234e5\"'."),
        ("task.labels=[true,false]", "would become True,False: put each text in quotes"),
        ("task.labels=[+1,-1]", "would become 1,-1: put each text in quotes"),
        ("task.labels=[1.50,2]", "would become 1.5,2: put each text in quotes"),
        ("seed=${nothing}", "Interpolation key 'nothing' not found"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(override: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose_run([override])
    assert said in str(refused.value), str(refused.value)
    assert "\n" not in str(refused.value)


def test_only_the_argument_to_blame_is_named() -> None:
    """Among others that are fine."""
    with pytest.raises(UsageError) as refused:
        compose_run(["seed=1", "source_train.steps=3", "name=x", "task=qa"])
    assert str(refused.value) == (
        "source_train.steps=3 sets a part of source_train, which is empty here: choose an experiment or a group member "
        "that fills it, such as +experiment=quickstart."
    )
    with pytest.raises(UsageError, match=r"^name=\$\{nothing\} cannot be used here|^name: Interpolation key 'nothing'"):
        compose_run(["seed=1", "name=${nothing}", "task=qa"])


def test_all_typos_are_told_at_once() -> None:
    given = ["trian.steps=3", "seed=1", "train.steps=many", "model=switch_base_9", "experiment=quickstart", "name=a=b"]
    with pytest.raises(UsageError) as refused:
        compose_run(given)
    assert str(refused.value) == (
        "5 arguments cannot be used: 'trian.steps' is no setting (did you mean train.steps?); train.steps: Value "
        "'many' of type 'str' could not be converted to Integer; 'switch_base_9' is no model (did you mean "
        "switch_base_8?); "
        "experiment=quickstart needs a plus: write +experiment=quickstart; 'name=a=b' cannot be read: its value needs "
        "quotes, and these need the shell's around them: write 'name=\"a=b\"'."
    )


AWKWARD = [
    "runs/lr=1e-4/x",
    "a,b",
    "a#b",
    "a{b}",
    "{a}",
    "a b{c} d",
    "it's",
    'say "x"',
    'it\'s "x"',
    "a(b)",
    "[a",
    "1e3",
    "a$b=",
    "true",
    "[a]",
    "{a: b}",
]


@pytest.mark.parametrize("value", AWKWARD)
def test_advice_on_quoting_works_when_it_is_typed(value: str) -> None:
    """As a shell splits it, with the very text in the setting."""
    with pytest.raises(UsageError) as refused:
        compose_run([f"checkpoint={value}"])
    assert compose_run(shlex.split(advised(str(refused.value)))).checkpoint == value


def advised(sentence: str) -> str:
    """What a sentence says to write."""
    return sentence.partition(": write ")[2].removesuffix(".").partition(" for one")[0]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.text(alphabet="ab1e0/=,#{}()[]'\": .-+_~%@*?|;&<>!tTnN", min_size=1, max_size=8).map(str.strip))
def test_a_text_is_taken_as_it_is_or_the_way_to_write_it_is_told(value: str) -> None:
    said = None
    try:
        composed([f"name={value}"])
        taken = parsed(f"name={value}")
    except UsageError as refused:
        said = str(refused)
        (argument,) = shlex.split(advised(said)) if ": write " in said else [said]
        composed([argument])
        taken = parsed(argument)
    assert taken is not None
    assert str(taken.value()) == value or (taken.value() is None and value.lower() == "null"), (value, said)


def test_a_run_may_take_no_steps_but_a_source_must_be_trained() -> None:
    assert compose_run(["+experiment=nano_sst2", "train.steps=0"]).train.steps == 0
    with pytest.raises(UsageError, match=r"source_train\.steps=0 must be at least 1"):
        compose_run(["+experiment=nano_sst2", "source_train.steps=0"])


@pytest.mark.parametrize("arm", ["shifted", "calibrated", "distilled", "gates_only"])
def test_an_arm_of_a_fine_tuned_model_needs_it(arm: str) -> None:
    """Any other source looks fine and is another arm."""
    with pytest.raises(UsageError, match=rf"\+arm={arm} .* set reference=DIR"):
        compose_run(["+experiment=accuracy_nano_sst2", f"+arm={arm}", "model.source=some/pretrained"])


@pytest.mark.parametrize("arm", ["shifted", "calibrated", "gates_only"])
def test_an_arm_that_starts_from_its_reference_takes_no_other_source(arm: str) -> None:
    given = ["+experiment=accuracy_nano_sst2", f"+arm={arm}", "reference=some/tuned"]
    assert compose_run(given).model.source == "some/tuned"
    with pytest.raises(UsageError, match=r"starts from reference=some/tuned: leave out model.source=some/pretrained\."):
        compose_run([*given, "model.source=some/pretrained"])


def test_an_arm_ahead_of_its_experiment_is_refused() -> None:
    """The experiment's steps would train an arm that is not to be trained."""
    given = ["+arm=shifted", "+experiment=accuracy_nano_sst2", "reference=some/reference"]
    with pytest.raises(UsageError, match=r"put it behind \+experiment"):
        compose_run(given)
    assert compose_run([given[1], given[0], given[2]]).train.steps == 0
