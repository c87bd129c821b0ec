"""Which values a setting may take, said where it is declared, and the error of one that may not.

`steps: int = setting(20, at_least(0))` refuses `calibration.steps=-1` with a sentence that names the whole key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from math import isfinite
from typing import Any, TypeVar


class UsageError(ValueError):
    """The user's input cannot work; the message is one sentence that says what to do instead."""


@dataclass(frozen=True)
class Limit:
    """What must hold of a value, and the words that follow `key=value` in the sentence where it does not."""

    holds: Callable[[Any], bool]
    words: str


def at_least(least: float, note: str = "") -> Limit:
    return Limit(lambda value: value >= least, f"must be at least {least}{note}")


def above(bound: float, note: str = "") -> Limit:
    return Limit(lambda value: value > bound, f"must be above {bound}{note}")


def between(low: float, high: float, note: str = "") -> Limit:
    """Both ends excluded."""
    return Limit(lambda value: low < value < high, f"must lie between {low} and {high}{note}")


WEIGHT = Limit(lambda value: isfinite(value) and value >= 0, "must be 0 or above")
TEMPERATURE = Limit(lambda value: isfinite(value) and value > 0, "must be above 0")


def share_of(setting: str, budget: str) -> float | None:
    """The share that a budget such as "25%" is, or None where it is a size. Raises `UsageError` for a share of nothing
    or of more than all."""
    text = str(budget).strip()
    if not text.endswith("%"):
        return None
    number = text[:-1].strip()
    share = float(number) / 100 if re.fullmatch(r"\d+(\.\d*)?|\.\d+", number, re.ASCII) else 0.0
    need(
        0 < share <= 1,
        f"{setting}={budget} is not a share of the experts: write a number above 0% and up to 100%, or a size such "
        "as 4GB.",
    )
    return share


def setting(default: Any, limit: Limit) -> Any:
    """A field with a limit; null is within every limit."""
    return field(default=default, metadata={"limit": limit})


def check_section(section: Any, prefix: str) -> None:
    """Refuse a value of a dataclass, or of those inside it, that its field does not take. Raises `UsageError`.

    A field's metadata: `limit` of the value, `each` of the values of a list, `empty` the advice for a value that is.
    A dataclass may have a method `check(prefix)` for what concerns several of its fields.
    """
    for declared in fields(section):
        value, rules, key = getattr(section, declared.name), declared.metadata, f"{prefix}{declared.name}"
        if "empty" in rules:
            filled = value.strip() if isinstance(value, str) else value
            need(bool(filled), f"{key} is empty: {rules['empty']}.")
        if "limit" in rules and value is not None:
            need(rules["limit"].holds(value), f"{key}={value} {rules['limit'].words}.")
        if "each" in rules:
            need(all(rules["each"].holds(one) for one in value or ()), f"{key}={value} {rules['each'].words}.")
        if is_dataclass(value):
            check_section(value, f"{key}.")
    if hasattr(section, "check"):
        section.check(prefix)


def need(holds: bool, sentence: str) -> None:
    """Raises `UsageError` with `sentence` where something does not hold."""
    if not holds:
        raise UsageError(sentence)


Choice = TypeVar("Choice", bound=StrEnum)


def chosen(setting: str, kind: type[Choice], word: str) -> Choice:
    """`word` as one of the choices of `kind`. Raises `UsageError` that lists them."""
    need(word in list(kind), f"{setting}={word} is not known: write {', '.join(list(kind)[:-1])} or {list(kind)[-1]}.")
    return kind(word)
