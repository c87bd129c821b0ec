"""A built wheel finds its configs, and importing the package registers its models."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, as a non-editable installation lays it out."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out / "site")
    return out / "site"


def test_a_wheel_holds_configs_and_templates(installed: Path) -> None:
    expected = {p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml")}
    assert {p.relative_to(installed / "pregate" / "configs") for p in installed.rglob("*.yaml")} == expected
    templates = {p.relative_to(ROOT) for p in (ROOT / "pregate").rglob("templates/*")}
    assert {p.relative_to(installed) for p in installed.rglob("templates/*")} == templates
    assert {p.name for p in templates} >= {"report.html.j2", "report.css", "bench.md.j2"}


def test_an_installed_command_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pregate.convert", "+experiment=switch_base_squad"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ("pregate: Conversion needs two places: source=DIRECTORY_OR_HUB_ID output=NEW_DIRECTORY.\n")
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_registers_the_models() -> None:
    program = (
        "import pregate, transformers; "
        "config = transformers.AutoConfig.for_model('pregated_switch_transformers'); "
        "print(type(config).__name__, transformers.AutoModelForSeq2SeqLM._model_mapping[type(config)].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "PreGatedSwitchTransformersConfig",
        "PreGatedSwitchTransformersForConditionalGeneration",
    ]
