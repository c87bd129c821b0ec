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
from pathlib import Path
from typing import Any

import yaml

FILES = ("config.yaml", "metrics.jsonl", "eval.json", "summary.json", "conversion.json")
ENGINE = {
    "ttft_ms": ("TTFT, ms", "{:.1f}"),
    "tpot_ms": ("TPOT, ms", "{:.2f}"),
    "tokens_per_s": ("tokens/s", "{:.1f}"),
    "block_ms": ("block, ms", "{:.2f}"),
    "exposed_ms_per_token": ("waiting, ms/token", "{:.2f}"),
    "bytes_moved": ("moved, MB", "{:.1f}"),
    "peak_device_bytes": ("peak, MB", "{:.1f}"),
    "tokens_equal_resident": ("tokens equal", "{}"),
    "logits_max_diff": ("logits differ by", "{:.2g}"),
}


def table(headers: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, rule, *rows])


def score_table(evaluation: dict[str, Any]) -> str:
    rows = []
    labels = {"pre_gated": evaluation.get("checkpoint_label", "pre_gated")}
    for model, scores in evaluation["scores"].items():
        for metric, value in scores.items():
            low, high = evaluation["intervals"][model][metric]
            rows.append(
                [f"{labels.get(model, model).replace('_', '-')} {metric}", f"{value:.2f}", f"[{low:.2f}, {high:.2f}]"]
            )
    for metric in evaluation["scores"]["pre_gated"]:
        if f"{metric}_delta" in evaluation.get("parity", {}):
            low, high = evaluation["parity"][f"{metric}_delta_interval"]
            delta = f"{evaluation['parity'][f'{metric}_delta']:+.2f}"
            rows.append([f"difference {metric}", delta, f"[{low:+.2f}, {high:+.2f}]"])
    return table(["score", "%", "95 % interval"], rows)


def engine_table(engine: dict[str, Any]) -> str:
    def cell(record: dict[str, Any], key: str, form: str) -> str:
        if key not in record:
            return "–"
        value = record[key] / 1e6 if key.endswith("bytes") or key == "bytes_moved" else record[key]
        return form.format(str(value).lower() if isinstance(value, bool) else value)

    rows = [
        [policy, *(cell(record, key, form) for key, (_, form) in ENGINE.items())] for policy, record in engine.items()
    ]
    return table(["policy", *(head for head, _ in ENGINE.values())], rows)


def pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, dict))


def readme(run_dir: Path, note: str, settings: dict[str, str]) -> str:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    evaluation = json.loads((run_dir / "eval.json").read_text())
    summary_file = run_dir / "summary.json"
    summary = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
    prefix = "".join(f"{key}={value} " for key, value in settings.items())
    command = f"{prefix}python -m pregate.train {shlex.join(config['overrides'])}"
    conversion_file = run_dir / "conversion.json"
    git = evaluation["environment"].get("git", {})
    parts = [
        f"# {run_dir.name}",
        note,
        f"```\n{command}\n```",
        f"{evaluation['task']}, {evaluation['split']} split, {evaluation['num_examples']} examples.",
        score_table(evaluation),
    ]
    for stage in ("source_train", "train"):
        if stage in summary:
            facts = summary[stage]
            line = (
                f"{stage}: {facts['steps']} steps in {facts['seconds']:.0f} s, {facts['target_tokens']} target tokens"
            )
            if facts.get("peak_device_bytes"):
                line += f", peak memory {facts['peak_device_bytes'] / 1e9:.2f} GB"
            parts.append(line + ".")
    agreement = evaluation.get("routing", {}).get("agreement", {})
    for stack, blocks in agreement.items():
        parts.append(f"Routing agreement, {stack}: " + ", ".join(f"{100 * value:.0f} %" for value in blocks) + ".")
    if conversion_file.is_file():
        rows = [
            [f"`{row['command']}`", f"{row['seconds']:.1f}", f"{row['peak_resident_bytes'] / 1e9:.2f}"]
            for row in json.loads(conversion_file.read_text())
        ]
        parts.append(table(["conversion, whole process", "seconds", "peak resident, GB"], rows))
    parts += [
        engine_table(evaluation["engine"]),
        f"Engine: {pairs(evaluation['engine_settings'])}.",
        f"Environment: {pairs(evaluation['environment'])}; commit {git.get('commit', 'unknown')}"
        + (" with uncommitted changes" if git.get("dirty") else "")
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


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
