"""Where a run happens: seeds, the compute device, the fingerprint of machine and versions, and byte sizes.

Knows torch's view of the machine and git's view of the package; knows nothing about models, data or configs
beyond the `Device` setting. The fingerprint holds no host name and no path, so that results can be published.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pregate.config import Device, UsageError
from pregate.system import durable

if TYPE_CHECKING:
    from rich.console import Console

LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy")


def set_seed(seed: int) -> None:
    """Seed the generators of Python, NumPy (which takes 32 bits of it) and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(device: Device) -> torch.device:
    """The compute device asked for; `auto` is a GPU if there is one. Raises `UsageError` for cuda without a GPU."""
    if device is Device.cpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if device is Device.cuda:
        raise UsageError("engine.device=cuda, but torch finds no CUDA GPU: use engine.device=cpu or auto.")
    return torch.device("cpu")


def compute_device(device: torch.device | str) -> torch.device:
    """`device` as torch's, if experts can be served on it here. Raises `UsageError` if not."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"device={device!s} names no device: write cpu, cuda, or a GPU's number as in cuda:0."
        ) from error
    if found.type == "cpu" and not found.index:
        return found
    if found.type != "cuda":
        raise UsageError(f"device={device!s}, but experts are served on cpu and cuda alone: write one of them.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UsageError(f"device={device!s}, but torch finds no CUDA GPU: use cpu.")
    if (found.index or 0) >= count:
        last = "" if count == 1 else f" to cuda:{count - 1}"
        raise UsageError(f"device={device!s}, but torch finds {count} of CUDA's GPUs: write cuda:0{last}.")
    return found


def environment() -> dict[str, Any]:
    """JSON-able fingerprint of versions and hardware; what cannot be found out is absent.

    `memory_gib` is what this process may use: the machine's memory, or the container's limit where that is lower.
    `git` is there only if this very file is tracked by a git checkout, not if some checkout merely surrounds it.
    """
    from pregate import __version__

    facts: dict[str, Any] = {"pregate": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            facts[library] = version(library)
        except PackageNotFoundError:
            continue
    facts |= {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": num_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
    }
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["gpu"] = [device.name for device in devices]
        facts["gpu_memory_gib"] = [round(device.total_memory / 2**30, 1) for device in devices]
        facts["cuda"] = torch.version.cuda
    git = _git_state(Path(__file__))
    return facts | ({"git": git} if git else {})


def num_cores() -> int:
    """Cores this process may run on, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    import psutil

    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return min(limits)


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks `file`, or None. Results that a run adds are no change."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ":/", ":(top,exclude)results")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


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


def first_of(names: Sequence[str], most: int = 1, separator: str = ", ") -> str:
    """The first `most` of `names` and how many more there are: "a, b and 3 more"."""
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


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


def to_jsonable(value: Any) -> Any:
    """`value` as plain JSON values: tensors' and arrays' scalars unwrapped, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(v) for v in value]
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return to_jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, to stay; a reader sees the old file or the whole new one, never a part."""
    durable.write_text(path, json.dumps(to_jsonable(value), indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if it is not there or a power cut has spoilt it."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def console() -> Console:
    """Standard output for rich tables; 100 columns where it is no terminal, since rich would assume 80."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


@contextmanager
def silent_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which would draw over the run's own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
