"""What is wrong with the arguments of a command, read one by one before Hydra composes them.

Knows Hydra's grammar of overrides, the schema, and what lies in `configs/`; matches none of Hydra's own sentences.
"""

from __future__ import annotations

import difflib
import functools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from pregate.config import GeneratedConfig, Run, TaskConfig, TrainConfig, UsageError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


@dataclass(frozen=True)
class Fault:
    """What is wrong with one argument: as a sentence, and as a clause without its period among others."""

    sentence: str
    clause: str

    @staticmethod
    def of(clause: str) -> Fault:
        return Fault(f"{clause[0].upper()}{clause[1:]}." if clause.startswith("there ") else f"{clause}.", clause)


def config_dir() -> Path:
    """The directory of the YAML groups: inside the installed package, or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "configs", here.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise UsageError("pregate finds no configs/ directory: reinstall the package.")


@functools.cache
def full_schema() -> DictConfig:
    """The schema with its optional sections filled."""
    return OmegaConf.structured(Run(source_train=TrainConfig(), task=TaskConfig(generated=GeneratedConfig())))


def known_keys() -> list[str]:
    flat: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            flat.append(f"{prefix}{key}")
            child = OmegaConf.select(node, key) if not OmegaConf.is_missing(node, key) else None
            if OmegaConf.is_dict(child):
                walk(child, f"{prefix}{key}.")

    walk(full_schema(), "")
    return flat


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


def check_arguments(arguments: Sequence[str], multirun: bool = False) -> list[str]:
    """The arguments of the first job. Raises `UsageError` with one sentence that names all that cannot be used."""
    first: list[str] = []
    faults: list[Fault] = []
    searches = any(argument.lstrip("+").startswith("hydra.searchpath") for argument in arguments)
    for argument in arguments:
        override = parsed(argument)
        if override is None:
            faults.append(_unreadable(argument))
            continue
        first.append(next(_values(override), argument))
        faults += _faults(override, multirun, searches)
    faults = list(dict.fromkeys(faults))
    if len(faults) == 1:
        raise UsageError(faults[0].sentence)
    if faults:
        told = "; ".join(fault.clause for fault in faults)
        raise UsageError(f"{len(faults)} arguments cannot be used: {told}.")
    return first


def _values(override: Override) -> Iterator[str]:
    """An argument for each value of a sweep; nothing for one value, or for values that only Hydra can list."""
    from hydra.core.override_parser.types import Glob

    if override.is_discrete_sweep() and not isinstance(override._value, Glob):
        for value in override.sweep_string_iterator():
            yield f"{override.get_key_element()}={value}"


def parsed(argument: str) -> Override | None:
    """`argument` as Hydra reads it, or None if it cannot."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def closest(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def no_setting(key: str) -> Fault:
    near = closest(key, known_keys())
    if near is None:
        return Fault(f"There is no setting {key!r}: --cfg job shows them all.", f"{key!r} is no setting")
    return Fault(f"There is no setting {key!r}; did you mean {near}?", f"{key!r} is no setting (did you mean {near}?)")


def _unreadable(argument: str) -> Fault:
    """An argument outside Hydra's grammar, with the way to write it if one can be found."""
    key, equals, value = argument.partition("=")
    if not equals:
        known = key in known_keys()
        return Fault.of(f"{argument!r} cannot be read: a setting is written {key if known else 'key'}=VALUE")
    probe = parsed(f"{key}=null")
    if probe is not None and no_setting(probe.key_or_group) in _faults(probe, False, False):
        return no_setting(probe.key_or_group)
    written = _quoted(key, value)
    if written is None:
        return Fault.of(
            f"{argument!r} cannot be read: a value is a number, a word, a list such as [a,b] or a text in quotes"
        )
    return Fault.of(
        f"{argument!r} cannot be read: its value needs quotes, and these need the shell's around them: write {written}"
    )


def _quoted(key: str, value: str) -> str | None:
    """How a shell's command line gives the text `value` to the setting `key`, or None if the setting takes no text."""
    from hydra.core.override_parser.types import Quote, QuotedString

    for quote in (Quote.double, Quote.single):
        argument = f"{key}={QuotedString(value, quote).with_quotes()}"
        override = parsed(argument)
        if override is not None and override.value() == value and not _faults(override, False, False):
            return shlex.quote(argument)
    return None


def _faults(override: Override, multirun: bool, searches: bool) -> list[Fault]:
    key = override.key_or_group
    if override.is_hydra_override() or override.package is not None:
        return []
    if override.is_delete():
        clause = f"{override.input_line} deletes a setting, and all must be there: set {key}=VALUE"
        return [Fault.of(clause)]
    if override.is_sweep_override():
        return _sweep_faults(override, multirun, searches)
    if key in groups():
        return [] if searches else _group_faults(override)
    return _setting_faults(override)


def _sweep_faults(override: Override, multirun: bool, searches: bool) -> list[Fault]:
    """Several values: each of them is looked at for a sweep, and refused without one."""
    key, raw = override.get_key_element(), override.get_value_string()
    if multirun:
        jobs = [parsed(argument) for argument in _values(override)]
        return [fault for job in jobs if job is not None for fault in _faults(job, multirun, searches)]
    written = _quoted(key, raw)
    ways = [f"write {written} for one text"] if written else []
    as_list = parsed(f"{key}=[{raw}]")
    if as_list is not None and override.key_or_group not in groups() and not _setting_faults(as_list):
        ways.append(f"write {shlex.quote(f'{key}=[{raw}]')} for a list")
    ways = [*(ways or ["give one"]), "add --multirun for one run with each"]
    return [Fault.of(f"{override.input_line!r} holds several values: {', or '.join(ways)}")]


def _group_faults(override: Override) -> list[Fault]:
    group, members = override.key_or_group, groups()[override.key_or_group]
    value = override.value()
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and name.removesuffix(".yaml") not in members:
            near = closest(name, members)
            return [
                Fault(
                    f"There is no {group} named {name!r}: choose one of {', '.join(members)}.",
                    f"{name!r} is no {group}" + (f" (did you mean {near}?)" if near else ""),
                )
            ]
    text = f"{group}={override.get_value_string()}"
    if group not in default_groups() and not override.is_add():
        return [Fault.of(f"{override.input_line} needs a plus: write {shlex.quote(f'+{text}')}")]
    if group in default_groups() and (override.is_add() or override.is_force_add()):
        return [Fault.of(f"{override.input_line} takes no plus: write {shlex.quote(text)}")]
    return []


def _setting_faults(override: Override) -> list[Fault]:
    """A setting that does not exist, exists already, takes no such value, or would take another than was written."""
    key, raw, value = override.key_or_group, override.get_value_string(), override.value()
    schema = full_schema()
    try:
        holder = OmegaConf.select(schema, key.rpartition(".")[0]) if "." in key else schema
        known = isinstance(holder, ListConfig) or key in known_keys()
        free = not known and _is_free(holder)
    except OmegaConfBaseException:
        known = free = False
    if not known and not free:
        return [no_setting(key)]
    if known and override.is_add() and not in_optional_section(key):
        return [Fault.of(f"{override.input_line} takes no plus: write {shlex.quote(f'{key}={raw}')}")]
    trial = schema.copy()
    try:
        if not isinstance(holder, ListConfig):
            OmegaConf.update(trial, key, value, force_add=True)
    except OmegaConfBaseException as error:
        written = _quoted(override.get_key_element(), raw) if isinstance(value, list | dict) else None
        if written:
            kind = "list" if isinstance(value, list) else "mapping"
            return [Fault.of(f"{override.input_line} is a {kind}, and {key} takes a text: write {written} for one")]
        return [Fault.of(f"{key}: {first_line(error)}")]
    return _altered_text(override) if _takes_text(trial, key) else []


def _altered_text(override: Override) -> list[Fault]:
    """A text that Hydra reads as a number or as a truth value, and that would not be spelt as it was written."""
    raw, value = override.get_value_string().strip(), override.value()
    if isinstance(value, list):
        if all(str(leaf) in raw for leaf in value if isinstance(leaf, bool | int | float)):
            return []
        became = ",".join(str(leaf) for leaf in value)
        advice = "put each text in quotes, and all of it in the shell's"
    else:
        if not isinstance(value, bool | int | float) or str(value) == raw:
            return []
        became, advice = str(value), f"write {_quoted(override.get_key_element(), raw)}"
    return [Fault.of(f"{override.input_line} would become {became}: {advice}")]


def _is_free(node: Any) -> bool:
    """Whether a section takes any key."""
    return OmegaConf.is_dict(node) and OmegaConf.get_type(node) is dict


def _takes_text(schema: DictConfig, key: str) -> bool:
    node = schema
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        node = node._get_node(part)
    if isinstance(node, ListConfig):
        return node._metadata.element_type is str
    return isinstance(node, StringNode)


def in_optional_section(key: str) -> str | None:
    """The section that `key` lies in if there is none of it by default, such as `source_train`."""
    own = OmegaConf.structured(Run)
    parts = key.split(".")
    for count in range(1, len(parts)):
        section = ".".join(parts[:count])
        if OmegaConf.select(own, section) is None:
            return section
    return None


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that say where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
