"""How a command line becomes a `Run`, and how a command ends: a user's error is one sentence.

Knows Hydra and OmegaConf; knows nothing about torch, models or data. A typo, a wrong type or an impossible combination
is reported within the first second.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pregate.config import Run, UsageError
from pregate.config.groups import config_dir, register_schema
from pregate.overrides import composed, first_line, known_keys, no_setting
from pregate.system.durable import FULL
from pregate.system.launcher_environment import asked
from pregate.system.process_exit import PeerFailedError, end_in_silence, lost_connection, may_tell
from pregate.system.stopping import GOES_ON, stoppable
from pregate.system.submitit_job import do_submitted

ARMS_FROM_REFERENCE = ("shifted", "calibrated", "gates_only")
"""Members of the config group `arm` of which `reference` is the source."""
ARMS_WITH_REFERENCE = (*ARMS_FROM_REFERENCE, "distilled")
"""Those that need one."""


def compose_run(arguments: Sequence[str]) -> Run:
    """Build a `Run` from `configs/` and the `arguments` of a command line, without Hydra's run directory or logging.

    Raises `UsageError` with one sentence for misspelt keys, wrong types, unknown group members or an impossible
    combination.
    """
    return validated(composed(arguments), arguments)


def validated(cfg: Any, overrides: Sequence[str] = ()) -> Run:
    """Turn a composed OmegaConf node into a checked `Run`. Raises `UsageError`."""
    try:
        unknown = next(_unknown_keys(cfg, ""), None)
        if unknown is not None:
            raise UsageError(no_setting(unknown).sentence)
        _check_arm(cfg, overrides)
        OmegaConf.update(cfg, "overrides", list(overrides))
        run = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UsageError(f"{where}{first_line(error)}.") from error
    assert isinstance(run, Run), type(run)
    return run


def _unknown_keys(node: Any, prefix: str) -> Iterator[str]:
    """Keys that `+section.key=…` put beside the schema's own."""
    schema = OmegaConf.get_type(node)
    own = {f.name for f in fields(schema)} if is_dataclass(schema) else None
    for key in node:
        if own is not None and key not in own:
            yield f"{prefix}{key}"
        elif own is not None and OmegaConf.is_dict(node[key]):
            yield from _unknown_keys(node[key], f"{prefix}{key}.")


def _check_arm(cfg: Any, overrides: Sequence[str]) -> None:
    """An arm of the accuracy study changes an experiment, and may need the arm that it is compared with."""
    places = {override.partition("=")[0].lstrip("+"): place for place, override in enumerate(overrides)}
    if "arm" not in places:
        return
    if places["arm"] < places.get("experiment", -1):
        raise UsageError("+arm=… changes settings of the experiment: put it behind +experiment=…, the later one wins.")
    arm = overrides[places["arm"]].partition("=")[2]
    if cfg.reference is None and arm in ARMS_WITH_REFERENCE:
        raise UsageError(
            f"+arm={arm} starts from a fine-tuned conventional model or learns from it: set reference=DIR."
        )
    if arm in ARMS_FROM_REFERENCE and cfg.model.source != cfg.reference:
        raise UsageError(
            f"+arm={arm} starts from reference={cfg.reference}: leave out model.source={cfg.model.source}."
        )


def refuse_ignored(run: Run, command: str, advice: Mapping[str, str]) -> None:
    """Refuse a setting on the command line that `command` would not read, so that the user is told before another model
    is trained or measured than was meant. `advice`: what to write in place of each. Raises `UsageError`."""
    for override in run.overrides:
        name = override.partition("=")[0].lstrip("+")
        if name in advice:
            raise UsageError(f"pregate.{command} does not read {override}: {advice[name]}.")


FULL_ERROR = "HYDRA_FULL_ERROR"
HYDRAS_OWN = ("help", "hydra_help", "cfg", "info", "config_dir", "config_name", "config_path", "package")
"""Options with which composing the settings ahead of Hydra would be needless or wrong."""


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would refuse with several lines. Raises `UsageError`."""
    given, others = get_args_parser().parse_known_intermixed_args(list(arguments))
    for option in (other.partition("=")[0] for other in others if other.startswith("-")):
        name = option.lstrip("-").replace("-", "_")
        setting = name if name in known_keys() else "key"
        raise UsageError(f"There is no option {option}: settings are written without dashes, {setting}=VALUE.")
    if any(getattr(given, option) for option in HYDRAS_OWN):
        return
    if not given.multirun:
        compose_run(given.overrides)
        starts = next((argument for argument in given.overrides if LAUNCHER.match(argument)), None)
        if starts is not None:
            raise UsageError(f"{starts} says where the jobs of a sweep run: add --multirun, or leave it out.")
        return
    variable, size = asked()
    if size > 1:
        raise UsageError(
            f"A sweep runs its jobs one after the other in one process, but {variable}={size} asks for {size}: "
            "start each training by itself, or the sweep without a launcher."
        )
    composed(given.overrides, multirun=True)


LAUNCHER = re.compile(r"\+?(launcher|hydra/launcher)=")


@stoppable()
def entry_point(work: Callable[[Run], None]) -> None:
    """Run `work` under Hydra: compose, validate, execute; a `UsageError` or a full disk ends in one sentence and status
    2, Ctrl-C in status 130 and SIGTERM in 143.

    The arguments are read once ahead of Hydra's own start so that its multi-line errors never reach the user;
    `--help` and the like go straight to Hydra.
    """
    try:
        check_command_line(sys.argv[1:])
    except UsageError as error:
        fail(str(error))
    register_schema()
    sweep = Sweep(work)

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def run_under_hydra(cfg: Any) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweep.run_job(cfg)
        else:
            ending_in_one_sentence(lambda: work(validated(cfg, HydraConfig.get().overrides.task)))

    try:
        with _raising_what_jobs_raise():
            run_under_hydra()
    except UsageError as error:
        fail(str(error))
    finally:
        sweep.name_failed()
    if sweep.failed:
        sys.exit(sweep.status)


@contextmanager
def _raising_what_jobs_raise() -> Iterator[None]:
    """Hydra would print the first failure of jobs in other processes as a traceback, and exit."""
    asked_for = os.environ.get(FULL_ERROR)
    if asked_for is None and {"--multirun", "-m"} & set(sys.argv[1:]):
        os.environ[FULL_ERROR] = "1"
    try:
        yield
    finally:
        if asked_for is None:
            os.environ.pop(FULL_ERROR, None)


def fail(message: str) -> None:
    """Print `message` as the last word of the command, once for all its processes, and exit with status 2."""
    if not may_tell():
        end_in_silence(2)
    print(f"pregate: {message}", file=sys.stderr)
    sys.exit(2)


def ending_in_one_sentence(work: Callable[[], None]) -> None:
    """Do `work`; a user's error, a full disk and another process's failure end the command without a traceback.

    Where several processes run, the first that fails reports the reason, and the others exit silently.
    """
    try:
        work()
    except PeerFailedError:
        end_in_silence(1)
    except Exception as error:
        said = in_one_sentence(error)
        if said is not None:
            if isinstance(error, UsageError) and os.environ.get(FULL_ERROR) == "1":
                raise
            fail(said)
        if not may_tell():
            end_in_silence(1)
        sentence = lost_connection(error)
        if sentence is None:
            raise
        print(f"pregate: {sentence}", file=sys.stderr)
        sys.exit(1)


def in_one_sentence(error: Exception) -> str | None:
    """What a user can do about `error`, or None if that is nothing."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        return f"The disk is too full for {error.filename or 'a file'}: make room, and run the command again; {GOES_ON}"
    return None


@dataclass
class Sweep:
    """The jobs of a sweep. The failure of one is reported and kept, and the others run."""

    work: Callable[[Run], None]
    failed: dict[str, str] = field(default_factory=dict)
    status: int = 2
    """1 as soon as a job fails of something else than the user's settings."""

    def run_job(self, cfg: Any) -> None:
        """One job, in a directory of its own."""
        job = HydraConfig.get()
        place, overrides = job.runtime.output_dir, list(job.overrides.task)
        OmegaConf.update(cfg, "run_dir", place)
        if cfg.output is None:  # evaluations of one checkpoint would overwrite each other's results
            OmegaConf.update(cfg, "output", place)
        name = f"job {job.job.num} ({' '.join(overrides)})"
        if job.launcher["_target_"].endswith(".BasicLauncher"):
            ending_in_one_sentence(lambda: self._try(name, cfg, overrides))
        else:  # in a process of its own, perhaps on another machine
            do_submitted(lambda: self._tell(name, job.sweep.dir, cfg, overrides))

    def _tell(self, name: str, sweep_dir: str, cfg: Any, overrides: Sequence[str]) -> None:
        """Raises `UsageError`, which the command that has started the sweep prints."""
        try:
            self.work(validated(cfg, overrides))
        except PeerFailedError:
            raise
        except Exception as error:
            said = in_one_sentence(error)
            if said is None:
                raise
            said = f"{name} failed: {said.rstrip('.')}. What every job has printed is in {sweep_dir}/.submitit."
            raise UsageError(said) from error

    def _try(self, name: str, cfg: Any, overrides: Sequence[str]) -> None:
        try:
            self.work(validated(cfg, overrides))
        except Exception as error:
            said = in_one_sentence(error)
            if said is None:
                self.status = 1
                traceback.print_exc()
            else:
                print(f"pregate: {name} failed: {said}", file=sys.stderr)
            self.failed[name] = said or f"{type(error).__name__}: {' '.join(str(error).split())}"

    def name_failed(self) -> None:
        if self.failed:
            count = "1 job" if len(self.failed) == 1 else f"{len(self.failed)} jobs"
            print(f"pregate: {count} of the sweep failed:", file=sys.stderr)
            for name, sentence in self.failed.items():
                print(f"pregate: {name}: {sentence}", file=sys.stderr)
