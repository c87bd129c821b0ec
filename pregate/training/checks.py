"""What is refused before any work: a model, a teacher or a precision that cannot become what was asked for.

Knows configs and headers of checkpoints; reads no weights.
"""

from __future__ import annotations

from typing import Any

import torch

from pregate.config import PRE_TRAINING, DistillData, Experts, Learn, Run, TaskKind, Trainable, UsageError
from pregate.config.task import OWN_TEMPLATE
from pregate.conversion.pregated_config import target_of
from pregate.engine.opening import serving_dtype
from pregate.models.checkpoint import read_config
from pregate.models.family import Family, config_of, experts_of, family_named, family_of
from pregate.models.loading import open_model
from pregate.models.pregating import PreGating, settings_chosen
from pregate.system.console import say
from pregate.system.launcher_environment import check_mixed_precision
from pregate.system.machine import fast_dtype
from pregate.system.process_group import join
from pregate.tasks.tokens import Collator
from pregate.training.distill import check_routing_loss, check_teacher
from pregate.training.from_scratch import geometry_config, vocabulary_size
from pregate.training.lora import check_installed, targets_of
from pregate.training.optimizer_and_schedule import autocast_dtype, check_8bit


def check_precision(run: Run) -> None:
    """Refuse a mixed precision that a launcher was asked for and training does not use, and tell of one that makes
    training slow on this CPU. Raises `UsageError`."""
    device = join().device
    assert device is not None
    for section, train in (("train", run.train), ("source_train", run.source_train)):
        if train is None:
            continue
        dtype = autocast_dtype(train.precision, device)
        check_mixed_precision("no" if dtype is None else "bf16")
        if dtype is not None and fast_dtype(dtype, device) != dtype:
            say(
                f"{section}.precision=bf16: this CPU has no instructions for bfloat16 and multiplies several times "
                f"faster in float32: {section}.precision=fp32 is the faster choice here."
            )


def check_model(run: Run) -> None:
    """Refuse, before any work, a model that cannot become what was asked for. Raises `UsageError`."""
    pre_trains = run.task.kind in PRE_TRAINING
    if pre_trains and run.then_eval:
        raise UsageError(f"Task {run.task.name!r} pre-trains and has no answers to evaluate: set then_eval=false.")
    if run.model.source is None:
        if not run.model.geometry or (run.source_train is None and not pre_trains):
            raise UsageError(
                f"model {run.model.name!r} names no source: set model.source=DIR_OR_ID, or choose an experiment that "
                "trains its own."
            )
        geometry_config(run, PreGating.of_config(run.pregate), vocab_size=128)
        check_objective(run, family_named(run.model.family))
        return
    source = open_model(run.model.source, run.model.revision)
    config = config_of(source.config)
    check_objective(run, family_of(source.config))
    if family_of(source.config).is_pregated(source.config):
        config.pregating.refuse_other(
            PreGating.of_config(run.pregate).naming(family_of(source.config).stacks),
            settings_chosen(run) | {"lookahead"},
            run.model.source,
            "set pregate.{name}={has}, or start from the conventional source",
        )
    elif run.pregate.lookahead:
        target_of(run.model.source, source.config, run.pregate)
    # a decoder of its own reads padding where nothing is learnt
    if config.pad_token_id is None and family_of(source.config).objective.closes_sources:
        raise UsageError(
            f"The config.json of {run.model.source} names no pad_token_id, which training needs: add the id that its "
            "tokenizer pads with."
        )


def check_objective(run: Run, family: Family) -> None:
    """Refuse what models of `family` cannot learn. Raises `UsageError`."""
    kind, objective, task = run.task.kind, family.objective, run.task
    model = f"a {family.source_type} model"
    if kind is TaskKind.denoising and not objective.closes_sources:
        raise UsageError(
            f"Task {task.name!r} has sources and targets apart, but {model} is decoder-only: "
            "choose task=language_modelling."
        )
    trains = [train for train in (run.train, run.source_train) if train is not None]
    if kind in PRE_TRAINING and any(train.distill_data is not DistillData.task for train in trains):
        raise UsageError(f"Task {task.name!r} has no prompts that a teacher could answer: leave out distill_data.")
    packing = any(train.packing for train in trains)
    if objective.closes_sources:
        asked = {
            "task.kind=language_modelling": kind is TaskKind.language_modelling,
            "task.kind=chat": kind is TaskKind.chat,
            f"task.chat_template={task.chat_template}": task.chat_template not in (None, OWN_TEMPLATE),
            f"task.learn={task.learn}": task.learn is not Learn.answers,
            "train.packing=true": packing,
        }
        for setting, is_asked in asked.items():
            if is_asked:
                raise UsageError(f"{setting} is for decoder-only models, and {model} is none: leave it out.")
    elif not objective.packs and (packing or kind is TaskKind.language_modelling):
        what = "train.packing=true" if packing else f"task {task.name!r}"
        raise UsageError(
            f"{what} puts several texts in one row, and the layers of {model} would carry a state from one to the "
            f"next: {'leave it out' if packing else 'choose another task'}."
        )


def check_memory_savers(run: Run, config: Any) -> None:
    """Refuse, before any work, adapters and an optimizer whose packages are missing, and adapters that the model has no
    place for. `config`: that which the trained checkpoint will have. Raises `UsageError`."""
    trains = [train for train in (run.train, run.source_train) if train is not None]
    for train in trains:
        check_8bit(train)
    adapted = [train.lora for train in trains if train.trainable is Trainable.lora]
    if adapted:
        check_installed()
        with torch.device("meta"):
            model = family_named(config.model_type).model_class(config)
        for lora in adapted:
            targets_of(model, lora)


def check_inputs(run: Run, tokenizer: Any) -> None:
    """Refuse, before any work, limits and a chat template with which no input can be made. Raises `UsageError`."""
    if run.task.kind not in PRE_TRAINING:
        source, revision = run.model.source, run.model.revision
        family = family_named(run.model.family) if source is None else family_of(read_config(source, revision))
        Collator.for_task(run.task, tokenizer, family.objective)


def check_teachers(run: Run, tokenizer: Any) -> None:
    """Refuse, before any work, a teacher that cannot teach the model of this run. Raises `UsageError`."""
    for train in (run.train, run.source_train):
        if train is not None and train.teacher is not None:
            if run.model.source is None:
                student = geometry_config(run, PreGating(), vocabulary_size(tokenizer))
            else:
                student = config_of(read_config(run.model.source, run.model.revision))
            check_teacher(train.teacher, student)
            if run.model.revision is not None and train.teacher == run.model.source:
                raise UsageError(
                    f"model.revision={run.model.revision} is of the source, and train.teacher={train.teacher} would be "
                    "its newest version: download the revision, and set model.source and train.teacher to its "
                    "directory."
                )
            check_routing_loss(train, family_named(student.model_type))


def trained_config(run: Run, tokenizer: Any = None) -> tuple[Any, torch.dtype]:
    """The config that the run's checkpoint will have, gates ahead included, and the dtype of its experts. Without the
    `tokenizer` the vocabulary of a model from scratch is a small one. Raises `UsageError` for a source that cannot be
    read."""
    source, revision, gating = run.model.source, run.model.revision, PreGating.of_config(run.pregate)
    if source is None:
        return geometry_config(run, gating, 128 if tokenizer is None else vocabulary_size(tokenizer)), torch.float32
    opened = open_model(source, revision)
    config, family = config_of(opened.config), family_of(opened.config)
    if not family.is_pregated(opened.config) and gating.lookahead:
        config = family.config(family.pregated_json(opened.config, gating))
    if run.train.steps and run.train.experts is Experts.resident:
        return config, torch.float32  # in which weights are trained and saved
    return config, serving_dtype(config, opened, experts_of(config).as_found_in(opened.tensors))
