"""README and plots of a study nobody ran: complete, partial, and of one cell."""

from __future__ import annotations

import re
from pathlib import Path

from pregate.measure.study.cells import SIZES, plan
from pregate.measure.study.records import add_baselines, append_record
from pregate.measure.study.tables import render
from tests.measure.study.synthetic import synthetic_records

CELLS = plan(SIZES["nano"])


def rendered(folder: Path, records: list[dict]) -> str:
    for record in records:
        append_record(folder, record)
    add_baselines(folder, "sst2", {"most frequent label": {"accuracy": 50.9174}})
    render(folder, "nano", CELLS)
    return (folder / "README.md").read_text()


def test_a_whole_study(tmp_path: Path) -> None:
    text = rendered(tmp_path, synthetic_records())
    assert f"{len(CELLS)} of {len(CELLS)} cells." in text and "Missing" not in text
    assert "- (b) shifted, untrained: worse by 24.6 points" in text
    assert "57 % of what the shift lost, in 3.9 % of fine-tuning's time" in text
    assert "| *most frequent label* | – | 50.9 |" in text
    assert "| 3, (d) pre-gated, lookahead 3 | 3 |" in text
    assert "| (b) shifted, untrained | 100 | 35 | 30 | 39 |" in text
    assert (
        "OUT=runs/repeat/results WORK=runs/repeat ONLY=sst2_conventional_s1 ./scripts/reproduce_accuracy.sh nano"
        in text
    )
    assert text.count("Environment: torch 2.6, cores 2.") == 1 and "Commit: 0123456789ab." in text
    assert "None" not in text and not re.search(r"\bnan\b", text)
    for name in ("lookahead", "agreement", "curves"):
        assert f"plots/{name}.png" in text
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_has_only_begun(tmp_path: Path) -> None:
    text = rendered(tmp_path, synthetic_records()[:2])
    assert f"2 of {len(CELLS)} cells. Missing: sst2_shifted_s1, " in text
    assert "| (a) conventional | 1 |" in text and "How far ahead" not in text
    assert not (tmp_path / "plots" / "lookahead.png").exists() and "lookahead.png" not in text
    assert "None" not in text


def test_nothing_at_all(tmp_path: Path) -> None:
    tmp_path.joinpath("cells.jsonl").touch()
    render(tmp_path, "nano", CELLS)
    assert f"0 of {len(CELLS)} cells." in (tmp_path / "README.md").read_text()
