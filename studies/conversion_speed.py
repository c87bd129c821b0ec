"""How fast a large checkpoint is converted and packed, and in how much memory, beside a plain copy of its files.

    python scripts/random_checkpoint.py SOURCE model=olmoe_1b_7b
    python -m studies.conversion_speed SOURCE SCRATCH results/NAME

Copies, converts, copies, packs and copies, one after the other, each from a cold page cache to the disk and each
removed before the next. SCRATCH is a directory to make on the same disk; it needs the size of SOURCE once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pregate.config import PreGateConfig, Tier
from pregate.conversion.write import convert
from pregate.engine.opening import open_store
from pregate.measure.table_format import Table, facts_line, number
from pregate.models.loading import open_model
from pregate.system.durable import flush_file, flush_tree, num_bytes, write_json
from pregate.system.machine import environment

STEPS = ("copy", "convert", "copy", "pack", "copy")
MARGIN = 10**9
COLUMNS = {
    "step": lambda row: row["step"],
    "GB written": number("bytes", 1e9),
    "seconds": number("seconds"),
    "CPU seconds": number("cpu_seconds"),
    "GB/s": number("bytes_per_s", 1e9),
    "GB/s ÷ that of the copies before and after": number("of_a_copy"),
    "peak resident, GB": number("peak_resident_bytes", 1e9),
    "before it begins, GB": number("resident_bytes_before", 1e9),
    "GB read from the disk": number("bytes_read", 1e9),
}


def copy(source: Path, target: Path) -> None:
    """As `cp` and then `sync` of what it wrote."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
    flush_tree(target)


def converted(source: Path, target: Path) -> None:
    convert(str(source), target, PreGateConfig())


def packed(source: Path, target: Path) -> None:
    open_store(source, tier=Tier.disk, pack_dir=target).close()


WORK = {"copy": copy, "convert": converted, "pack": packed}


def status(field: str, file: str = "status", unit: int = 1024) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) * unit for line in lines if line.startswith(f"{field}:"))


def one_step(step: str, source: Path, target: Path) -> None:
    """In a process of its own: its high-water mark is that of this step, imports included."""
    row: dict[str, Any] = {"step": step, "resident_bytes_before": status("VmRSS")}
    read, used, began = status("read_bytes", "io", 1), time.process_time(), time.perf_counter()
    WORK[step](source, target)
    row["seconds"] = time.perf_counter() - began
    row["cpu_seconds"] = time.process_time() - used
    row |= {"bytes_read": status("read_bytes", "io", 1) - read, "peak_resident_bytes": status("VmHWM")}
    print(json.dumps(row))


def forget(directory: Path) -> None:
    """Drop the files of `directory` from the page cache."""
    for file in directory.iterdir():
        flush_file(file)
        opened = os.open(file, os.O_RDONLY)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(opened)


def measure(source: Path, scratch: Path, steps: Sequence[str]) -> list[dict[str, Any]]:
    scratch.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for step in steps:
        forget(source)
        command = [sys.executable, "-m", "studies.conversion_speed", str(source), str(scratch / step), "--step", step]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        size = num_bytes(scratch / step)
        row |= {"bytes": size, "bytes_per_s": size / row["seconds"], "load_average": os.getloadavg()[0]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        shutil.rmtree(scratch / step)
    scratch.rmdir()
    for before, row, after in zip(rows, rows[1:], rows[2:], strict=False):
        if row["step"] != "copy":
            row["of_a_copy"] = 2 * row["bytes_per_s"] / (before["bytes_per_s"] + after["bytes_per_s"])
    return rows


def readme(name: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    largest = facts["largest_tensor_bytes"]
    worst = max(row["peak_resident_bytes"] for row in rows if row["step"] != "copy")
    within = "within" if worst <= largest + MARGIN else "ABOVE"
    most = max(row["load_average"] for row in rows)
    busy = " It was busy, so seconds and GB/s compare nothing." if most > 2 * (os.cpu_count() or 1) else ""
    loads = ", ".join(f"{row['load_average']:.1f}" for row in rows)
    return f"""# {name}

A checkpoint of {facts["num_bytes"] / 1e9:.1f} GB ({facts["num_files"]} files, {facts["num_tensors"]:,} tensors, the
largest of {largest / 1e6:.0f} MB) is converted one block ahead, and its experts are packed, beside plain copies of its
files. Steps in the order in which they ran.

```
python scripts/random_checkpoint.py SOURCE model=olmoe_1b_7b
python -m studies.conversion_speed SOURCE SCRATCH results/{name}
```

{Table.of(COLUMNS, rows).markdown()}

- **Memory**: the highest peak of conversion and packing is {worst / 1e9:.2f} GB, {within} the largest tensor and 1 GB,
  {(largest + MARGIN) / 1e9:.2f} GB. It is the high-water mark of the resident set (VmHWM) of a process of its own. It
  counts the interpreter, torch, and the touched pages of a file while that is mapped. The page cache is no part of it.
- **Seconds** are those of the work, without the imports before it. Every step ends when its files are on the disk
  (fsync). Before every step the source is dropped from the page cache.
- A copy is Python's `shutil.copyfile`, in the kernel, file by file. A conversion also computes the SHA-256 of every
  file, packing two checksums of every expert.
- Load average of the machine after each step: {loads}.{busy}

Environment: {facts_line(environment())}.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.conversion_speed", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("result", type=Path, nargs="?")
    parser.add_argument("--step", choices=WORK, help="one step, in this process")
    given = parser.parse_args(arguments)
    if given.step:
        one_step(given.step, given.source, given.scratch)
        return
    if given.result is None:
        parser.error("name a folder for the results")
    rows = measure(given.source, given.scratch, STEPS)
    opened = open_model(str(given.source))
    facts = {
        "num_bytes": rows[0]["bytes"],
        "num_files": len(opened.files),
        "num_tensors": len(opened.tensors),
        "largest_tensor_bytes": max(info.num_bytes for info in opened.tensors.values()),
    }
    given.result.mkdir(parents=True, exist_ok=True)
    write_json(given.result / "conversion.json", {**facts, "steps": rows, "environment": environment()})
    (given.result / "README.md").write_text(readme(given.result.name, facts, rows))


if __name__ == "__main__":
    main()
