"""Sizes in bytes, as the user writes and reads them.

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
