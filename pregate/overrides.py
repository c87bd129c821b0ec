"""What is wrong with the arguments of a command, read one by one, and how each is to be written.

Knows Hydra's grammar of overrides, the schema, and what lies in `configs/`; reads none of Hydra's own sentences.
"""

from __future__ import annotations

import difflib
import functools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from pregate.config import GeneratedConfig, Run, TaskConfig, TrainConfig, UsageError
from pregate.config.groups import config_of, default_groups, groups

FILLED_BY = {"source_train": "+experiment=quickstart", "task.generated": "task=generated"}
"""What fills a section that is empty by default."""


def composed(arguments: Sequence[str], multirun: bool = False) -> DictConfig:
    """The config that `arguments` give; of a sweep that of its first job.

    Raises `UsageError` with one sentence that names all that cannot be used.
    """
    reader = Reader.of(arguments, multirun)
    faults = list(dict.fromkeys(fault for argument in arguments for fault in reader.faults(argument)))
    if len(faults) == 1:
        raise UsageError(faults[0].sentence)
    if faults:
        told = "; ".join(fault.clause for fault in faults)
        raise UsageError(f"{len(faults)} arguments cannot be used: {told}.")
    config = reader.base.copy()
    for override in _first_jobs(arguments):
        if _is_setting(override):
            try:
                _update(config, override)
            except OmegaConfBaseException as error:  # alone it was right
                raise UsageError(f"{override.input_line} cannot be used here: {first_line(error)}.") from error
    return config


@dataclass(frozen=True)
class Fault:
    """What is wrong with one argument: as a sentence, and as a clause without its period among others."""

    sentence: str
    clause: str

    @staticmethod
    def of(clause: str) -> Fault:
        return Fault(f"{clause[0].upper()}{clause[1:]}." if clause.startswith("there ") else f"{clause}.", clause)


@functools.cache
def known_keys() -> list[str]:
    """Every setting and section of the schema with its optional sections filled."""
    flat: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            flat.append(f"{prefix}{key}")
            if OmegaConf.is_dict(node[key]):
                walk(node[key], f"{prefix}{key}.")

    walk(OmegaConf.structured(Run(source_train=TrainConfig(), task=TaskConfig(generated=GeneratedConfig()))), "")
    return flat


def parsed(argument: str) -> Override | None:
    """`argument` as Hydra reads it, or None if it cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def no_setting(key: str) -> Fault:
    near = _closest(key, known_keys())
    if near is None:
        return Fault(f"There is no setting {key!r}: --cfg job shows them all.", f"{key!r} is no setting")
    return Fault(f"There is no setting {key!r}; did you mean {near}?", f"{key!r} is no setting (did you mean {near}?)")


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that say where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _closest(word: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def _jobs(override: Override) -> Iterator[Override]:
    """An override for each value of a sweep; nothing for values that only Hydra can list."""
    if not override.is_sweep_override():
        yield override
    elif override.is_discrete_sweep() and not isinstance(override._value, Glob):
        values = override.sweep_string_iterator()
        yield from filter(None, (parsed(f"{override.get_key_element()}={value}") for value in values))


def _first_jobs(arguments: Sequence[str]) -> list[Override]:
    readable = filter(None, map(parsed, arguments))
    return [job for override in readable if (job := next(_jobs(override), None)) is not None]


def _is_setting(override: Override) -> bool:
    return not (override.is_hydra_override() or override.package is not None or override.key_or_group in groups())


def _update(config: DictConfig, override: Override) -> None:
    """As Hydra does. Raises `OmegaConfBaseException`."""
    OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)


def _group_faults(override: Override) -> list[Fault]:
    group, members = override.key_or_group, groups()[override.key_or_group]
    value = override.value()
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and name.removesuffix(".yaml") not in members:
            near = _closest(name, members)
            return [
                Fault(
                    f"There is no {group} named {name!r}: choose one of {', '.join(members)}.",
                    f"{name!r} is no {group}" + (f" (did you mean {near}?)" if near else ""),
                )
            ]
    return _plus_faults(override, group not in default_groups(), f"{group}={override.get_value_string()}")


def _plus_faults(override: Override, is_new: bool, plain: str) -> list[Fault]:
    """A plus adds what is not there, and nothing else; two plusses set it either way."""
    if is_new and not (override.is_add() or override.is_force_add()):
        return [Fault.of(f"{override.input_line} needs a plus: write {shlex.quote(f'+{plain}')}")]
    if not is_new and override.is_add():
        return [Fault.of(f"{override.input_line} takes no plus: write {shlex.quote(plain)}")]
    return []


@dataclass(frozen=True)
class Reader:
    """Looks at arguments over `base`, the config that the chosen group members give.

    `multirun`: an argument may hold several values. `searches`: the user's own directories may hold more members.
    """

    base: DictConfig
    multirun: bool = False
    searches: bool = False

    @classmethod
    def of(cls, arguments: Sequence[str], multirun: bool) -> Reader:
        """Raises `UsageError` for members that do not go together."""
        searches = any(argument.lstrip("+").startswith("hydra.searchpath") for argument in arguments)
        chosen = [o for o in _first_jobs(arguments) if not (_is_setting(o) or o.is_delete())]
        if not searches:
            chosen = [o for o in chosen if o.key_or_group not in groups() or o.package or not _group_faults(o)]
        choices = tuple(str(override.input_line) for override in chosen)
        try:
            return cls(config_of(choices), multirun, searches)
        except Exception as error:
            if "hydra/launcher/submitit" in str(error):
                raise UsageError(
                    "Launchers of sweeps need the package hydra-submitit-launcher: pip install '.[cluster]' in the "
                    "directory of pregate, or pip install hydra-submitit-launcher."
                ) from error
            raise UsageError(f"{' '.join(choices)} cannot be used here: {first_line(error)}.") from error

    def faults(self, argument: str) -> list[Fault]:
        override = parsed(argument)
        return [self._unreadable(argument)] if override is None else self._faults(override)

    def _faults(self, override: Override) -> list[Fault]:
        key = override.key_or_group
        if override.is_hydra_override() or override.package is not None:
            return []
        if override.is_delete():
            return [Fault.of(f"{override.input_line} deletes a setting, and all must be there: set {key}=VALUE")]
        if override.is_sweep_override() and self.multirun:
            return next((faults for job in _jobs(override) if (faults := self._faults(job))), [])
        if override.is_sweep_override():
            return [self._several_values(override)]
        if key in groups():
            return [] if self.searches else _group_faults(override)
        return self._setting_faults(override)

    def _setting_faults(self, override: Override) -> list[Fault]:
        """A setting that does not exist or exists already, or a value that it does not take as it is written."""
        key, value, raw = override.key_or_group, override.value(), override.get_value_string()
        section, _, name = key.rpartition(".")
        try:
            holder = OmegaConf.select(self.base, section) if section else self.base
        except OmegaConfBaseException:
            return [no_setting(key)]
        if holder is None and key in known_keys():
            clause = (
                f"{override.input_line} sets a part of {section}, which is empty here: choose an experiment or a group "
                f"member that fills it, such as {FILLED_BY[section]}"
            )
            return [Fault.of(clause)]
        if isinstance(holder, DictConfig):
            if name not in holder and OmegaConf.get_type(holder) is not dict:
                return [no_setting(key)]
            faults = _plus_faults(override, name not in holder, f"{key}={raw}")
        else:
            faults = [] if isinstance(holder, ListConfig) else [no_setting(key)]
        return faults or self._value_faults(override, key, value, raw)

    def _value_faults(self, override: Override, key: str, value: Any, raw: str) -> list[Fault]:
        trial = self.base.copy()
        try:
            _update(trial, override)
        except OmegaConfBaseException as error:
            written = self._quoted(override.get_key_element(), raw) if isinstance(value, list | dict) else None
            if written:
                kind = "list" if isinstance(value, list) else "mapping"
                return [Fault.of(f"{override.input_line} is a {kind}, and {key} takes a text: write {written} for one")]
            return [Fault.of(f"{key}: {first_line(error)}")]
        return self._altered_text(override) if _takes_text(trial, key) else []

    def _altered_text(self, override: Override) -> list[Fault]:
        """A text that Hydra reads as a number or as a truth value, and that would not be spelt as it was written."""
        raw, value = override.get_value_string().strip(), override.value()
        if isinstance(value, list):
            written = re.split(r"[\[\]{}:,\s]+", raw)
            if all(str(leaf) in written for leaf in value if isinstance(leaf, bool | int | float)):
                return []
            became = ",".join(str(leaf) for leaf in value)
            advice = "put each text in quotes, and all of it in the shell's"
        else:
            if not isinstance(value, bool | int | float) or str(value) == raw:
                return []
            became, advice = str(value), f"write {self._quoted(override.get_key_element(), raw)}"
        return [Fault.of(f"{override.input_line} would become {became}: {advice}")]

    def _several_values(self, override: Override) -> Fault:
        key, raw = override.get_key_element(), override.get_value_string()
        written = self._quoted(key, raw)
        ways = [f"write {written} for one text"] if written else []
        as_list = parsed(f"{key}=[{raw}]")
        if as_list is not None and override.key_or_group not in groups() and not self._setting_faults(as_list):
            ways.append(f"write {shlex.quote(f'{key}=[{raw}]')} for a list")
        ways = [*(ways or ["give one"]), "add --multirun for one run with each"]
        return Fault.of(f"{override.input_line!r} holds several values: {', or '.join(ways)}")

    def _unreadable(self, argument: str) -> Fault:
        """An argument outside Hydra's grammar, with the way to write it if one can be found."""
        key, equals, value = argument.partition("=")
        cannot = f"{argument!r} cannot be read"
        if not equals:
            return Fault.of(f"{cannot}: a setting is written {key if key in known_keys() else 'key'}=VALUE")
        probe = parsed(f"{key}=null")
        if probe is not None and no_setting(probe.key_or_group) in self._faults(probe):
            return no_setting(probe.key_or_group)
        written = self._quoted(key, value)
        if written is None:
            return Fault.of(f"{cannot}: a value is a number, a word, a list such as [a,b] or a text in quotes")
        return Fault.of(f"{cannot}: its value needs quotes, and these need the shell's around them: write {written}")

    def _quoted(self, key: str, value: str) -> str | None:
        """How a shell's command line gives the text `value` to a setting, or None if the setting takes no text."""
        for quote in (Quote.double, Quote.single):
            argument = f"{key}={QuotedString(value, quote).with_quotes()}"
            override = parsed(argument)
            if override is not None and override.value() == value and not self._faults(override):
                return shlex.quote(argument)
        return None


def _takes_text(config: DictConfig, key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        node = node._get_node(part)
    if isinstance(node, ListConfig):
        return node._metadata.element_type is str
    return isinstance(node, StringNode)
