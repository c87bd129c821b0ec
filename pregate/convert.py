"""`python -m pregate.convert source=DIR_OR_ID output=DIR`: re-attach the gates of a checkpoint, without training.

Parses, calls `pregate.conversion` or, for `pregate.init=calibrated`, `pregate.calibration`, prints what happened.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pregate.cli import entry_point
from pregate.config import Init, Run, UsageError

if TYPE_CHECKING:
    from pregate.conversion import ConversionReport


STARTS = {Init.source: "as copies", Init.random: "at random", Init.calibrated: "as fitted"}


def work(run: Run) -> None:
    if run.source is None or run.output is None:
        raise UsageError("Conversion needs two places: source=DIRECTORY_OR_HUB_ID output=NEW_DIRECTORY.")
    if run.pregate.init is Init.calibrated and run.pregate.lookahead:
        from pregate.calibration import calibrate_source

        report, calibration = calibrate_source(run, run.source, Path(run.output))
        print(calibration.table())
    else:
        from pregate.conversion import convert

        report = convert(
            run.source,
            Path(run.output),
            run.pregate,
            revision=run.model.revision,
            tokenizer=run.model.tokenizer,
            seed=run.seed,
        )
    print(summary(report, run.source))


def summary(report: ConversionReport, source: str) -> str:
    """What moved, sizes, time, where, and the next command; one line each."""
    from pregate.runtime import human_bytes

    gating = report.gating
    lines = [f"{source} -> {report.output}"]
    for stack, blocks in report.num_blocks.items():
        ahead = gating.lookahead_of(stack)
        moved = sum(move.stack == stack and move.norm is None for move in report.moves)
        entries = "read the input embeddings" if gating.entry == "embedding" else "stay where they are"
        what = f"{moved} gates moved {ahead} ahead, {ahead} entry gates {entries}" if ahead else "gates stay in place"
        lines.append(f"  {stack}: {blocks} MoE blocks, {what}")
    if gating.lookahead:
        lines.append("  moved gates start " + STARTS[Init(gating.init)])
    lines.append(
        f"  {human_bytes(report.output_bytes)} in {len(report.shards)} safetensors file(s), "
        f"from {human_bytes(report.source_bytes)}, in {report.seconds:.1f} s"
    )
    if not report.has_tokenizer:
        lines.append("  no tokenizer in the source: add model.tokenizer=DIRECTORY_OR_HUB_ID to include one")
    lines.append(f"next: python -m pregate.eval checkpoint={report.output} reference={source}")
    return "\n".join(lines)


if __name__ == "__main__":
    entry_point(work)
