"""Sizes in bytes as the user writes and reads them, and shares of the experts.

Knows numbers and units alone.
"""

from __future__ import annotations

import re

from pregate.config import UsageError

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str | int) -> int:
    """Bytes of "4GB", "512MiB", "1.5G", "4096" or a plain integer; K M G T are powers of 1000, Ki Mi Gi Ti of 1024.

    Raises `UsageError` for anything else, negative sizes included.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([KMGT])(I)?)?B?", str(text).strip().upper())
    if found is None:
        raise UsageError(f"{str(text)!r} is not a size: write bytes, or a number with a unit such as 4GB or 512MiB.")
    number, unit, binary = found.groups()
    scale = _BINARY[unit] if binary else _DECIMAL[unit or ""]
    return round(float(number) * scale) if "." in number else int(number) * scale


def share_of(setting: str, budget: str) -> float | None:
    """The share that a budget such as "25%" is, or None where it is a size. Raises `UsageError` for a share of nothing
    or of more than all."""
    text = str(budget).strip()
    if not text.endswith("%"):
        return None
    number = text[:-1].strip()
    share = float(number) / 100 if re.fullmatch(r"\d+(\.\d*)?|\.\d+", number, re.ASCII) else 0.0
    if not 0 < share <= 1:
        raise UsageError(
            f"{setting}={budget} is not a share of the experts: write a number above 0% and up to 100%, or a size such "
            "as 4GB."
        )
    return share


def human_bytes(num_bytes: float) -> str:
    """Three significant digits in powers of 1000, as link bandwidths are given: 4718592 is "4.72 MB"."""
    size, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    if unit == "B":
        return f"{size:.0f} B"
    decimals = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{decimals}f} {unit}"
