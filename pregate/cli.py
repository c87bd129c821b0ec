"""How a command line becomes a `Run`, and a user's error one sentence.

Knows Hydra and OmegaConf; knows nothing about torch, models or data, so that a typo, a wrong type or an impossible
combination is told within the first second.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pregate.config import Run, UsageError
from pregate.overrides import (
    check_arguments,
    config_dir,
    first_line,
    in_optional_section,
    known_keys,
    no_setting,
    parsed,
)
from pregate.system.durable import FULL
from pregate.system.launch import asked
from pregate.system.peers import PeerFailedError, end_in_silence, lost_connection, may_tell
from pregate.system.stopping import GOES_ON, stoppable


def register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run_schema", node=Run)


def compose_run(arguments: list[str]) -> Run:
    """Build a `Run` from `configs/` and the `arguments` of a command line, without Hydra's run directory or logging.

    Raises `UsageError` with one sentence for misspelt keys, wrong types, unknown group members or an impossible
    combination.
    """
    check_arguments(arguments)
    return validated(_composed(arguments), arguments)


def _composed(arguments: Sequence[str]) -> Any:
    """Hydra's config for `arguments`. Raises `UsageError`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):

        def attempt(given: Sequence[str]) -> Any:
            return compose("config", overrides=list(given))

        try:
            return attempt(arguments)
        except Exception as error:
            raise UsageError(explain(error, arguments, attempt)) from error


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


ARMS_FROM_REFERENCE = ("shifted", "calibrated", "gates_only")
"""Members of the config group `arm` of which `reference` is the source."""
ARMS_WITH_REFERENCE = (*ARMS_FROM_REFERENCE, "distilled")
"""Those that need one."""


def _check_arm(run: Any, overrides: Sequence[str]) -> None:
    """An arm of the accuracy study changes an experiment, and may need the arm that it is compared with."""
    places = {override.partition("=")[0].lstrip("+"): place for place, override in enumerate(overrides)}
    if "arm" not in places:
        return
    if places["arm"] < places.get("experiment", -1):
        raise UsageError("+arm=… changes settings of the experiment: put it behind +experiment=…, the later one wins.")
    arm = overrides[places["arm"]].partition("=")[2]
    if run.reference is None and arm in ARMS_WITH_REFERENCE:
        raise UsageError(
            f"+arm={arm} starts from a fine-tuned conventional model or learns from it: set reference=DIR."
        )
    if arm in ARMS_FROM_REFERENCE and run.model.source != run.reference:
        raise UsageError(
            f"+arm={arm} starts from reference={run.reference}: leave out model.source={run.model.source}."
        )


def _unknown_keys(node: Any, prefix: str) -> Iterator[str]:
    """Keys that `+section.key=…` put beside the schema's own."""
    schema = OmegaConf.get_type(node)
    own = {f.name for f in fields(schema)} if is_dataclass(schema) else None
    for key in node:
        if own is not None and key not in own:
            yield f"{prefix}{key}"
        elif own is not None and OmegaConf.is_dict(node[key]):
            yield from _unknown_keys(node[key], f"{prefix}{key}.")


def explain(error: BaseException, arguments: Sequence[str], attempt: Callable[[Sequence[str]], Any]) -> str:
    """One sentence for whatever Hydra or OmegaConf raised over `arguments` that are each right by themselves.

    `attempt` composes; the arguments to blame are found by leaving some out.
    """
    clauses = list(_homeless(arguments, attempt))
    if clauses:
        return "; ".join(clauses) + "."
    blamed = [argument for argument in arguments if _works(attempt, [a for a in arguments if a is not argument])]
    return f"{' '.join(blamed or arguments)} cannot be used here: {first_line(error)}."


def _homeless(arguments: Sequence[str], attempt: Callable[[Sequence[str]], Any]) -> Iterator[str]:
    """What to do about settings of a section that is empty here, or that a section does not hold yet."""
    nested = {a: key for a in arguments if (key := _key(a)) and (in_optional_section(key) or key not in known_keys())}
    try:
        base = attempt([a for a in arguments if a not in nested])
    except Exception:
        return
    for argument, key in nested.items():
        section = key.rpartition(".")[0]
        if OmegaConf.select(base, section) is None:
            yield (
                f"{argument} sets a part of {section}, which is empty here: choose an experiment or a group member "
                f"that fills it, such as {FILLED_BY.get(section, '+experiment=quickstart')}"
            )
        elif key not in known_keys():
            plain, there = argument.lstrip("+"), _holds(base, section, key)
            if there == (plain != argument):
                yield f"{argument} {'takes no plus' if there else 'needs a plus'}: write " + shlex.quote(
                    plain if there else f"+{plain}"
                )


def _holds(config: Any, section: str, key: str) -> bool:
    return key.rpartition(".")[2] in OmegaConf.select(config, section)


FILLED_BY = {"source_train": "+experiment=quickstart", "task.generated": "task=generated"}


def _key(argument: str) -> str | None:
    override = parsed(argument)
    if override is None or override.package is not None or override.is_hydra_override():
        return None
    return override.key_or_group if "." in override.key_or_group else None


def _works(attempt: Callable[[Sequence[str]], Any], arguments: Sequence[str]) -> bool:
    try:
        attempt(arguments)
    except Exception:
        return False
    return True


def fail(message: str) -> None:
    """Print `message` as the last word of the command, once for all its processes, and exit with status 2."""
    if not may_tell():
        end_in_silence(2)
    print(f"pregate: {message}", file=sys.stderr)
    sys.exit(2)


MULTIRUN_FLAGS = ("--multirun", "-m")
# flags with which composing the plain arguments ahead of Hydra would be needless or wrong
HYDRA_FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", *MULTIRUN_FLAGS),
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"),
)
OTHER_FLAGS = ("--run", "-r", "--resolve", "--shell-completion", "-sc", "--experimental-rerun")


def check_command_line(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would refuse in lines of its own. Raises `UsageError`."""
    flags = [argument.split("=")[0] for argument in arguments if argument.startswith("-")]
    for flag in flags:
        if not any(flag == known or (len(flag) > 2 and known.startswith(flag)) for known in HYDRA_FLAGS + OTHER_FLAGS):
            name = flag.lstrip("-").replace("-", "_")
            setting = name if name in known_keys() else "key"
            raise UsageError(f"There is no option {flag}: settings are written without dashes, {setting}=VALUE.")
    settings = [argument for argument in arguments if not argument.startswith("-")]
    if set(flags) <= {*MULTIRUN_FLAGS} and flags:
        variable, size = asked()
        if size > 1:
            raise UsageError(
                f"A sweep runs its jobs one after the other in one process, but {variable}={size} asks for {size}: "
                "start each training by itself, or the sweep without a launcher."
            )
        _composed(check_arguments(settings, multirun=True))
    elif not any(flag in HYDRA_FLAGS for flag in flags):
        compose_run(settings)


@stoppable()
def entry_point(work: Callable[[Run], None]) -> None:
    """Run `work` under Hydra: compose, validate, execute; a `UsageError` or a full disk ends in one sentence and status
    2, Ctrl-C in status 130 and SIGTERM in 143.

    The plain case is composed once ahead of Hydra's own start so that its multi-line errors never reach the
    user; `--multirun`, `--help` and the like go straight to Hydra.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        check_command_line(sys.argv[1:])
    except UsageError as error:
        fail(str(error))
    register_schema()

    failed: list[Failure] = []

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def run_under_hydra(cfg: Any) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _run_job(work, cfg, failed)
        else:
            ending_in_one_sentence(lambda: work(validated(cfg, HydraConfig.get().overrides.task)))

    try:
        run_under_hydra()
    except KeyboardInterrupt:
        _name_failed(failed)
        raise
    if failed:
        _tell_failed(failed)


@dataclass(frozen=True)
class Failure:
    """A job of a sweep that failed."""

    job: str
    sentence: str
    status: int


def ending_in_one_sentence(work: Callable[[], None]) -> None:
    """Do `work`; a user's error, a full disk and another process's failure end the command without a traceback.

    Where several processes run, the first that fails tells why, and the others end in silence.
    """
    try:
        work()
    except PeerFailedError:
        end_in_silence(1)
    except Exception as error:
        said = in_one_sentence(error)
        if said is not None:
            if isinstance(error, UsageError) and os.environ.get("HYDRA_FULL_ERROR") == "1":
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


def _run_job(work: Callable[[Run], None], cfg: Any, failed: list[Failure]) -> None:
    """One job of a sweep, in a directory of its own. What it fails of is told and noted, so that the others run."""
    from hydra.core.hydra_config import HydraConfig

    place = HydraConfig.get().runtime.output_dir
    OmegaConf.update(cfg, "run_dir", place)
    if cfg.output is None:  # evaluations of one checkpoint would overwrite each other's results
        OmegaConf.update(cfg, "output", place)
    overrides = list(HydraConfig.get().overrides.task)
    if not HydraConfig.get().launcher["_target_"].endswith(".BasicLauncher"):  # a job in a process of its own
        work(validated(cfg, overrides))
        return

    def job() -> None:
        name = f"job {HydraConfig.get().job.num} ({' '.join(overrides)})"
        try:
            work(validated(cfg, overrides))
        except Exception as error:
            said = in_one_sentence(error)
            if said is None:
                failed.append(Failure(name, f"{type(error).__name__}: {' '.join(str(error).split())}", 1))
                traceback.print_exc()
            else:
                failed.append(Failure(name, said, 2))
                print(f"pregate: {name} failed: {said}", file=sys.stderr)

    ending_in_one_sentence(job)


def _tell_failed(failed: Sequence[Failure]) -> None:
    """The last words of a sweep of which jobs failed. Exits with 2 if the user's settings are the reason for all."""
    _name_failed(failed)
    sys.exit(max(failed, key=lambda failure: failure.status == 1).status)


def _name_failed(failed: Sequence[Failure]) -> None:
    if failed:
        count = "1 job" if len(failed) == 1 else f"{len(failed)} jobs"
        print(f"pregate: {count} of the sweep failed:", file=sys.stderr)
        for failure in failed:
            print(f"pregate: {failure.job}: {failure.sentence}", file=sys.stderr)
