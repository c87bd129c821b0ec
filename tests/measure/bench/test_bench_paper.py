"""Measured rows beside the paper's, and the table of a whole suite."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pregate.measure.bench.paper import (
    BLOCK_MS,
    MODELS,
    PEAK_GB,
    POLICIES,
    TOKENS_PER_S,
    beside_the_paper,
    share_of_gpu_only,
)


def row(policy: str, tokens_per_s: float | None = None, model: str = "switch-base-64", **more: Any) -> dict[str, Any]:
    base = {"model": model, "dtype": "bfloat16", "policy": policy, "batch": 1}
    base |= {} if tokens_per_s is None else {"tokens_per_s": tokens_per_s}
    return {**base, "drive": "device", "slab_dtype": "source", "cache": "none", "tier": "dram", **more}


def narrow(text: str) -> str:
    """Without the spaces that align a table's columns."""
    return re.sub(r" +", " ", text)


def test_the_published_figures_say_what_the_paper_concludes_from_them() -> None:
    """Its text: pre-gated has 81 % of the tokens/s of gpu_only, a block 19 % slower, and 23.7 % of its memory."""
    published = {"tokens_per_s": TOKENS_PER_S, "block_ms": BLOCK_MS, "peak_device_bytes": PEAK_GB}
    shares = {}
    for field, figures in published.items():
        assert set(figures) == set(MODELS) and all(len(values) == len(POLICIES) for values in figures.values())
        rows = [
            row(policy, model=model, **{field: value})
            for model, values in figures.items()
            for policy, value in zip(POLICIES, values, strict=True)
            if value is not None
        ]
        ((shares[field], models),) = share_of_gpu_only(rows, field).values()
        assert models == list(MODELS[:4])
    assert shares == pytest.approx({"tokens_per_s": 0.79, "block_ms": 1.19, "peak_device_bytes": 0.237}, rel=0.03)


def test_only_plain_rows_of_batch_1_stand_beside_the_paper() -> None:
    rows = [
        row("gpu_only", 500.0),
        row("pre_gated", 400.0, new_tokens=256),
        row("pre_gated", 450.0, cache="lru"),
        row("pre_gated", 4000.0, batch=32),
        row("pre_gated", 333.0, slab_dtype="int8"),
        row("resident", 90.0, drive=None),
        row("pre_gated", 77.0, model="nano-switch"),
        row("pre_gated", 11.0, tier="disk"),
        row("pre_gated", 12.0, budget="20%"),
        row("pre_gated", 13.0, new_tokens=16),
        row("pre_gated", 14.0, new_tokens=512, blocks="2 of 6"),
        row("pre_gated", 15.0, new_tokens=512, lookahead=2),
    ]
    text = narrow(beside_the_paper(rows))
    assert "| switch-base-64 | the paper | 142 | 113 | 78 | 3 |" in text
    assert "| | bfloat16, device-driven, slabs source | 500 | 400 | – | – |" in text
    assert "| | bfloat16, device-driven, slabs int8 | – | 333 | – | – |" in text
    assert not any(
        number in text
        for number in (" 450 ", "4e+03", " 90 ", " 77 ", " 11 ", " 12 ", " 13 ", " 14 ", " 15 ", "Base-8")
    )
    assert "Figure 11" in text and "Figure 10" not in text, "nothing was measured for that one"
    assert beside_the_paper([]) == ""


@pytest.fixture
def suite_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[3] / "scripts" / "suite_table.py"
    spec = importlib.util.spec_from_file_location("suite_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_suite_table_reads_all_parts(
    tmp_path: Path, suite_table: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {
        "one": [
            row("accelerate", 10.0, drive=None, slab_dtype=None, cache=None),
            row("gpu_only", 500.0, peak_device_bytes=8e9),
        ],
        "two": [row("pre_gated", 400.0, peak_device_bytes=2e9, over_floor=1.1, link_gb_per_s=50.0)],
    }
    for name, rows in parts.items():
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(one) + "\n" for one in rows)
        (tmp_path / name / "bench.jsonl").write_text(lines + ('{"model": "sw' if name == "two" else ""))
    monkeypatch.setattr(sys, "argv", ["suite_table.py", str(tmp_path), "--out", str(tmp_path / "suite.md")])
    suite_table.main()
    text = (tmp_path / "suite.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    text = narrow(text)
    shown = "| switch-base-64, bfloat16 | device | pre_gated | source | none | 1 | 400 | 1.1 | 40 | 50 | 2 |"
    assert shown in text.splitlines(), text
    share = "tokens/s of pre_gated ÷ gpu_only, bfloat16, device-driven, slabs source: 80.0 %"
    assert f"{share} (geometric mean over switch-base-64)." in text
    assert "peak memory of pre_gated ÷ gpu_only, bfloat16, device-driven, slabs source: 25.0 %" in text
    assert "Figure 12" in text


def test_a_suite_without_rows_says_so(tmp_path: Path, suite_table: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["suite_table.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no bench\.jsonl with a row: run scripts/gpu_suite\.sh"):
        suite_table.main()
