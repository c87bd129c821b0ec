"""What a resumed command finds in its run directory, and when it must not go on from it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersForConditionalGeneration

from pregate.config import (
    CalibrationConfig,
    Entry,
    GeneratedConfig,
    Init,
    ModelConfig,
    PreGateConfig,
    Run,
    Schedule,
    TaskConfig,
    Through,
    TrainConfig,
    UsageError,
    to_dict,
)
from pregate.conversion.manifest import MANIFEST
from pregate.conversion.write import convert
from pregate.models.checkpoint import open_checkpoint, read_config
from pregate.models.pregating import PreGating
from pregate.tracking import flatten
from pregate.training.checks import check_model, check_teachers, trained_config
from pregate.training.from_scratch import geometry_config, special_tokens, vocabulary_size
from pregate.training.memory_needs import needs_of
from pregate.training.resume_changes import OTHER_RESULT, SAME_RESULT, check_data
from pregate.training.run_dir_lock import CHECKPOINT, CONFIG, CONVERTED, claim_run_dir
from pregate.training.saved_state import steps_done
from pregate.training.stages import get_converted, get_source, train_converted
from tests.tiny import geometry, pregated_model, upstream_model
from tests.training.copying import FirstWords, Recorder, short_run, train_tiny, word_tokenizer


def test_a_conversion_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / CONVERTED, PreGateConfig(lookahead=1))
    source = str(tmp_path / "source")
    nothing: Any = None  # neither a task nor a tokenizer is needed
    run = Run(pregate=PreGateConfig(lookahead=1))
    assert get_converted(run, tmp_path, source, nothing, nothing) == str(tmp_path / CONVERTED)
    for other in (PreGateConfig(lookahead=2), PreGateConfig(stacks=["decoder"])):
        with pytest.raises(UsageError, match="was converted with other pregate settings"):
            get_converted(Run(pregate=other), tmp_path, source, nothing, nothing)


def test_a_conversion_of_other_weights_is_not_gone_on_with(tmp_path: Path) -> None:
    source, converted, nothing = str(tmp_path / "source"), tmp_path / CONVERTED, cast(Any, None)
    upstream_model(0).save_pretrained(source)
    run = Run(pregate=PreGateConfig(lookahead=1))
    given = tmp_path, source, nothing, nothing
    assert get_converted(run, *given) == str(converted)
    made = (converted / "model.safetensors").read_bytes()
    os.utime(tmp_path / "source" / "model.safetensors", (0, 0))  # a copy
    assert get_converted(run, *given) == str(converted)
    upstream_model(1).save_pretrained(source)
    with pytest.raises(
        UsageError, match=r"was made from other weights than .*source has now.*allow_changes=\[source\]"
    ):
        get_converted(run, *given)
    get_converted(replace(run, allow_changes=["source"]), *given)
    manifest = json.loads((converted / MANIFEST).read_text())
    assert "files" in (manifest.pop("source_identity") or {"files": "written just before"})
    (converted / MANIFEST).write_text(json.dumps(manifest))  # as earlier versions wrote it
    get_converted(run, *given)
    assert (converted / "model.safetensors").read_bytes() == made


def test_a_conversion_of_one_stack_is_not_gone_on_with_for_all_stacks(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / CONVERTED, PreGateConfig(lookahead=1, stacks=["decoder"]))
    nothing: Any = None
    with pytest.raises(UsageError, match="was converted with other pregate settings"):
        get_converted(Run(), tmp_path, str(tmp_path / "source"), nothing, nothing)


def test_the_steps_of_an_interrupted_run_are_known(tmp_path: Path) -> None:
    assert steps_done(tmp_path / "last") == 0
    train_tiny(tmp_path, steps=3)
    assert steps_done(tmp_path / "last") == 3


def test_a_run_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written .*: choose another run_dir=DIR\."):
        claim_run_dir(Run(run_dir=str(tmp_path / "file" / "run")))


def test_a_resumed_run_refuses_changes_of_its_result_unless_they_are_allowed(tmp_path: Path, capsys: Any) -> None:
    run_dir = tmp_path / "run"
    run = Run(run_dir=str(run_dir))
    claim_run_dir(run)
    written = (run_dir / CONFIG).read_text()
    train_tiny(run_dir, steps=1)
    capsys.readouterr()
    run.resume, run.train.log_every, run.tracking.project, run.engine.io_threads = True, 3, "p", 4
    run.train.steps = 9
    claim_run_dir(run)
    told = capsys.readouterr().err
    assert "train.steps 2048, now 9" in told
    assert "train.log_every 10, now 3" in told and "tracking.project pregate, now p" in told and told.count("\n") == 1
    run = Run(run_dir=str(run_dir), resume=True, source_train=TrainConfig())
    (run_dir / CONFIG).write_text(written)
    run.train.learning_rate, run.model.geometry, run.train.log_every = 0.5, {"d_model": 8}, 3
    record = json.loads((run_dir / "last" / "train_state.json").read_text())
    record["random"] *= 2
    (run_dir / "last" / "train_state.json").write_text(json.dumps(record))
    names = "model.geometry.d_model,train.learning_rate,source_train,processes"
    with pytest.raises(UsageError) as error:
        claim_run_dir(run)
    said = str(error.value)
    assert "train.learning_rate 0.0001, now 0.5" in said and "processes 2, now 1" in said and "log_every" not in said
    assert said.endswith(f"or go on all the same with 'allow_changes=[{names}]'.") and "\n" not in said
    assert (run_dir / CONFIG).read_text() == written
    run.allow_changes = ["model", "train.learning_rate", "processes"]
    with pytest.raises(UsageError, match=r"result \(source_train None, now set\)"):
        claim_run_dir(run)
    longer = Run(run_dir=str(run_dir), resume=True, allow_changes=["processes", "train.schedule"])
    longer.train.schedule, longer.train.steps = Schedule.linear, 9
    with pytest.raises(UsageError, match=r"result \(train.steps 2048, now 9\)"):
        claim_run_dir(longer)
    run.allow_changes = names.split(",")
    claim_run_dir(run)
    assert "processes 2, now 1" in capsys.readouterr().err
    assert "learning_rate: 0.5" in (run_dir / CONFIG).read_text()


def test_the_family_of_a_resumed_run_may_change_where_a_source_says_its_own(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path / "run"), model=ModelConfig(source="DIR"))
    claim_run_dir(run)
    train_tiny(tmp_path / "run", steps=1)
    run.resume, run.model.family = True, "mixtral"
    claim_run_dir(run)
    assert "family: mixtral" in (tmp_path / "run" / CONFIG).read_text()
    run.model.source, run.model.family = None, "olmoe"
    with pytest.raises(UsageError, match=r"model\.family mixtral, now olmoe"):
        claim_run_dir(run)


def test_what_does_not_change_a_result_is_a_setting() -> None:
    now = flatten(to_dict(Run(source_train=TrainConfig())), separator=".")
    for name in (*SAME_RESULT, *OTHER_RESULT):
        assert any(key == name or key.startswith(f"{name}.") for key in now), name


def test_a_worker_that_outlives_its_killed_parent_does_not_lock_the_run_directory(tmp_path: Path) -> None:
    run = Run(run_dir=str(tmp_path / "run"), resume=True)
    told, tell = os.pipe()
    parent = os.fork()
    if not parent:
        claim_run_dir(run)
        worker = os.fork()
        if worker:
            os.write(tell, str(worker).encode())
        signal.pause()
    worker = int(os.read(told, 9))
    with pytest.raises(UsageError, match="Another process works in"):
        claim_run_dir(run)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        os.kill(worker, 0)
        claim_run_dir(run)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_resumed_run_tells_what_it_changes(tmp_path: Path, capsys: Any) -> None:
    run = Run(run_dir=str(tmp_path / "run"), task=TaskConfig(generated=GeneratedConfig()))
    claim_run_dir(run)
    run.resume, run.overrides = True, ["resume=true"]
    claim_run_dir(run)
    assert capsys.readouterr().err == ""
    run.train.learning_rate, run.seed = 0.5, 7
    claim_run_dir(run)
    assert capsys.readouterr().err == (
        f"pregate: {tmp_path / 'run' / 'config.yaml'} was written with other settings: seed 0, now 7; "
        "train.learning_rate 0.0001, now 0.5\n"
    )
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "stacks: null" in saved
    named = saved.replace("stacks: null", "stacks: [encoder, decoder]")  # as earlier versions wrote all stacks
    (tmp_path / "run" / "config.yaml").write_text(named)
    claim_run_dir(run)
    assert capsys.readouterr().err == ""
    older = saved.replace("  packing: false\n", "")  # as a release wrote it that had no such setting
    assert older.count("packing") == 0 < saved.count("packing")
    for packing, told in ((False, ""), (True, "train.packing False, now True\n")):
        run.train.packing = packing
        (tmp_path / "run" / "config.yaml").write_text(older)
        claim_run_dir(run)
        said = capsys.readouterr().err
        assert bool(said) == packing and said.endswith(told)
    for torn in (b"", b"train: {steps: 4", b"seed: ${oops", b"name: \xff", b"[1, 2]"):
        (tmp_path / "run" / "config.yaml").write_bytes(torn)
        claim_run_dir(run)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_directory_in_which_another_process_works_is_refused(tmp_path: Path, resume: bool) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    other = os.open(run_dir, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match=r"Another process works in .*run: wait for its end, or choose"):
        claim_run_dir(Run(run_dir=str(run_dir), resume=resume))
    assert not list(run_dir.iterdir())
    os.close(other)
    claim_run_dir(Run(run_dir=str(run_dir), resume=resume))
    other = os.open(run_dir, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def untrained(run: Run, run_dir: Path, source: str) -> dict[str, torch.Tensor]:
    """The tensors of `run_dir/checkpoint` after a run of no steps."""
    converted = get_converted(run, run_dir, source, FirstWords(), word_tokenizer())  # type: ignore[arg-type]
    summary = train_converted(run, run_dir, converted, FirstWords(), word_tokenizer(), Recorder())  # type: ignore[arg-type]
    assert (summary.steps, summary.checkpoint_step, summary.best_step) == (0, 0, None)
    assert summary.checkpoint == str(run_dir / CHECKPOINT)
    assert (run_dir / CHECKPOINT / "tokenizer.json").is_file()
    opened = open_checkpoint(summary.checkpoint)
    return opened.read(opened.names())


@pytest.mark.parametrize(("lookahead", "shard"), [(0, "1GB"), (0, "20KB"), (1, "20KB")])
def test_without_steps_the_converted_model_itself_is_the_checkpoint(tmp_path: Path, lookahead: int, shard: str) -> None:
    source = str(tmp_path / "source")
    upstream_model(0).to(torch.bfloat16).save_pretrained(source, max_shard_size=shard)
    run = Run(pregate=PreGateConfig(lookahead=lookahead), train=TrainConfig(steps=0))
    found = untrained(run, tmp_path, source)
    expected = open_checkpoint(str(tmp_path / CONVERTED) if lookahead else source)
    assert found.keys() == expected.tensors.keys()
    for name, value in expected.read(expected.names()).items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert (tmp_path / CHECKPOINT / MANIFEST).is_file() == bool(lookahead)
    assert ("pregate" in read_config(str(tmp_path / CHECKPOINT))) == bool(lookahead)
    resumed = untrained(Run(resume=True, pregate=run.pregate, train=run.train), tmp_path, source)
    assert resumed.keys() == found.keys()


def test_a_pre_gated_source_keeps_its_manifest_without_steps(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "ahead", PreGateConfig(lookahead=2))
    run = Run(pregate=PreGateConfig(lookahead=2), train=TrainConfig(steps=0))
    untrained(run, tmp_path / "run", str(tmp_path / "ahead"))
    assert (tmp_path / "run" / CHECKPOINT / MANIFEST).read_bytes() == (tmp_path / "ahead" / MANIFEST).read_bytes()


def test_a_trained_run_is_not_replaced_by_one_without_steps(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    train_tiny(tmp_path, steps=3)
    run = Run(resume=True, pregate=PreGateConfig(lookahead=0), train=TrainConfig(steps=0))
    with pytest.raises(UsageError, match="holds a run of 3 steps"):
        untrained(run, tmp_path, str(tmp_path / "source"))


def test_what_a_run_without_steps_leaves_opens_anywhere(tmp_path: Path) -> None:
    """Upstream's own class would fill a copy of such files with random weights."""
    model = upstream_model(0)
    model.save_pretrained(tmp_path / "source")
    tensors = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "source" / "pytorch_model.bin")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    untrained(Run(pregate=PreGateConfig(0), train=TrainConfig(steps=0)), tmp_path, str(tmp_path / "source"))
    opened, info = SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / CHECKPOINT, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    assert "auto_map" not in (tmp_path / CHECKPOINT / "config.json").read_text()


CHOICES: dict[str, list[Any]] = {
    "lookahead": [0, 1, 2],
    "stacks": [["encoder", "decoder"], ["decoder", "encoder"], ["decoder"]],
    "entry": list(Entry),
    "init": list(Init),
}
GATINGS = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()})


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], str]:
    """The directory of a pre-gated model with the gating given."""
    root = tmp_path_factory.mktemp("ahead")

    def made(gating: dict[str, Any]) -> str:
        directory = root / "-".join(str(gating[name]) for name in CHOICES)
        if not directory.is_dir():
            model = pregated_model(0, gating["lookahead"], tuple(gating["stacks"]), str(gating["entry"]))
            model.save_pretrained(directory)
            config = json.loads((directory / "config.json").read_text())
            config["pregate"]["init"] = str(gating["init"])
            (directory / "config.json").write_text(json.dumps(config))
        return str(directory)

    return made


def unordered(value: Any) -> Any:
    return set(value) if isinstance(value, list) else value


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(has=GATINGS, asked=GATINGS, named=st.sets(st.sampled_from(sorted(CHOICES))))
def test_a_pre_gated_source_has_the_settings_asked_for_or_is_refused(
    ahead: Callable[[dict[str, Any]], str], has: dict[str, Any], asked: dict[str, Any], named: set[str]
) -> None:
    """What an experiment sets or the command line names counts; a default that nobody named does not."""
    source = ahead(has)
    overrides = [f"pregate.{name}={asked[name]}" for name in named]
    run = Run(model=ModelConfig(source=source), pregate=PreGateConfig(**asked), overrides=overrides)
    default = vars(PreGateConfig())
    counts = [n for n in CHOICES if n in named or n == "lookahead" or unordered(asked[n]) != unordered(default[n])]
    wrong = [name for name in counts if unordered(has[name]) != unordered(asked[name])]
    if not wrong or has["lookahead"] == asked["lookahead"] == 0:
        check_model(run)
        nothing: Any = None
        assert get_converted(run, Path("unused"), source, nothing, nothing) == source
        return
    with pytest.raises(UsageError) as error:
        check_model(run)
    said, name = str(error.value), wrong[0]
    stored = [stack for stack in ("encoder", "decoder") if stack in has[name]] if name == "stacks" else has[name]
    has_it, wants = (f"[{','.join(v)}]" if isinstance(v, list) else str(v) for v in (stored, asked[name]))
    assert f"has {name} {has_it}, but pregate.{name}={wants} was asked for: set pregate.{name}={has_it}, or" in said
    assert said.endswith(".") and ". " not in said and "\n" not in said


@pytest.mark.parametrize("which", ["train", "source_train"])
def test_a_teacher_is_compared_with_the_model_to_train(tmp_path: Path, which: str) -> None:
    upstream_model(0, vocab_size=64).save_pretrained(tmp_path / "teacher")
    upstream_model(0, vocab_size=128).save_pretrained(tmp_path / "source")
    taught: Any = {which: TrainConfig(teacher=str(tmp_path / "teacher"), distill_logits=1.0)}
    shape = {name: value for name, value in geometry().items() if name != "vocab_size"}
    source, scratch = ModelConfig(source=str(tmp_path / "source")), ModelConfig(geometry=shape)
    tokenizer = word_tokenizer()
    assert len(tokenizer) < 64
    check_teachers(Run(model=scratch, **taught), tokenizer)
    check_teachers(Run(model=source), tokenizer)
    with pytest.raises(UsageError, match="has 64 ids in the vocabulary but the model to train has 128"):
        check_teachers(Run(model=source, **taught), tokenizer)
    source.revision, taught[which].teacher = "v1", source.source
    with pytest.raises(UsageError, match=r"model\.revision=v1 is of the source"):
        check_teachers(Run(model=source, **taught), tokenizer)


def calibrated_run(**calibration: Any) -> Run:
    run = short_run(resume=True)
    run.pregate = PreGateConfig(lookahead=1, init=Init.calibrated)
    run.calibration = CalibrationConfig(**{"steps": 0, **calibration})
    return run


def test_gates_are_calibrated_once_and_with_one_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    given = (tmp_path, str(tmp_path / "source"), FirstWords(), word_tokenizer())
    directory = get_converted(calibrated_run(), *given)  # type: ignore[arg-type]
    assert "calibrated on 40 examples" in capsys.readouterr().out
    assert read_config(directory)["pregate"]["init"] == "calibrated"
    manifest = (Path(directory) / MANIFEST).read_text()
    assert get_converted(calibrated_run(), *given) == directory  # type: ignore[arg-type]
    assert (Path(directory) / MANIFEST).read_text() == manifest and capsys.readouterr().out == ""
    other = r"was calibrated with other settings \(calibration.examples=1024\): resume"
    with pytest.raises(UsageError, match=other):
        get_converted(calibrated_run(examples=12), *given)  # type: ignore[arg-type]
    # as written before some settings existed: what is absent was the default
    older = json.loads(manifest)
    for name in ("through", "memory", "data", "text"):
        del older["calibration"]["settings"][name]
    (Path(directory) / MANIFEST).write_text(json.dumps(older))
    assert get_converted(calibrated_run(), *given) == directory  # type: ignore[arg-type]
    for changed in ({"examples": 12}, {"through": Through.engine}):
        with pytest.raises(UsageError, match="was calibrated with other settings"):
            get_converted(calibrated_run(**changed), *given)  # type: ignore[arg-type]


def test_calibrated_gates_are_what_a_run_without_steps_leaves(tmp_path: Path) -> None:
    upstream_model(0).save_pretrained(tmp_path / "source")
    run = calibrated_run()
    run.train = TrainConfig(steps=0)
    found = untrained(run, tmp_path, str(tmp_path / "source"))
    fitted = open_checkpoint(str(tmp_path / CONVERTED)).read(found)
    assert all(torch.equal(found[name], fitted[name]) for name in fitted)
    told = json.loads((tmp_path / CHECKPOINT / MANIFEST).read_text())["calibration"]
    assert told["seconds"] > 0 and told["task"] == "squad"


@pytest.mark.parametrize("summary", ["", "{", "[]"])
def test_a_spoilt_summary_of_a_trained_source_is_written_again(tmp_path: Path, summary: str) -> None:
    shape = {name: value for name, value in geometry().items() if name != "vocab_size"}
    run = short_run()
    run.source_train, run.model = TrainConfig(steps=1, batch_sequences=2, eval_examples=2), ModelConfig(geometry=shape)
    given = (tmp_path, FirstWords(), word_tokenizer(), Recorder())
    directory = get_source(run, *given)  # type: ignore[arg-type]
    weights = (Path(directory) / "model.safetensors").read_bytes()
    path = tmp_path / "source" / "summary.json"
    whole = json.loads(path.read_text())
    path.write_text(summary)
    run.resume = True
    assert get_source(run, *given) == directory  # type: ignore[arg-type]
    assert json.loads(path.read_text())["steps"] == whole["steps"] == 1
    assert (Path(directory) / "model.safetensors").read_bytes() == weights


def test_data_that_changed_between_two_stages_are_refused(tmp_path: Path) -> None:
    """The run holds a trained source and no state of the fine-tuning yet."""
    shape = {name: value for name, value in geometry().items() if name != "vocab_size"}
    run = short_run()
    run.source_train, run.model = TrainConfig(steps=1, batch_sequences=2, eval_examples=2), ModelConfig(geometry=shape)
    task, tokenizer = FirstWords(), word_tokenizer()
    source = get_source(run, tmp_path, task, tokenizer, Recorder())  # type: ignore[arg-type]
    run.resume, run.pregate = True, PreGateConfig(lookahead=0)
    run.train = TrainConfig(steps=1, warmup_steps=0, batch_sequences=2, eval_examples=2)
    given = (run, tmp_path, source, task, tokenizer, Recorder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FirstWords, "fingerprint", lambda self, split: "other")
        with pytest.raises(UsageError, match="was trained on examples with other content"):
            train_converted(*given)  # type: ignore[arg-type]
    for before, now, said in (
        ("hub 1", "hub 2", "was trained on examples with other content"),
        (
            "hub 1",
            "files 1",
            "was trained on examples from the hub, while those .* now come from files, .* cannot be compared:",
        ),
        (
            "files 1",
            "generated 1",
            "was trained on examples from files, while those .* now are generated, .* cannot be comp",
        ),
    ):
        with pytest.raises(UsageError, match=rf"{said}.*'allow_changes=\[data\]'"):
            check_data(run, tmp_path, before, now)
        check_data(replace(run, allow_changes=["data"]), tmp_path, before, now)
        check_data(run, tmp_path, now, now)
    assert train_converted(*given).steps == 1  # type: ignore[arg-type]


def test_what_a_model_from_scratch_needs_counts_its_vocabulary(tmp_path: Path) -> None:
    shape = {name: value for name, value in geometry().items() if not name.endswith("_id") and name != "vocab_size"}
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(300)])
    run = Run(model=ModelConfig(geometry=shape), pregate=PreGateConfig(lookahead=0))
    made = SwitchTransformersForConditionalGeneration.from_pretrained(
        get_source(run, tmp_path, FirstWords(), tokenizer, Recorder())
    )
    needs = needs_of(run, *trained_config(run, tokenizer), torch.device("cpu"))
    assert needs.device["weights"] == sum(p.nbytes for p in made.parameters()) > 4 * 300 * made.config.d_model


def test_a_model_from_scratch_ends_and_pads_as_its_tokenizer_does(tmp_path: Path) -> None:
    shape = {name: value for name, value in geometry().items() if not name.endswith("_id") and name != "vocab_size"}
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<fill>"})
    assert min(tokenizer.eos_token_id, tokenizer.pad_token_id) > 1
    config = geometry_config(
        Run(model=ModelConfig(geometry=shape)), PreGating(), vocabulary_size(tokenizer), special_tokens(tokenizer)
    )
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config.decoder_start_token_id == tokenizer.pad_token_id
