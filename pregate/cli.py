"""How a command line becomes a `Run`, and a user's error one sentence.

Knows Hydra and OmegaConf; knows nothing about torch, models or data, so that a typo, a wrong type or an impossible
combination is told within the first second.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pregate.config import GeneratedConfig, Run, TaskConfig, TrainConfig, UsageError
from pregate.config_check import check_run
from pregate.durable import FULL
from pregate.stopping import GOES_ON, stoppable


def config_dir() -> Path:
    """The directory of the YAML groups: inside the installed package, or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "configs", here.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UsageError("pregate finds no configs/ directory: reinstall the package.")


def register_schema() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="run_schema", node=Run)


def compose_run(overrides: list[str]) -> Run:
    """Build a `Run` from `configs/` and command-line `overrides`, without Hydra's run directory or logging.

    Raises `UsageError` with one sentence for a misspelt key, a wrong type, an unknown group member or an
    impossible combination.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            cfg = compose("config", overrides=overrides)
            return validated(cfg, overrides)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(explain(error, overrides)) from error


def validated(cfg: Any, overrides: Sequence[str] = ()) -> Run:
    """Turn a composed OmegaConf node into a checked `Run`. Raises `UsageError`."""
    unknown = next(_unknown_keys(cfg, ""), None)
    if unknown is not None:
        raise UsageError(f"There is no setting {unknown!r}{_closest(unknown, _known_keys())}")
    OmegaConf.update(cfg, "overrides", list(overrides))
    run = OmegaConf.to_object(cfg)
    assert isinstance(run, Run), type(run)
    _check_arm(run, overrides)
    check_run(run)
    return run


ARMS_FROM_REFERENCE = ("shifted", "calibrated", "gates_only")
"""Members of the config group `arm` of which `reference` is the source."""
ARMS_WITH_REFERENCE = (*ARMS_FROM_REFERENCE, "distilled")
"""Those that need one."""


def _check_arm(run: Run, overrides: Sequence[str]) -> None:
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


def _known_keys() -> list[str]:
    flat: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            flat.append(f"{prefix}{key}")
            child = OmegaConf.select(node, key) if not OmegaConf.is_missing(node, key) else None
            if OmegaConf.is_dict(child):
                walk(child, f"{prefix}{key}.")

    schema = OmegaConf.structured(Run(source_train=TrainConfig(), task=TaskConfig(generated=GeneratedConfig())))
    walk(schema, "")
    return flat


def _closest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ": --cfg job shows them all."


def explain(error: BaseException, overrides: list[str]) -> str:
    """One sentence for whatever Hydra or OmegaConf raised, naming the key and the nearest right spelling."""
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException):
        text = " ".join(str(error).split())
        found = re.search(r"Could not find '([^']+)'", text)
        group, _, wanted = (found.group(1) if found else "").rpartition("/")
        folder = config_dir() / group
        names = sorted(p.stem for p in folder.glob("*.yaml")) if group and folder.is_dir() else []
        if names:
            return f"There is no {group} named {wanted!r}: choose one of {', '.join(names)}."
        groups = sorted(p.name for p in config_dir().iterdir() if p.is_dir())
        return f"There is no config {wanted!r}: the groups are {', '.join(groups)}."
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = " ".join(str(error).split())
    missing = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' (?:is )?not in", text)
    full_key = getattr(cause, "full_key", None)
    if "not in" in text or "Could not override" in text or "not found" in text.lower():
        key = missing.group(1) if missing else str(full_key)
        key = key.lstrip("+")
        return f"There is no setting {key!r}{_closest(key, _known_keys())}"
    if "Unexpected type for root: NoneType" in text:
        return (
            f"One of {', '.join(overrides)} sets a part of a section that is empty here: choose an experiment or a "
            "group member that fills it, such as +experiment=quickstart for source_train."
        )
    if cause is not None:
        reason = re.split(r"\s*full_key:", " ".join(str(cause).split()))[0]
        where = f"{full_key}: " if full_key else ""
        return f"{where}{reason.rstrip('.')}."
    return f"The command line {' '.join(overrides)!r} cannot be read: {text}"


def fail(message: str) -> None:
    """Print `message` as the last word of the command and exit with status 2."""
    print(f"pregate: {message}", file=sys.stderr)
    sys.exit(2)


# flags with which composing the plain arguments ahead of Hydra would be needless or wrong
HYDRA_FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--multirun", "-m"),
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"),
)


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
        arguments = sys.argv[1:]
        if not any(a.split("=")[0] in HYDRA_FLAGS for a in arguments):
            compose_run([a for a in arguments if not a.startswith("-")])
    except UsageError as error:
        fail(str(error))
    register_schema()

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
    def run_under_hydra(cfg: Any) -> None:
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                place = HydraConfig.get().runtime.output_dir
                OmegaConf.update(cfg, "run_dir", place)
                if cfg.output is None:  # evaluations of one checkpoint would overwrite each other's results
                    OmegaConf.update(cfg, "output", place)
            work(validated(cfg, HydraConfig.get().overrides.task))
        except UsageError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            fail(str(error))
        except OSError as error:
            if error.errno not in FULL:
                raise
            what = error.filename or "a file"
            fail(f"The disk is too full for {what}: make room, and run the command again; {GOES_ON}")

    run_under_hydra()
