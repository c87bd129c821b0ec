"""The machine that a run has: seeds, the compute device, and the fingerprint of hardware and versions.

Knows torch's view of the machine and git's view of the package; knows nothing about models, data or configs
beyond the `Device` setting. The fingerprint holds no host name and no path, so that results can be published.
"""

from __future__ import annotations

import os
import platform
import random
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from pregate import __version__
from pregate.config import Device, UsageError

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


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float32 where the device multiplies matrices in `dtype` without instructions for it, several times
    slower than in float32: a CPU without AVX-512."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return torch.float32 if device.type == "cpu" and dtype in supported and not supported[dtype]() else dtype


def environment() -> dict[str, Any]:
    """JSON-able fingerprint of versions and hardware; what cannot be found out is absent.

    `memory_gib` is what this process may use: the machine's memory, or the container's limit where that is lower.
    `git` is there only if a git checkout tracks this very file. A checkout around it is not enough.
    """
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
