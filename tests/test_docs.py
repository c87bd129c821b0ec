"""The docs hold: the tutorial and the README's example run as printed, links lead somewhere, and settings and commands
that are named exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch.distributed.elastic.utils.distributed import get_free_port

from pregate.models.family import BUILT_IN, Family, family_named
from pregate.overrides import known_keys
from tests.models.families.test_decoder_only import FAMILIES

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
@pytest.mark.timeout(900)
def test_the_tutorial_and_the_example_of_the_readme_run(tmp_path: Path) -> None:
    blocks = BLOCK.findall(text_of("docs/tutorial.md"))
    assert [language for language, _ in blocks] == ["bash", "bash", "python", "python", "bash", "bash", "python"]
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


FEW_STEPS = (
    "train.steps=2 train.warmup_steps=0 source_train.steps=2 source_train.warmup_steps=0 train.eval_examples=4 "
    "source_train.eval_examples=4 tracking=jsonl then_eval=false"
)
STAND_INS = {
    "scontrol": "echo localhost",
    "srun": '"$@" & "$@" & wait -n; wait -n',
    "sbatch": (
        'while [[ "$1" == --* ]]; do shift 2; done; script=$1; shift; '
        'SLURM_NNODES=2 SLURM_JOB_NODELIST=two SLURM_JOB_ID=7 SLURM_GPUS_ON_NODE=1 exec bash "$ROOT/$script" "$@"'
    ),
}
"""For SLURM's commands: two machines are two processes here."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_for_a_cluster_start_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few steps, on the CPU, and without a cluster. `+launcher=slurm` is composed in `test_cli`."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in STAND_INS.items():
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bin_dir / name).chmod(0o755)
    (tmp_path / "scripts").mkdir()
    script = text_of("scripts/slurm_train.sh").replace("29400", str(get_free_port()))
    (tmp_path / "scripts" / "slurm_train.sh").write_text(script)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    for name, value in {"ROOT": str(tmp_path), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    blocks = [text.replace("switch_large_squad", "quickstart") for _, text in BLOCK.findall(text_of("docs/cluster.md"))]
    assert len(blocks) == 6 and "+launcher=slurm" in blocks.pop()
    for block in blocks:
        joined = block.replace("\\\n", " ").replace("29400", str(get_free_port()))
        commands = [f"{line} {FEW_STEPS}" if "+experiment" in line else line for line in joined.splitlines()]
        text = "\n".join(commands)
        run("bash", f"({text}) &\n({text}) &\nwait -n\nwait -n" if "--nnodes" in text else text, tmp_path)
    found = {
        path.parents[1].name: json.loads(path.read_text()) for path in tmp_path.glob("runs/*/last/train_state.json")
    }
    assert {name: len(state["random"]) for name, state in found.items()} == dict.fromkeys(
        ("two", "accelerate", "parts", "machines", "quickstart"), 2
    )
    assert {name for name, state in found.items() if state.get("parts") == 2} == {"parts", "machines", "quickstart"}
    swept = tmp_path / "runs" / "quickstart_sweep"
    seeds = [OmegaConf.load(swept / job / "config.yaml").seed for job in ("0", "1")]
    losses = [json.loads((swept / job / "summary.json").read_text())["train"]["metrics"]["train/loss"] for job in "01"]
    assert seeds == [0, 1] and losses[0] != losses[1]


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


# --- the table of families ------------------------------------------------------------------------------------------

READ_FROM_FP8 = {row.family.source_type for row in FAMILIES.values()}
"""What `test_every_family_is_read_from_block_fp8` looks at."""


def table_of_families() -> dict[str, list[str]]:
    """`model_type` -> the cells of its row behind it."""
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|(.+)\|$", text_of("docs/families.md"), re.MULTILINE)
    return {model_type: [cell.strip() for cell in cells.split("|")] for model_type, cells in rows}


def layouts_of(family: Family) -> list[str]:
    """The words of the table for the layouts in which experts are read."""
    spec = family.experts(family.config({"model_type": family.source_type}))
    stack, layers = list(spec.layers.items())[-1]
    words = []
    for layout in spec.layouts:
        parts = layout(stack, layers[-1], 0)
        transposed = " and transposed" if any(part.transposed for part in parts) else ""
        words.append(("fused" if any(part.index for part in parts) else "separate") + transposed)
    return sorted(words)


def geometries_of(family: Family) -> set[str]:
    """The members of the model group with this family and a geometry."""
    files = sorted((ROOT / "configs" / "model").glob("*.yaml"))
    members: dict[str, Any] = {file.stem: OmegaConf.load(file) for file in files}
    return {
        name
        for name, member in members.items()
        if member.get("geometry") and member.get("family", "switch_transformers") == family.source_type
    }


def test_the_table_of_families_names_all_of_them() -> None:
    assert sorted(table_of_families()) == sorted(BUILT_IN)


@pytest.mark.parametrize("model_type", BUILT_IN)
def test_the_table_of_families_says_what_the_code_does(model_type: str) -> None:
    family = family_named(model_type)
    _, layouts, quantised, packing, captured, geometries = table_of_families()[model_type]
    assert layouts == ", ".join(layouts_of(family))
    # MXFP4 tensors are decoded to matrices that stand the other way round
    forms = {"fp8": model_type in READ_FROM_FP8, "MXFP4": "fused and transposed" in layouts_of(family)}
    assert quantised == (", ".join(form for form, is_read in forms.items() if is_read) or "no")
    assert packing == ("yes" if family.objective.packs else "no")
    assert captured == ("no" if family.step is None else "yes")
    named, found = set(re.findall(r"`([a-z0-9_]+)`", geometries)), geometries_of(family)
    if "`switch_…`" in geometries:
        found = {name for name in found if not name.startswith("switch_")}
    assert named == found
