"""The tutorial runs as printed, from the first block to the last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "python", "bash"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, text in blocks:
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        if "decode" in text:
            assert done.stdout.strip()
    assert {
        "config.yaml",
        "metrics.jsonl",
        "source",
        "checkpoint",
        "eval.json",
        "predictions.jsonl",
        "report.html",
    } <= {path.name for path in (tmp_path / "runs" / "tutorial").iterdir()}


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 150
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md", "docs/how_it_works.md", "docs/accuracy.md"])
def test_settings_named_in_the_docs_exist(page: str) -> None:
    """Every `section.key` of a setting in backticks or a command is one of the schema's."""
    from pregate.overrides import known_keys

    known = set(known_keys())
    text = (ROOT / page).read_text()
    named = set(
        re.findall(r"\b((?:train|source_train|eval|engine|bench|task|tracking|pregate|model|data)\.[a-z_.]+)=", text)
    )
    for setting in named:
        parent = setting.rpartition(".")[0]
        assert setting in known or parent in {"task.files", "task.columns", "model.geometry"}, setting
