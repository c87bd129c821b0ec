"""The stages of one training command: claim the run directory, get a source, convert it, train it.

Each stage leaves a directory that the next reads, so a resumed run skips what is finished. Knows where things lie
in a run directory; the loop itself is in `loop`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pregate.config import Init, Run, TaskKind, UsageError, save_run, to_dict
from pregate.conversion.calibration import calibrate
from pregate.conversion.write import MANIFEST, check_convertible, convert_for
from pregate.engine.opening import serving_dtype
from pregate.models.checkpoint import CONFIG, SIDE_FILES, WEIGHT_FILES, read_config, side_files
from pregate.models.family import config_of, experts_of, family_named, family_of
from pregate.models.loading import load_resident, mark_conventional, open_model
from pregate.models.pregating import PreGating, settings_chosen
from pregate.system.console import first_of, say
from pregate.system.durable import FULL, make_directory, read_object, write_json
from pregate.system.launch import check_mixed_precision
from pregate.system.machine import set_seed
from pregate.system.memory import PeakMemory
from pregate.system.processes import join, main_only
from pregate.tasks.base import Task
from pregate.tasks.span_corruption import SpanCorruption
from pregate.tracking import Tracker, flatten
from pregate.training.checkpoint import replaced, steps_done, write_model
from pregate.training.distill import check_teacher
from pregate.training.loop import TrainSummary, fine_tune
from pregate.training.optim import autocast_dtype

SOURCE, INITIAL, CONVERTED = "source", "initial", "converted"
CHECKPOINT, LAST, SUMMARY = "checkpoint", "last", "summary.json"
VOCABULARY_MULTIPLE = 64


def claim_run_dir(run: Run) -> Path:
    """The run directory, new or to be resumed, with `config.yaml` in it; what that changes in a resumed run is told.
    Raises `UsageError` if it is in use."""
    run_dir = Path(run.run_dir)
    main_only(lambda: _claim(run, run_dir), "claiming the run directory")
    return run_dir


def _claim(run: Run, run_dir: Path) -> None:
    used = f"{run_dir} holds a run already: continue it with resume=true, or choose another run_dir=DIR."
    if not run.resume and run_dir.is_dir() and any(run_dir.iterdir()):
        raise UsageError(used)
    config = run_dir / "config.yaml"
    try:
        make_directory(run_dir)
        _lock(run_dir)
        if not run.resume and any(run_dir.iterdir()):  # another process was faster, and has ended
            raise UsageError(used)
        changes = _changes(config, run)
        if changes:
            say(f"{config} was written with other settings: {first_of(changes, 8, '; ')}")
        save_run(run, config)
    except OSError as error:
        way = "make room" if error.errno in FULL else "choose another run_dir=DIR"
        raise UsageError(f"{run_dir} cannot be written ({error.strerror}): {way}.") from error


_locked: dict[Path, int] = {}


def _lock(run_dir: Path) -> None:
    """Keep every other process out of `run_dir` until this one ends, however it ends. Raises `UsageError`."""
    place = run_dir.resolve()
    if place in _locked:
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UsageError(
            f"Another process works in {run_dir}: wait for its end, or choose another run_dir=DIR (several processes "
            "of one run are started by a launcher, see the README)."
        ) from error
    except OSError:  # a file system without locks
        os.close(handle)
        return
    _locked[place] = handle


def check_precision(run: Run) -> None:
    """Refuse a mixed precision that a launcher was asked for and training does not use. Raises `UsageError`."""
    device = join().device
    assert device is not None
    for train in (run.train, run.source_train):
        if train is not None:
            check_mixed_precision("no" if autocast_dtype(train.precision, device) is None else "bf16")


def _changes(config: Path, run: Run) -> list[str]:
    """Each setting of `run` that differs from what `config` holds, as "key old, now new"."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        before = flatten(OmegaConf.to_container(OmegaConf.load(config)), separator=".")  # type: ignore[arg-type]
    except (OSError, ValueError, AttributeError, YAMLError, OmegaConfBaseException):  # a new run, or a spoilt file
        return []
    now = flatten(to_dict(run), separator=".")
    shared = [key for key in now if key in before and key not in ("resume", "overrides", "run_dir")]
    return [f"{key} {before[key]}, now {now[key]}" for key in shared if before[key] != now[key]]


def check_model(run: Run) -> None:
    """Refuse, before any work, a model that cannot become what was asked for. Raises `UsageError`."""
    pre_trains = run.task.kind is TaskKind.denoising
    if pre_trains and run.then_eval:
        raise UsageError(f"Task {run.task.name!r} pre-trains and has no answers to evaluate: set then_eval=false.")
    if run.model.source is None:
        if not run.model.geometry or (run.source_train is None and not pre_trains):
            raise UsageError(
                f"model {run.model.name!r} names no source: set model.source=DIR_OR_ID, or choose an experiment that "
                "trains its own."
            )
        geometry_config(run, PreGating.of_config(run.pregate), vocab_size=128)
        return
    source = open_model(run.model.source, run.model.revision)
    config = config_of(source.config)
    if family_of(source.config).is_pregated(source.config):
        config.pregating.refuse_other(
            PreGating.of_config(run.pregate),
            settings_chosen(run) | {"lookahead"},
            run.model.source,
            "set pregate.{name}={has}, or start from the conventional source",
        )
    elif run.pregate.lookahead:
        check_convertible(run.model.source, source.config, run.pregate)
    if config.pad_token_id is None:
        raise UsageError(
            f"The config.json of {run.model.source} names no pad_token_id, which training needs: add the id that its "
            "tokenizer pads with."
        )


def check_teachers(run: Run, tokenizer: Any) -> None:
    """Refuse, before any work, a teacher that cannot teach the model of this run. Raises `UsageError`."""
    for train in (run.train, run.source_train):
        if train is not None and train.teacher is not None:
            if run.model.source is None:
                student = geometry_config(run, PreGating(), vocabulary_size(tokenizer))
            else:
                student = config_of(read_config(run.model.source, run.model.revision))
            check_teacher(train.teacher, student)


def vocabulary_size(tokenizer: Any) -> int:
    """The number of embeddings of a model trained from scratch."""
    return -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def geometry_config(run: Run, gating: PreGating, vocab_size: int) -> Any:
    """The config of a model trained from scratch. Raises `UsageError` for a geometry that cannot be built."""
    family = family_named(run.model.family)
    settings = family.from_scratch(run.model.geometry, vocab_size)
    try:
        # alone first, so that the message names the one of the two that is wrong
        plain = family.config_class(**settings)
        return family.config_class(**settings, pregate=gating.within(family.num_blocks(plain)).to_dict())
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(f"model.geometry of {run.model.name!r} cannot be built: {reason}.") from error


def trained_config(run: Run) -> tuple[Any, torch.dtype]:
    """The config that the run's checkpoint will have, gates ahead included, and the dtype of its experts. Raises
    `UsageError` for a source that cannot be read."""
    source, revision, gating = run.model.source, run.model.revision, PreGating.of_config(run.pregate)
    if source is None:
        return geometry_config(run, gating, vocab_size=128), torch.float32
    opened = open_model(source, revision)
    config, family = config_of(opened.config), family_of(opened.config)
    if not family.is_pregated(opened.config) and gating.lookahead:
        config = family.config(family.pregated_json(opened.config, gating))
    if run.train.steps:
        return config, torch.float32  # in which weights are trained and saved
    return config, serving_dtype(config, opened, experts_of(config).as_found_in(opened.tensors))


def get_source(run: Run, run_dir: Path, task: Task | SpanCorruption, tokenizer: Any, tracker: Tracker) -> str:
    """The conventional checkpoint: `model.source`, one trained from scratch in `run_dir/source`, or, where `train`
    itself starts from scratch, a random one in `run_dir/initial`."""
    if run.model.source is not None:
        return run.model.source
    if run.source_train is None:
        return _get_initial(run, run_dir, tokenizer)
    directory = run_dir / SOURCE
    if read_object(directory / SUMMARY) is None:
        model = _random_model(run, tokenizer)
        summary = fine_tune(
            model, tokenizer, task, run.source_train, run=run, out_dir=directory, tracker=tracker, stage="source"
        )

        def complete() -> None:
            mark_conventional(directory / CHECKPOINT)
            write_json(directory / SUMMARY, summary.to_dict())

        main_only(complete, "finishing the source")
    return str(directory / CHECKPOINT)


def _random_model(run: Run, tokenizer: Any) -> Any:
    set_seed(run.seed)
    config = geometry_config(run, PreGating(), vocabulary_size(tokenizer))
    return family_named(run.model.family).model_class(config)


def _get_initial(run: Run, run_dir: Path, tokenizer: Any) -> str:
    directory = run_dir / INITIAL

    def create() -> None:
        if directory.is_dir():
            return
        with replaced(directory) as fresh:
            write_model(fresh, _random_model(run, tokenizer), tokenizer)
            mark_conventional(fresh)

    main_only(create, "making a random source")
    return str(directory)


def get_converted(run: Run, run_dir: Path, source: str, task: Task | SpanCorruption, tokenizer: Any) -> str:
    """The checkpoint to fine-tune: the source itself if nothing moves or it is pre-gated already, else converted.

    Gates are calibrated on the run's training examples, by one process.
    """
    config = read_config(source, run.model.revision)
    if run.pregate.lookahead == 0 or family_of(config).is_pregated(config):
        return source
    directory = run_dir / CONVERTED

    def create() -> None:
        if (directory / MANIFEST).is_file():
            _refuse_other_gating(run, directory)
        elif run.pregate.init is Init.calibrated:
            assert not isinstance(task, SpanCorruption), "pre-training starts at random"
            _, calibration = calibrate(run, source, directory, task, tokenizer, join().device)
            print(calibration.table(), flush=True)
        else:
            convert_for(run, source, directory)

    main_only(create, "converting the source")
    return str(directory)


def _refuse_other_gating(run: Run, converted: Path) -> None:
    """Raises `UsageError` if an interrupted run converted its source with other settings than the resumed one has."""
    stored = PreGating.from_dict(read_config(str(converted))["pregate"])
    if stored.differences(PreGating.of_config(run.pregate)):
        raise UsageError(
            f"{converted} was converted with other pregate settings (lookahead {stored.lookahead}, entry "
            f"{stored.entry}, init {stored.init}): resume with those, or choose another run_dir=DIR."
        )
    calibration = json.loads((converted / MANIFEST).read_text()).get("calibration")
    if calibration is not None and calibration["settings"] != asdict(run.calibration):
        raise UsageError(
            f"{converted} was calibrated with other settings ({calibration['settings']}): resume with those, or choose "
            "another run_dir=DIR."
        )


def train_converted(
    run: Run, run_dir: Path, converted: str, task: Task | SpanCorruption, tokenizer: Any, tracker: Tracker
) -> TrainSummary:
    """Fine-tune into `run_dir/checkpoint`; a conventional model is saved as an ordinary upstream checkpoint.

    With `train.steps=0` the converted model itself goes there.
    """
    revision = run.model.revision if converted == run.model.source else None
    if run.train.steps == 0:
        summary = keep_untrained(converted, revision, run_dir, tokenizer)
    else:
        summary = _fine_tune_converted(run, run_dir, converted, revision, task, tokenizer, tracker)

    def complete() -> None:
        if "pregate" in read_config(summary.checkpoint) and run.pregate.lookahead == 0:
            mark_conventional(Path(summary.checkpoint))

    main_only(complete, "finishing the checkpoint")
    return summary


def _fine_tune_converted(
    run: Run,
    run_dir: Path,
    converted: str,
    revision: str | None,
    task: Task | SpanCorruption,
    tokenizer: Any,
    tracker: Tracker,
) -> TrainSummary:
    set_seed(run.seed)
    state = join()
    manifest = Path(converted) / MANIFEST
    assert state.device is not None
    done = steps_done(run_dir / LAST) if run.resume else 0
    with PeakMemory(state.device) as peak:
        summary = fine_tune(
            load_resident(converted, revision, dtype=torch.float32),
            tokenizer,
            task,
            run.train,
            run=run,
            out_dir=run_dir,
            tracker=tracker,
            stage="train",
            carry=[manifest] if manifest.is_file() else [],
        )
    if summary.steps > done:  # else nothing was trained here, and the figure would be that of loading
        summary = replace(summary, peak_device_bytes=peak.num_bytes)
    return summary


def keep_untrained(converted: str, revision: str | None, run_dir: Path, tokenizer: Any) -> TrainSummary:
    """Copy a converted (or a source) checkpoint to `run_dir/checkpoint`, file by file; the summary of no training.

    Raises `UsageError` if `run_dir` holds a run that has been trained.
    """
    done = steps_done(run_dir / LAST)
    if done:
        raise UsageError(
            f"{run_dir} holds a run of {done} steps, which train.steps=0 would replace: choose another run_dir=DIR."
        )
    directory = run_dir / CHECKPOINT

    def copy() -> None:
        with replaced(directory) as fresh:
            _copy_model(converted, revision, fresh)
            tokenizer.save_pretrained(fresh)

    main_only(copy, "copying the checkpoint")
    return TrainSummary(
        steps=0,
        best_score=None,
        best_step=None,
        metrics={},
        seconds=0.0,
        target_tokens=0,
        checkpoint=str(directory),
        checkpoint_step=0,
    )


def _copy_model(source: str, revision: str | None, directory: Path) -> None:
    """The files of a checkpoint, into `directory`; written anew where only this package reads their names right."""
    opened = open_model(source, revision)
    files = set(side_files(source, revision, (CONFIG, *SIDE_FILES, MANIFEST)))
    renamed = any(info.key != name for name, info in opened.tensors.items())
    if not renamed:
        # their only file, or the index by which several are found
        weights = next(path for name in WEIGHT_FILES if (path := opened.directory / name).is_file())
        files |= {*opened.files, weights}
    for path in files:
        shutil.copy2(path, directory / path.name)
    # the code that auto_map points to is not copied
    config = {name: value for name, value in opened.config.items() if name != "auto_map"}
    if config != read_config(source, revision):
        write_json(directory / CONFIG, config)
    if renamed:
        load_resident(source, revision).save_pretrained(directory)


def finish(run: Run, run_dir: Path, source: str, trained: TrainSummary, evaluation: dict[str, Any] | None) -> None:
    """Write `summary.json`, and drop the untrained checkpoints that the trained one replaces."""
    if not join().is_main_process:
        return
    scratch = source == str(run_dir / INITIAL)
    summary: dict[str, Any] = {"name": run.name, "source": None if scratch else source, "train": trained.to_dict()}
    trained_source = read_object(run_dir / SOURCE / SUMMARY)
    if trained_source is not None:
        summary["source_train"] = trained_source
    if evaluation is not None:
        summary |= {key: evaluation[key] for key in ("scores", "parity", "engine", "environment") if key in evaluation}
    write_json(run_dir / SUMMARY, summary)
    for untrained in (INITIAL, CONVERTED):
        shutil.rmtree(run_dir / untrained, ignore_errors=True)
