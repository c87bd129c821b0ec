#!/usr/bin/env python3
"""Keep the figures of a finished run under results/: raw files, the tables made from them, and how to repeat it.

    python scripts/save_result.py runs/nano_sst2 results/nano_sst2_cpu_2026-11-22 "What this run shows."

Copies config.yaml, metrics.jsonl, eval.json and summary.json, and writes README.md from them alone: a figure that is
not in those files does not appear.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pregate.measure.report.evaluation_tables import ENGINE_FIGURES, engine_table, percent, score_table
from pregate.measure.table_format import CellWriter, Table, facts_line, number

FILES = ("config.yaml", "metrics.jsonl", "eval.json", "summary.json", "conversion.json")
CONVERSION: dict[str, CellWriter] = {
    "conversion, whole process": lambda row: f"`{row['command']}`",
    "seconds": number("seconds"),
    "peak resident, GB": number("peak_resident_bytes", 1e9),
}


def readme(run_dir: Path, note: str, settings: Mapping[str, str]) -> str:
    return "\n\n".join(paragraphs(run_dir, note, settings)) + "\n"


def paragraphs(run_dir: Path, note: str, settings: Mapping[str, str]) -> Iterator[str]:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    evaluation, summary = load(run_dir / "eval.json", {}), load(run_dir / "summary.json", {})
    prefix = "".join(f"{key}={value} " for key, value in settings.items())
    yield f"# {run_dir.name}"
    yield note
    yield f"```\n{prefix}python -m pregate.train {shlex.join(config['overrides'])}\n```"
    yield f"{evaluation['task']}, {evaluation['split']} split, {evaluation['num_examples']} examples."
    if scores := score_table(evaluation):
        yield scores.markdown()
    yield from (stage_line(stage, summary[stage]) for stage in ("source_train", "train") if stage in summary)
    for stack, shares in evaluation.get("routing", {}).get("agreement", {}).items():
        yield f"Routing agreement, {stack}, %: {', '.join(map(percent, shares))}."
    if conversion := load(run_dir / "conversion.json", []):
        yield Table.of(CONVERSION, conversion).markdown()
    if engine := engine_table(evaluation, list(ENGINE_FIGURES)):
        yield engine.markdown()
        yield f"Engine: {facts_line(evaluation['engine_settings'])}."
    yield f"Environment: {facts_line(evaluation['environment'])}."


def load(file: Path, otherwise: Any) -> Any:
    return json.loads(file.read_text()) if file.is_file() else otherwise


def stage_line(name: str, facts: Mapping[str, Any]) -> str:
    line = f"{name}: {facts['steps']} steps in {facts['seconds']:.0f} s, {facts['target_tokens']} target tokens"
    peak = facts.get("peak_device_bytes")
    return line + (f", peak memory {peak / 1e9:.2f} GB." if peak else ".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("result_dir", type=Path)
    parser.add_argument("note")
    parser.add_argument("--env", action="append", default=[], help="KEY=VALUE that stood before the command")
    arguments = parser.parse_args()
    arguments.result_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (arguments.run_dir / name).is_file():
            shutil.copyfile(arguments.run_dir / name, arguments.result_dir / name)
    settings = dict(item.split("=", 1) for item in arguments.env)
    (arguments.result_dir / "README.md").write_text(readme(arguments.run_dir, arguments.note, settings))


if __name__ == "__main__":
    main()
