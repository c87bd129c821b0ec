"""The comparison with transformers' Trainer: its figures, and that both sides learn the same from the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from studies.training_speed.__main__ import main
from studies.training_speed.tables import markdown, summary


def block(seconds: float, losses: list[float], tokens: int = 100) -> dict[str, object]:
    return {"seconds": seconds, "cpu_seconds": 2 * seconds, "losses": losses, "tokens": tokens}


def test_figures_of_a_row_against_hand_values() -> None:
    pairs = [
        [block(50.0, [4.0]), block(1.0, [4.0])],  # warms up: its times do not count, its losses do
        [block(1.0, [3.0]), block(2.0, [3.5])],
        [block(1.0, [2.0]), block(8.0, [2.25])],
    ]
    found = summary(pairs)
    assert found["tokens_per_s"] == pytest.approx(100.0) and found["stock_tokens_per_s"] == pytest.approx(20.0)
    assert found["ratio"] == pytest.approx(4.0) == pytest.approx(found["cpu_ratio"])  # the geometric mean of 2 and 8
    assert (found["ratio_low"], found["ratio_high"]) == pytest.approx((2.0, 8.0))
    assert found["loss_difference"] == pytest.approx(-0.25)
    assert found["loss_difference_error"] == pytest.approx(0.25 / 3**0.5)
    record = {"family": "switch", "num_experts": 8, "stock": "eager", "precision": "bf16", "device": "cpu", **found}
    line = next(line for line in markdown([record], {}).splitlines() if line.startswith("| switch"))
    assert [cell.strip() for cell in line.strip("|").split("|")][4:9] == ["100", "20.0", "4.00", "2.00 to 8.00", "4.00"]


@pytest.mark.slow
def test_a_dry_run_goes_on_where_it_stopped_and_both_sides_begin_with_the_same_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["switch_8_eager", "olmoe_8_grouped_mm"]
    for count, seconds in (
        (1, "1000"),
        (2, "0"),
    ):  # steps that take longer than the time for a row give an interval too
        main(["--out", str(tmp_path), "--dry", "--seconds", seconds, "--precision", "fp32", "--rows", *rows[:count]])
    records = [json.loads(line) for line in (tmp_path / "training_speed.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == rows
    assert [record["steps"] for record in records] == [4, 3] and records[1]["pairs"] == 2
    for record in records:
        assert record["ratio"] > 0
        ours, stock = record["blocks"][0]
        # the first loss has seen no update: equal but for the dropout of Switch
        assert ours["losses"][0] == pytest.approx(stock["losses"][0], rel=0.1 if record["family"] == "switch" else 1e-5)
        assert ours["tokens"] > 0
    shown = capsys.readouterr().out
    assert "| switch |" in shown and "| olmoe" in shown and (tmp_path / "training_speed.png").is_file()
