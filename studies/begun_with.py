"""The settings that a directory was begun with, so that a command that goes on there cannot mix them with others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pregate.config import UsageError
from pregate.system.durable import read_object

SETTINGS = "settings.json"


def begun_alike(place: Path, mine: Mapping[str, Any]) -> bool:
    """Whether `place` was begun already, with the settings `mine`. Raises `UsageError` if it was with others."""
    begun = read_object(place / SETTINGS)
    if begun is None:
        return False
    if other := [f"{name}={begun.get(name)}" for name, value in mine.items() if begun.get(name) != value]:
        raise UsageError(f"{place} was begun with {', '.join(other)}: use these again, or name another directory.")
    return True
