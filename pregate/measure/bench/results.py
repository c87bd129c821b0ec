"""The rows of a benchmark so far, each in `bench.jsonl` as soon as it is measured, with the command that did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pregate.config import UsageError
from pregate.measure.bench.grid import RowSpec
from pregate.measure.bench.models import BenchModel
from pregate.measure.bench.table import short_figures
from pregate.models.finite import WHAT_TO_CHECK
from pregate.system.console import say
from pregate.system.durable import append_line, read_lines, to_jsonable, write_lines
from pregate.tracking import Tracker

ROWS = "bench.jsonl"
SCRATCH = "scratch"
REPLACED = ("config.yaml", "bench.md", SCRATCH, "plots", "traces", "checkpoint")
"""What a benchmark writes anew, or removes at its end, and a model."""
FIGURES = ("ttft_ms", "tpot_ms", "tokens_per_s", "block_ms", "exposed_ms_per_token", "over_floor", "peak_device_bytes")


@dataclass
class Results:
    """`total`: how many rows there will be."""

    path: Path
    total: int
    command: str
    tracker: Tracker
    rows: list[dict[str, Any]] = field(default_factory=list)

    def begin(self) -> None:
        """Write the file without a torn last line."""
        write_lines(self.path, self.rows)

    @staticmethod
    def mark(run_dir: Path) -> None:
        """Make a directory a benchmark's, so that one that is stopped before its first row is resumed."""
        (run_dir / ROWS).touch()

    def find(self, spec: RowSpec) -> dict[str, Any] | None:
        return next((row for row in self.rows if RowSpec.of(row) == spec), None)

    def add(self, row: dict[str, Any]) -> None:
        plain = to_jsonable({**row, "command": self.command})
        append_line(self.path, plain)
        self.rows.append(plain)
        spec = RowSpec.of(plain)
        sentence = spec.sentence()
        say(f"{len(self.rows)} of {self.total}: {sentence}: {short_figures(plain)}")
        label = f"{sentence} {spec.dtype}".replace(" ", "_")
        self.tracker.log({f"bench/{label}/{k}": plain[k] for k in FIGURES if plain.get(k) is not None}, len(self.rows))


def earlier_rows(run_dir: Path, resume: bool) -> list[dict[str, Any]]:
    """The rows that lie in the run directory. Raises `UsageError` unless they, or nothing, may lie there."""
    path = run_dir / ROWS
    if not path.is_file():
        taken = next((name for name in REPLACED if (run_dir / name).exists()), None)
        if taken is not None:
            raise UsageError(f"{run_dir} holds a {taken} that is no benchmark's: choose name=NAME or run_dir=DIR.")
        return []
    rows = read_lines(path)
    if rows and not resume:
        raise UsageError(f"{path} holds {len(rows)} rows: go on with resume=true, or choose another run_dir=DIR.")
    return rows


def refuse_other_rows(rows: Sequence[dict[str, Any]], model: BenchModel, device: str) -> None:
    """Raises `UsageError` if rows that bear the name and the gates of `model` were measured with other weights, or on
    another kind of device. Rows that do not say count as alike."""
    gating = model.gating
    mine = {"model": model.name, "dtype": model.dtype_name, "blocks": model.blocks, "gates": model.gates}
    mine |= {"lookahead": gating.lookahead, "entry": str(gating.entry)}
    for row in rows:
        if any(row.get(name) != value for name, value in mine.items()):
            continue
        for name, now in (("fingerprint", model.fingerprint), ("device", device)):
            if row.get(name, now) != now:
                other = f"on {row[name]}" if name == "device" else "with other weights or another geometry"
                raise UsageError(f"The rows of {model.name} were measured {other}: choose another run_dir=DIR.")


def refuse_not_finite(rows: Sequence[dict[str, Any]], out_dir: Path) -> None:
    """Raises `UsageError` for rows with logits that are not finite. They are kept, and the tables say so."""
    broken = [row for row in rows if row.get("logits_finite") is False]
    if broken:
        raise UsageError(
            f"The logits of {len(broken)} of {len(rows)} rows are NaN or infinite, first of "
            f"{RowSpec.of(broken[0]).sentence()} (see {out_dir / 'bench.md'}): {WHAT_TO_CHECK}."
        )
