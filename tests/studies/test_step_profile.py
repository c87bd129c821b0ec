"""The profile of a step: its table, its traces and its command, on the CPU and, where there is one, a GPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from studies.profiles.step_profile import TABLE, main

SMALL = ["--model", "nano_switch", "--prompt-len", "8", "--new-tokens", "5"]


def profiled(folder: Path, capsys: pytest.CaptureFixture[str], device: str) -> str:
    main(["--out", str(folder), "--device", device, *SMALL, "--policies", "gpu_only", "on_demand"])
    text = (folder / TABLE).read_text()
    assert capsys.readouterr().out == text
    assert text.startswith("# Steps of nano-switch, bfloat16, source slabs\n")
    for policy in ("gpu_only", "on_demand"):
        assert f"## {policy}: " in text
        trace = gzip.decompress((folder / f"{policy}.json.gz").read_bytes())
        assert json.loads(trace)["traceEvents"], "Perfetto has something to show"
        assert str(folder).encode() not in trace, "no place of this machine"
    assert sorted(path.name for path in folder.iterdir()) == ["gpu_only.json.gz", "on_demand.json.gz", TABLE]
    return text


def test_on_the_cpu_the_reference_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = profiled(tmp_path / "new", capsys, "cpu")
    assert "aten::" in text and "no GPU" in text
    counts = [float(line.split("|")[2]) for line in text.splitlines() if line.startswith("| `aten::embedding`")]
    assert counts == [1, 1], "one lookup a step, for each policy"


@pytest.mark.gpu
def test_on_a_gpu_kernels_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = profiled(tmp_path, capsys, "cuda")
    gpu_only, on_demand = text.split("## on_demand")
    for name in ("add_norm_kernel", "attention_kernel", "slot_linear_kernel", "choose_kernel"):
        assert f"| `{name}` |" in gpu_only and f"| `{name}` |" in on_demand
    assert "gather_kernel" in on_demand and "gather_kernel" not in gpu_only


def test_an_unknown_model_is_told_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "new"), "--device", "cpu", "--model", "no_such"])
    assert stopped.value.code == 2
    assert "there is no such model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
