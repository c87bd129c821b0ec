"""Every committed result is still read and rendered, with the figures that its README gives."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pregate.cli import compose_run
from pregate.measure.bench.plots import PLOTS, plot_bench
from pregate.measure.bench.table import write_bench
from pregate.measure.report.evaluation_tables import ENGINE_FIGURES, engine_table, score_table
from pregate.measure.report.page import write_report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def found(name: str) -> list[Any]:
    files = sorted(RESULTS.rglob(name))
    assert files
    return [pytest.param(file.parent, id=str(file.parent.relative_to(RESULTS))) for file in files]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(text: str) -> list[list[str]]:
    """The cells of every line of a Markdown table, however wide its columns are."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("folder", found("bench.jsonl"))
def test_a_benchmark_says_what_its_readme_says(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    write_bench(tmp_path / "bench.md", rows, compose_run([]), {})
    committed = (folder / "README.md").read_text()
    title, *made = (tmp_path / "bench.md").read_text().splitlines()
    assert title.startswith("# ") and made.pop() == "Environment: ."
    for line in made:
        assert line in committed.splitlines(), line
    tables = [line for line in committed.splitlines() if line.startswith("|")]
    assert [line for line in made if line.startswith("|")] == tables and tables


@pytest.mark.parametrize("folder", found("bench.jsonl"))
def test_a_benchmark_has_the_plots_that_are_committed(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]
    drawn = plot_bench(rows, tmp_path / "plots")
    assert {path.name for path in drawn.values()} == {path.name for path in (folder / "plots").iterdir()}
    assert {*drawn} <= {plot.name for plot in PLOTS}


def test_the_suite_says_what_its_readme_says() -> None:
    suite_table = script("suite_table")
    folder = RESULTS / "gpu_h200_2026-11-26"
    made, committed = suite_table.suite_markdown(suite_table.read_rows(folder)), (folder / "README.md").read_text()
    table = cells(made)
    assert table == cells(committed)[: len(table)]
    shares = [line for line in made.splitlines() if " ÷ gpu_only, " in line]
    assert len(shares) == 4 and all(line in committed.splitlines() for line in shares)


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", text)]


def all_numbers(rows: Sequence[Sequence[str]]) -> list[float]:
    return sorted(numbers("; ".join(cell for row in rows for cell in row[1:])))


@pytest.mark.parametrize("folder", found("eval.json"))
def test_an_evaluation_has_the_figures_of_its_readme(folder: Path, tmp_path: Path) -> None:
    committed = cells((folder / "README.md").read_text())
    evaluation = json.loads((folder / "eval.json").read_text())
    write_report(tmp_path / "report.html", evaluation, [], {})
    assert "<h2>Offloaded inference</h2>" in (tmp_path / "report.html").read_text()
    scores, engine = score_table(evaluation), engine_table(evaluation, [*ENGINE_FIGURES][:7])
    assert scores is not None and engine is not None
    times = {row[0]: numbers("; ".join(row[1:5])) for row in committed if row[0] in evaluation["engine"]}
    for policy, row in zip(evaluation["engine"], engine.rows, strict=True):
        assert numbers("; ".join(row[1:5])) == pytest.approx(times[policy], abs=0.5), policy
        assert row[-1] == "yes"
    told = sorted(
        numbers(" ".join(" ".join(row[1:]) for row in committed if row[0].startswith(("pre-", "ref", "diff"))))
    )
    assert sorted(numbers(" ".join(" ".join(row[1:]) for row in scores.rows))) == pytest.approx(told, abs=0.051)


@pytest.mark.parametrize("folder", found("eval.json"))
def test_a_result_can_be_saved_again(folder: Path) -> None:
    committed = (folder / "README.md").read_text().splitlines()
    made = script("save_result").readme(folder, "Note.", {})
    command = next(line for line in made.splitlines() if line.startswith("python -m pregate.train"))
    assert any(line.endswith(command) for line in committed)
    for line in made.splitlines():
        if line.startswith(("train:", "source_train:", "Engine:", "Environment:")):
            assert line in committed, line
    assert not re.search(r"\bnan\b|None", made)
