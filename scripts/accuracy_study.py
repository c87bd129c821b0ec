#!/usr/bin/env python3
"""Run the accuracy study of one size cell by cell, or render what there is of it.

    python scripts/accuracy_study.py nano [--list | --render]

Settings come from the environment, see scripts/reproduce_accuracy.sh. Results go to the folder that the first run
without OUT chose, so that a study goes on the next day where it stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `studies` is not installed

from pregate.config import UsageError
from studies.accuracy.arms_and_seeds import DENSE, PRETRAINING, SIZES, all_cells, start_of
from studies.accuracy.records import CELLS, check_claim, claim, load_records, recorded_cells
from studies.accuracy.runner import Runner, Study, missing_of
from studies.accuracy.tables import render

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
    study = study_of(arguments.size)
    identity = {"size": study.size, "dry": study.tiny, "source": os.environ.get("SOURCE") or None}
    known = recorded_cells(study.folder)
    if not study.wanted:
        raise UsageError(f"ONLY={study.only} is no cell: {sys.argv[0]} {study.size} --list without it shows them.")
    if arguments.list:
        for cell in study.wanted:
            print(f"{'done' if cell.name in known else '    '} {cell.name}")
        return 0
    if arguments.render:
        if not (study.folder / CELLS).is_file():
            raise UsageError(f"{study.folder} holds no {CELLS}: there is nothing to render.")
        check_claim(study.folder, identity)
        study.render(study.folder)
        return 0
    if not os.environ.get("PREGATE_DATA") and (SIZES[study.size].pretraining or SIZES[study.size].make_source):
        raise UsageError("Set PREGATE_DATA to a directory with the tasks' parquet files, corpus/ and t5_tokenizer/.")
    make, source = SIZES[study.size].make_source, study.source
    pending = [cell for cell in study.wanted if cell.name not in known]
    for start in (start_of(cell, study.size, source) for cell in pending) if make and source else ():
        if not Path(start).is_dir():
            raise UsageError(f"There is no source in {start}: make it with `{make}`, or name one with SOURCE=DIR.")
    study.seconds_left, jobs = seconds_left(), number_of_jobs()
    study.several = jobs > 1 or is_set(HELPS)
    check_claim(study.folder, identity)
    claim(study.work, identity)
    claim(study.folder, identity)
    if not (study.tiny or os.environ.get("OUT")):
        (study.work / NOTE).write_text(f"{study.folder}\n")
    if not is_set(HELPS):
        print(f"== {len(known)} of {len(study.cells)} cells done; results: {study.folder}", flush=True)
    if not missing_of(study):
        print("== nothing to do: to run a cell again, begin a study of your own with another OUT and WORK")
        return 0
    return run_with_others(study, jobs - 1)


def study_of(size: str) -> Study:
    """The study that the environment describes."""
    dry = is_set("DRY")
    work = Path(os.environ.get("WORK") or f"runs/accuracy_{size}{'_dry' if dry else ''}")
    given = os.environ.get("SOURCE")
    source = given or SIZES[size].source
    left_out = {PRETRAINING} if source else set()
    folder = results_folder(size, work, dry)
    if given and all(record["variant"] != DENSE for record in load_records(folder)):
        left_out |= {DENSE}  # what another source was made from is not known
    cells = [cell for cell in all_cells(SIZES[size]) if not {cell.name, cell.variant} & left_out]
    return Study(
        size,
        cells,
        folder,
        work,
        source=source,
        only=os.environ.get("ONLY"),
        tiny=dry,
        keep=is_set("KEEP"),
        render=partial(render, size=size, cells=cells),
    )


def seconds_left() -> float | None:
    given = os.environ.get("SECONDS_LEFT")
    if not given:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(f"SECONDS_LEFT={given} is no number of seconds.")
    return seconds


def number_of_jobs() -> int:
    given = os.environ.get("JOBS") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"JOBS={given} is no number of processes: give 1 or more.")
    return int(given)


def run_with_others(study: Study, count: int) -> int:
    """Run what is missing beside `count` processes that do the same; 0 if all of it is there in the end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    # sessions of their own keep the terminal's Ctrl-C from them, which would reach them twice
    environment = {**os.environ, "JOBS": "1", HELPS: "1"}
    others = [
        subprocess.Popen([sys.executable, *sys.argv], env=environment, start_new_session=True) for _ in range(count)
    ]
    try:
        code = max([Runner(study).run(), *(other.wait() for other in others)])
        return code if missing_of(study) else 0
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
