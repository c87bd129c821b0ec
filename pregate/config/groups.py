"""What lies in `configs/`: the groups, their members, and the config that a choice of members gives.

Knows Hydra's way to compose; knows nothing about single settings.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from pregate.config.schema import Run
from pregate.config.validators import UsageError


def config_dir() -> Path:
    """The directory of the YAML groups: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UsageError("pregate finds no configs/ directory: reinstall the package.")


@functools.cache
def groups() -> dict[str, list[str]]:
    """The config groups and their members."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(config_dir().iterdir())
        if folder.is_dir()
    }


@functools.cache
def default_groups() -> frozenset[str]:
    """The groups of which every command has a member, so that it is changed and not added."""
    defaults = OmegaConf.load(config_dir() / "config.yaml").defaults
    return frozenset(str(key) for entry in defaults if OmegaConf.is_dict(entry) for key in entry)


def register_schema() -> None:
    ConfigStore.instance().store(name="run_schema", node=Run)


@functools.cache
def config_of(choices: tuple[str, ...]) -> Any:
    """Hydra's config for arguments that choose group members, without its run directory or logging; not to be changed.

    Raises what Hydra raises.
    """
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(choices))
