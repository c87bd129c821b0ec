"""The stages of one training command: get a source, convert it, train it, and say what came of it.

Each stage leaves a directory that the next reads, so a resumed run skips what is finished. Knows which directory of a
run holds what; the loop itself is in `loop`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pregate.config import CalibrationConfig, Experts, Init, Run, UsageError
from pregate.conversion.calibrate.flow import calibrate
from pregate.conversion.manifest import MANIFEST
from pregate.conversion.write import convert_for
from pregate.models.checkpoint import CONFIG, WEIGHT_FILES, read_config
from pregate.models.family import family_named, family_of
from pregate.models.loading import load_resident, mark_conventional, open_model, unfilled
from pregate.models.pregating import SETTINGS, PreGating
from pregate.models.side_files import SIDE_FILES, side_files
from pregate.system.console import first_of
from pregate.system.durable import discard, read_object, write_json
from pregate.system.machine import set_seed
from pregate.system.memory import PeakMemory
from pregate.system.process_group import join, main_only
from pregate.tasks.base import Task
from pregate.tasks.text_stream import TextStream
from pregate.tracking import Tracker
from pregate.training.durable_directories import replaced, write_model
from pregate.training.from_scratch import geometry_config, special_tokens, vocabulary_size
from pregate.training.loop import TrainSummary, fine_tune
from pregate.training.offloaded import Offloaded, complete, hand_on_pack, open_offloaded
from pregate.training.run_dir_lock import CHECKPOINT, CONVERTED, INITIAL, LAST, SOURCE, SUMMARY
from pregate.training.same_source import check_converted, check_experts
from pregate.training.saved_state import steps_done
from pregate.training.session import prepare
from pregate.training.sharded_saved_state import Weights
from pregate.training.sharding import splits


def get_source(run: Run, run_dir: Path, task: Task | TextStream, tokenizer: Any, tracker: Tracker) -> str:
    """The conventional checkpoint: `model.source`, one trained from scratch in `run_dir/source`, or, where `train`
    itself starts from scratch, a random one in `run_dir/initial`."""
    if run.model.source is not None:
        return run.model.source
    if run.source_train is None:
        return _get_initial(run, run_dir, tokenizer)
    directory = run_dir / SOURCE
    if read_object(directory / SUMMARY) is None:
        model = _random_model(run, tokenizer)
        session = prepare(
            model, tokenizer, task, run.source_train, run=run, out_dir=directory, tracker=tracker, stage="source"
        )
        summary = fine_tune(session)

        def complete() -> None:
            mark_conventional(directory / CHECKPOINT)
            write_json(directory / SUMMARY, asdict(summary))

        main_only(complete, "finishing the source")
    return str(directory / CHECKPOINT)


def _random_model(run: Run, tokenizer: Any) -> Any:
    set_seed(run.seed)
    config = geometry_config(run, PreGating(), vocabulary_size(tokenizer), special_tokens(tokenizer))
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


def get_converted(run: Run, run_dir: Path, source: str, task: Task | TextStream, tokenizer: Any) -> str:
    """The checkpoint to fine-tune: the source itself if nothing moves or it is pre-gated already, else converted.

    Gates are calibrated on the run's training examples, by one process. Raises `UsageError` where a resumed run would
    mix what it made of the source with a source that has changed.
    """
    config = read_config(source, run.model.revision)
    if run.train.experts is Experts.offloaded and run.train.steps:
        check_experts(run, run_dir, open_model(source, run.model.revision), begun=steps_done(run_dir / LAST) > 0)
    if run.pregate.lookahead == 0 or family_of(config).is_pregated(config):
        return source
    directory = run_dir / CONVERTED

    def create() -> None:
        if (directory / MANIFEST).is_file():
            _refuse_other_gating(run, directory)
            check_converted(run, source, directory)
        elif run.pregate.init is Init.calibrated:
            assert not isinstance(task, TextStream), "pre-training starts at random"
            _, calibration = calibrate(run, source, directory, task, tokenizer, join().device)
            print(calibration.table(), flush=True)
        else:
            convert_for(run, source, directory)

    main_only(create, "converting the source")
    return str(directory)


def _refuse_other_gating(run: Run, converted: Path) -> None:
    """Raises `UsageError` if an interrupted run converted its source with other settings than the resumed one has."""
    config = read_config(str(converted))
    stored = PreGating.from_dict(config["pregate"])
    if stored.differences(PreGating.of_config(run.pregate).naming(family_of(config).stacks)):
        said = ", ".join(f"{name} {getattr(stored, name)}" for name in SETTINGS if name != "stacks")
        raise UsageError(
            f"{converted} was converted with other pregate settings ({said}): resume with those, or choose another "
            "run_dir=DIR."
        )
    calibration = json.loads((converted / MANIFEST).read_text()).get("calibration")
    if calibration is None:
        return
    # a manifest made before a setting existed was made with what is its default now
    before, now = asdict(CalibrationConfig()) | calibration["settings"], asdict(run.calibration)
    other = [f"calibration.{name}={value}" for name, value in before.items() if now.get(name) != value]
    if other:
        raise UsageError(
            f"{converted} was calibrated with other settings ({first_of(other, 8)}): resume with those, or choose "
            "another run_dir=DIR."
        )


def train_converted(
    run: Run, run_dir: Path, converted: str, task: Task | TextStream, tokenizer: Any, tracker: Tracker
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
    task: Task | TextStream,
    tokenizer: Any,
    tracker: Tracker,
) -> TrainSummary:
    set_seed(run.seed)
    state = join()
    manifest = Path(converted) / MANIFEST
    assert state.device is not None
    done = steps_done(run_dir / LAST) if run.resume else 0
    carry = [manifest] if manifest.is_file() else []

    def tuned(model: Any, weights: Weights | None = None, offloaded: Offloaded | None = None) -> TrainSummary:
        session = prepare(
            model,
            tokenizer,
            task,
            run.train,
            run=run,
            out_dir=run_dir,
            tracker=tracker,
            stage="train",
            carry=carry,
            weights=weights,
            offloaded=offloaded,
        )
        return fine_tune(session)

    with PeakMemory(state.device) as peak:
        if run.train.experts is Experts.offloaded:
            with open_offloaded(run, open_model(converted, revision), state.device) as offloaded:
                summary = tuned(offloaded.model, offloaded=offloaded)
        elif splits(run.train.sharding, state.num_processes):
            summary = tuned(unfilled(converted, revision), Weights(converted, revision))
        else:
            summary = tuned(load_resident(converted, revision, dtype=torch.float32))
    if run.train.experts is Experts.offloaded:
        complete(run_dir, open_model(converted, revision), tokenizer, carry)
        if Path(converted) == run_dir / CONVERTED:
            hand_on_pack(run, Path(converted), run_dir / CHECKPOINT)
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
    return TrainSummary(steps=0, checkpoint=str(directory), checkpoint_step=0)


def _copy_model(source: str, revision: str | None, directory: Path) -> None:
    """The files of a checkpoint, into `directory`; written anew where only this package reads their names right."""
    opened = open_model(source, revision)
    files = set(side_files(source, revision, (CONFIG, *SIDE_FILES, MANIFEST)))
    renamed = any(info.key != name or info.encoding for name, info in opened.tensors.items())
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
    """Write `summary.json`, and drop the untrained checkpoints that the trained one replaces. The main process calls
    it alone."""
    scratch = source == str(run_dir / INITIAL)
    summary: dict[str, Any] = {"name": run.name, "source": None if scratch else source, "train": asdict(trained)}
    trained_source = read_object(run_dir / SOURCE / SUMMARY)
    if trained_source is not None:
        summary["source_train"] = trained_source
    if evaluation is not None:
        summary |= {key: evaluation[key] for key in ("scores", "parity", "engine", "environment") if key in evaluation}
    write_json(run_dir / SUMMARY, summary)
    for untrained in (INITIAL, CONVERTED):
        discard(run_dir / untrained)
