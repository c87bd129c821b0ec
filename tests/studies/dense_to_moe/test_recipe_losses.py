"""What recipes win back: the figures against hand values, and each kind of recipe run at tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pregate import convert, train
from pregate.cli import compose_run
from studies import recipe_losses
from studies.dense_to_moe.healing_text import packed_rows, read_texts
from studies.recipe_losses import COLUMNS, OWN, RECIPES, SHIFTED, main, with_differences


def row(name: str, losses: list[float], **more: Any) -> dict[str, Any]:
    return {"recipe": name, "losses": losses, "parameters": 100, "steps": 0, "agreement": 1.0, **more}


def test_figures_against_hand_values() -> None:
    rows = {
        OWN: row(OWN, [2.0, 4.0]),
        SHIFTED: row(SHIFTED, [6.0, 8.0], agreement=0.25),
        "calibrated_late": row("calibrated_late", [3.0, 5.0], parameters=130, calibration_seconds=7.5),
    }
    own, shifted, fitted = with_differences(rows)
    assert own["loss"] == 3.0 and "difference" not in own and "won_back" not in shifted
    assert (shifted["loss"], shifted["difference"], shifted["interval"]) == (7.0, 4.0, [4.0, 4.0])
    assert (fitted["difference"], fitted["won_back"], fitted["added"]) == (1.0, 0.75, 30)
    cells = {name: write(fitted) for name, write in COLUMNS.items()}
    assert cells["difference from the source"] == "+1.000 [+1.000, +1.000]" and cells["won back, %"] == "75"
    assert COLUMNS["routing agreement, %"](shifted) == "25"
    # what gates two blocks ahead win back is compared with gates that are moved as far
    assert (RECIPES["calibrated_2"].moved, RECIPES["gates_lora"].moved) == ("shifted_2", SHIFTED)


def test_recipes_are_measured_once_and_compared(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: starting Python anew takes longer than all that is measured."""
    called: list[str] = []

    def call(module: str, settings: list[str]) -> None:
        called.append(module)
        {"pregate.convert": convert.work, "pregate.train": train.main}[module](compose_run(settings))

    monkeypatch.setattr(recipe_losses, "call", call)
    results, work = tmp_path / "results" / "tiny", tmp_path / "work"
    names = [OWN, SHIFTED, "calibrated", "gates", "pre_gated", "calibrated_late"]
    arguments = [str(results), str(made), "--work", str(work), "--steps", "2", "--calibration-tokens", "200"]
    arguments += ["--measure-tokens", "96", "--recipes"]
    main([*arguments, *names[:3]])
    main([*arguments, *names])
    # gates start from the checkpoint that (c) has made
    assert called == ["pregate.convert", "pregate.convert", "pregate.train", "pregate.train", "pregate.convert"]
    rows = [json.loads(line) for line in (results / "recipes.jsonl").read_text().splitlines()]
    assert [row["recipe"] for row in rows] == names
    by_name = {row["recipe"]: row for row in rows}
    tokenizer = recipe_losses.AutoTokenizer.from_pretrained(made / "checkpoint")
    rows_BT = packed_rows(read_texts(made / "text", "validation"), tokenizer, 96, 32)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(made / "checkpoint", dtype=torch.float32).eval()
        wanted = [model(input_ids=row_T[None], labels=row_T[None]).loss.item() for row_T in rows_BT]
    assert by_name[OWN]["losses"] == pytest.approx(wanted, abs=1e-4) and by_name[OWN]["agreement"] == 1.0
    assert by_name[SHIFTED]["agreement"] < 1.0 and by_name[SHIFTED]["losses"] != by_name[OWN]["losses"]
    assert by_name["gates"]["steps"] == 2 and by_name["gates"]["calibration_seconds"] > 0
    assert by_name["gates"]["losses"] != by_name["calibrated"]["losses"]
    assert by_name["calibrated_late"]["parameters"] > by_name["calibrated"]["parameters"]
    page = (results / "README.md").read_text()
    assert "(f) calibrated gates, then trained" in page and (results / "losses.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, OWN, "--steps", "3"])
    assert "was begun with steps=2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(results), str(tmp_path / "nothing"), "--work", str(work)])
    assert "python -m studies.dense_to_moe first" in capsys.readouterr().err
