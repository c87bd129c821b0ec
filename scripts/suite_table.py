#!/usr/bin/env python3
"""One short table of all benchmark rows under a directory, and their figures beside the paper's.

    python scripts/suite_table.py runs/gpu_suite [--out runs/gpu_suite/suite.md]

Reads every bench.jsonl there; a figure that is in none of them does not appear.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pregate.measure.bench.paper import beside_the_paper, share_of_gpu_only
from pregate.measure.table_format import CellWriter, Row, Table, short, text


def read_rows(folder: Path) -> list[Row]:
    """All rows under `folder`, part by part; the last line of a part that was cut short may be torn."""
    rows = []
    for path in sorted(folder.rglob("bench.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                print(f"{path}: a torn line is left out", file=sys.stderr)
    return rows


def with_times_accelerate(row: Row, rows: Sequence[Row]) -> Row:
    """The row with its tokens/s over those of Accelerate's offload of the same model and load from the same tier."""
    keys = ("model", "dtype", "batch", "tier", "prompt_len")
    for other in rows:
        if other["policy"] == "accelerate" and all(other.get(key) == row.get(key) for key in keys):
            return {**row, "times_accelerate": row["tokens_per_s"] / other["tokens_per_s"]}
    return row


COLUMNS: dict[str, CellWriter] = {
    "model": lambda row: f"{row['model']}, {row['dtype']}",
    "drive": text("drive"),
    "policy": text("policy"),
    "slabs": text("slab_dtype"),
    "cache": text("cache"),
    "batch": text("batch"),
    "tokens/s": short("tokens_per_s"),
    "÷ floor": short("over_floor"),
    "× Accelerate": short("times_accelerate"),
    "GB/s": short("link_gb_per_s"),
    "peak GB": short("peak_device_bytes", 1e9),
}


def suite_markdown(rows: Sequence[Row]) -> str:
    parts = [Table.of(COLUMNS, [with_times_accelerate(row, rows) for row in rows], left=5).markdown()]
    for field, what in (("tokens_per_s", "tokens/s"), ("peak_device_bytes", "peak memory")):
        for kind, (share, models) in share_of_gpu_only(rows, field).items():
            over = f"geometric mean over {', '.join(models)}"
            parts.append(f"{what} of pre_gated ÷ gpu_only, {', '.join(kind)}: {100 * share:.1f} % ({over}).")
    return "\n\n".join([*parts, beside_the_paper(rows)]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="write the Markdown here too")
    arguments = parser.parse_args()
    rows = read_rows(arguments.folder)
    if not rows:
        sys.exit(f"{arguments.folder} holds no bench.jsonl with a row: run scripts/gpu_suite.sh first.")
    markdown = suite_markdown(rows)
    if arguments.out is not None:
        arguments.out.write_text(markdown, encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    main()
