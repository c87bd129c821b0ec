"""The docs hold: the tutorial and the README's example run as printed, links lead somewhere, and settings and commands
that are named exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pregate.overrides import known_keys

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
FREE = {"task.files", "task.columns", "model.geometry"}
"""Sections whose keys the user chooses."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Of every heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(language: str, text: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.mark.slow
def test_the_tutorial_and_the_example_of_the_readme_run(tmp_path: Path) -> None:
    blocks = BLOCK.findall(text_of("docs/tutorial.md"))
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "python", "bash"]
    [example] = [text for language, text in BLOCK.findall(text_of("README.md")) if language == "python"]
    blocks.append(("python", example.replace('"DIR"', '"runs/tutorial/checkpoint"')))
    for language, text in blocks:
        printed = run(language, text, tmp_path)
        assert printed or "decode" not in text
    assert {
        "config.yaml",
        "metrics.jsonl",
        "source",
        "checkpoint",
        "eval.json",
        "predictions.jsonl",
        "report.html",
    } <= {path.name for path in (tmp_path / "runs" / "tutorial").iterdir()}


def test_the_readme_is_short() -> None:
    assert text_of("README.md").count("\n") < 110


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    found = LINK.findall(text_of(page))
    assert found
    for target, anchor in found:
        if target.startswith("http"):
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_no_merge_was_left_half_done(page: str) -> None:
    assert not re.findall(r"^(?:<{7}|={7}|>{7})", text_of(page), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_settings_named_in_the_docs_exist(page: str) -> None:
    """Every `section.key` of a setting in backticks or a command is one of the schema's."""
    known = set(known_keys())
    sections = "train|source_train|eval|engine|bench|task|tracking|pregate|model|data|calibration"
    for setting in set(re.findall(rf"\b((?:{sections})\.[a-z_.]+)=", text_of(page))):
        assert setting in known or setting.rpartition(".")[0] in FREE, setting


@pytest.mark.parametrize("page", PAGES)
def test_commands_named_in_the_docs_exist(page: str) -> None:
    """Modules that are run, scripts, experiments and files of the repository."""
    text = text_of(page)
    for module in re.findall(r"python -m ((?:pregate|studies)\.[\w.]*\w)", text):
        assert importlib.util.find_spec(module) is not None, module
    for experiment in re.findall(r"\+experiment=([a-z_0-9]+)\b", text):
        assert (ROOT / "configs" / "experiment" / f"{experiment}.yaml").exists(), experiment
    for script in re.findall(r"\./(scripts/[\w.]+)", text):
        assert os.access(ROOT / script, os.X_OK), script
    for target in re.findall(r"scripts/test\.sh (tests[\w/.]*)", text):
        assert (ROOT / target).exists(), target
