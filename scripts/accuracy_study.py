#!/usr/bin/env python3
"""Run the accuracy study of one size cell by cell, or render what there is of it.

    python scripts/accuracy_study.py nano [--list | --render]

Settings come from the environment, see scripts/reproduce_accuracy.sh. Results go to the folder that the first run
without OUT chose, so that a study goes on the next day where it stopped.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from datetime import date
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from pregate.config import UsageError
from pregate.measure.study.cells import PRETRAINING, SIZES, plan
from pregate.measure.study.records import CELLS, check_claim, claim, load_records
from pregate.measure.study.runner import Runner, Study
from pregate.measure.study.tables import render

NOTE = "results_folder"
HELPS = "PREGATE_STUDY_HELPS"
"""Set for the processes that one with JOBS has begun."""


def is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def results_folder(size: str, work: Path, dry: bool) -> Path:
    """OUT, else the folder noted in `work`, else one named by today's date."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    if dry:
        return work / "results"
    note = work / NOTE
    return Path(note.read_text().strip() if note.is_file() else f"results/accuracy_{size}_{date.today()}")


def main() -> int:
    try:
        return run()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--list", action="store_true", help="print the cells and which are done")
    parser.add_argument("--render", action="store_true", help="only write README.md and plots again")
    arguments = parser.parse_args()
    environment, size = os.environ, SIZES[arguments.size]
    dry, only = is_set("DRY"), environment.get("ONLY")
    work = Path(environment.get("WORK") or f"runs/accuracy_{arguments.size}{'_dry' if dry else ''}")
    folder, cells = results_folder(arguments.size, work, dry), plan(size)
    known = {record["cell"] for record in load_records(folder)}
    if arguments.list:
        for cell in cells:
            if fnmatch(cell.name, only or "*"):
                print(f"{'done' if cell.name in known else '    '} {cell.name}")
        return 0
    write = partial(render, size=arguments.size, cells=cells)
    given = environment.get("SOURCE") or None
    identity = {"size": arguments.size, "dry": dry, "source": given}
    if arguments.render:
        if not (folder / CELLS).is_file():
            raise UsageError(f"{folder} holds no {CELLS}: there is nothing to render.")
        check_claim(folder, identity)
        write(folder)
        return 0
    source = given or size.source
    if source is not None:
        cells = [cell for cell in cells if cell.name != PRETRAINING]
    if only and not any(fnmatch(cell.name, only) for cell in cells):
        raise UsageError(
            f"ONLY={only} is no cell: python scripts/accuracy_study.py {arguments.size} --list shows them."
        )
    if not environment.get("PREGATE_DATA") and size.pretraining:
        raise UsageError("Set PREGATE_DATA to a directory with the tasks' parquet files, corpus/ and t5_tokenizer/.")
    try:
        seconds = float(environment.get("SECONDS_LEFT") or "inf")
    except ValueError:
        raise UsageError(f"SECONDS_LEFT={environment['SECONDS_LEFT']} is no number of seconds.") from None
    jobs = environment.get("JOBS") or "1"
    if not jobs.isdecimal() or int(jobs) < 1:
        raise UsageError(f"JOBS={jobs} is no number of processes: give 1 or more.")
    study = Study(
        arguments.size,
        cells,
        folder,
        work,
        source=source,
        only=only,
        seconds_left=None if seconds == float("inf") else seconds,
        tiny=dry,
        keep=is_set("KEEP"),
        several=int(jobs) > 1 or is_set(HELPS),
        render=write,
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    check_claim(folder, identity)
    claim(work, identity)
    claim(folder, identity)
    if not (dry or environment.get("OUT")):
        (work / NOTE).write_text(f"{folder}\n")
    if not is_set(HELPS):
        print(f"== {len(known)} of {len(cells)} cells done; results: {folder}", flush=True)
    if all(cell.name in known for cell in cells if fnmatch(cell.name, only or "*")):
        print("== nothing to do: to run a cell again, begin a study of your own with another OUT and WORK")
    # sessions of their own keep the terminal's Ctrl-C from them, which would reach them twice
    others = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env={**environment, "JOBS": "1", HELPS: "1"}, start_new_session=True
        )
        for _ in range(int(jobs) - 1)
    ]
    try:
        return max([Runner(study).run(), *(other.wait() for other in others)])
    except KeyboardInterrupt:
        if not is_set(HELPS):
            print("== stopped; the same command goes on")
        return 130
    finally:
        for other in others:
            if other.poll() is None:
                other.send_signal(signal.SIGINT)
        for other in others:
            other.wait()


if __name__ == "__main__":
    sys.exit(main())
