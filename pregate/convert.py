"""`python -m pregate.convert source=DIR_OR_ID output=DIR`: re-attach the gates of a checkpoint, without training.

Parses, calls `pregate.conversion`, and prints what happened.
"""

from __future__ import annotations

from pathlib import Path

from pregate.cli import entry_point
from pregate.config import Init, Run, UsageError
from pregate.system.launcher_environment import check_alone


def work(run: Run) -> None:
    check_alone("convert")
    if run.source is None or run.output is None:
        raise UsageError("Conversion needs two places: source=DIRECTORY_OR_HUB_ID output=NEW_DIRECTORY.")
    from pregate.engine.storage.pack import refuse_output

    refuse_output("output", Path(run.output))
    if run.pregate.init is Init.calibrated and run.pregate.lookahead:
        from pregate.conversion.calibrate.flow import calibrate_source

        report, calibration = calibrate_source(run, run.source, Path(run.output))
        print(calibration.table())
    else:
        from pregate.conversion.write import convert_for

        report = convert_for(run, run.source, Path(run.output))
    print(report.told(run.source))


if __name__ == "__main__":
    entry_point(work)
