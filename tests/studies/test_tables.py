"""README and plots of a study nobody ran: complete, partial, and of one cell."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pregate.system.durable import write_json
from studies.accuracy.arms_and_seeds import SIZES, all_cells
from studies.accuracy.records import STUDY, add_baselines, append_record
from studies.accuracy.statistics import summaries
from studies.accuracy.tables import command_of, render, study_markdown
from tests.studies.synthetic import synthetic_records

CELLS = all_cells(SIZES["nano"])


def rendered(folder: Path, records: list[dict]) -> str:
    for record in records:
        append_record(folder, record)
    add_baselines(folder, "sst2", {"most frequent label": {"accuracy": 50.9174}})
    render(folder, "nano", CELLS)
    return (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of all cells, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("whole")
    rendered(folder, synthetic_records())
    return folder


def test_a_whole_study(whole: Path) -> None:
    text = (whole / "README.md").read_text()
    assert f"{len(CELLS)} of {len(CELLS)} cells." in text and "Missing" not in text
    assert "- (b) shifted, untrained: worse by 24.6 points" in text
    assert "57 % of what the shift lost, in 3.9 % of fine-tuning's time" in text
    assert "| *most frequent label* | – | 50.9 |" in text
    assert "| 3, (d) pre-gated, lookahead 3 | 3 |" in text
    assert "| (b) shifted, untrained | 100 | 35 | 30 | 39 |" in text
    assert f"OUT={whole}" not in text and "OUT=results" not in text, "nothing is missing there"
    assert (
        "OUT=runs/repeat/results WORK=runs/repeat ONLY=sst2_conventional_s1 ./scripts/reproduce_accuracy.sh nano"
        in text
    )
    assert text.count("Environment: torch 2.6, cores 2, torch_threads 1.") == 1 and "Commit: 0123456789ab." in text
    assert "None" not in text and not re.search(r"\bnan\b", text)
    for name in ("lookahead", "agreement", "curves"):
        assert f"plots/{name}.png" in text
        assert (whole / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def rows_of(text: str, title: str) -> list[list[str]]:
    """The cells of the first table below a line that begins with `title`."""
    lines = text[text.index(title) :].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_arms_are_compared_with_what_they_change(whole: Path) -> None:
    """Gold: the synthetic scores, arm (e) minus arm (d) of each seed."""
    records, text = synthetic_records(), (whole / "README.md").read_text()
    scores = {record["cell"]: record["scores"].get("accuracy") for record in records if record["task"] == "sst2"}

    def each(arm: str, base: str) -> str:
        differences = [scores[f"sst2_{arm}_s{seed}"] - scores[f"sst2_{base}_s{seed}"] for seed in (1, 2, 3)]
        return " ".join(f"{value:+.1f}".replace("-", "−") for value in differences)

    heads, ours, *changed = rows_of(text, "One change to (d)")
    assert heads[4] == "difference from (d)" and ours[4:6] == ["–", "–"]
    assert [row[0] for row in changed][:2] == ["(e) pre-gated, distilled", "(d) pre-gated, random gates"]
    assert changed[0][5] == each("distilled", "pre_gated")
    heads, base, control, taught = rows_of(text, "What the teacher of (e) gives")
    assert [heads[4], heads[6]] == ["difference from (a)", "difference from (a) distilled"]
    assert (base[4:8], control[0]) == (["–"] * 2 + base[6:8], "(a) conventional, distilled")
    assert control[5] == each("distilled_n0", "conventional") and control[6:8] == ["–", "–"]
    assert [taught[5], taught[7]] == [each("distilled", "conventional"), each("distilled", "distilled_n0")]


def test_another_seed_is_a_yardstick_of_routes_and_no_arm(whole: Path) -> None:
    text = (whole / "README.md").read_text()
    name = "(a) of another seed"
    assert name in [row[0] for row in rows_of(text, "Routing agreement with (a) of the same seed")]
    assert name in [row[0] for row in rows_of(text, "Gate mass")]
    for title in ("200 examples of", "How far ahead", "One change to (d)", "What the teacher of (e)"):
        assert name not in [row[0] for row in rows_of(text, title)]
    assert f"- {name}" not in text, "it has no verdict"


def test_without_the_base_of_a_table_its_differences_are_dashes(tmp_path: Path) -> None:
    names = ("sst2_conventional_s1", "sst2_pre_gated_s2", "sst2_distilled_s1", "sst2_distilled_n0_s3")
    text = rendered(tmp_path, [record for record in synthetic_records() if record["cell"] in names])
    assert rows_of(text, "One change to (d)")[2][4:6] == ["–", "–"], "of no seed that both have"
    _, _, control, taught = rows_of(text, "What the teacher")
    assert control[4:8] == ["–"] * 4 and taught[6:8] == ["–"] * 2 and taught[4] != "–"


def test_a_change_is_shown_without_the_arm_that_it_changes(tmp_path: Path) -> None:
    names = ("sst2_conventional_s1", "sst2_pre_gated_init_calibrated_s1", "sst2_distilled_s1")
    records = [record for record in synthetic_records() if record["cell"] in names]
    heads, row = rows_of(rendered(tmp_path, records), "One change to (d) at a time, without (d) itself")
    scores = {record["arm"]: record["scores"]["accuracy"] for record in records}
    assert heads[4] == "difference from (a)" and row[0] == "(d) pre-gated, calibrated gates"
    assert row[5] == f"{scores['pre_gated'] - scores['conventional']:+.1f}".replace("-", "−")


def test_weights_that_an_arm_adds_are_told(tmp_path: Path) -> None:
    counts = {"sst2_conventional_s1": 1000, "sst2_pre_gated_s1": 1000, "sst2_pre_gated_mlp_s1": 3500}
    records = [record for record in synthetic_records() if record["cell"] in counts]
    text = rendered(tmp_path / "same", records)
    assert "weights added" not in text
    text = rendered(tmp_path / "more", [{**record, "parameters": counts[record["cell"]]} for record in records])
    heads, *rows = rows_of(text, "One change to (d)")
    assert heads[-1] == "weights added to (d)"
    assert {row[0]: row[-1] for row in rows} == {
        "(d) pre-gated": "0",
        "(d) pre-gated, gates with a small network": "2,500",
    }


def test_of_many_blocks_a_table_shows_the_extremes(tmp_path: Path) -> None:
    blocks = {"decoder": [None, *(0.9 - block / 100 for block in range(20)), 0.95]}
    [record] = [record for record in synthetic_records() if record["cell"] == "sst2_shifted_s1"]
    text = rendered(tmp_path, [{**record, "routing": {**record["routing"], "agreement": blocks}}])
    heads, row = rows_of(text, "Routing agreement")
    assert heads == ["arm", "decoder least (block)", "decoder most (block)", "mean"]
    assert row[1:] == ["71 (20)", "95 (21)", "81"]


def test_commands_say_where_and_with_how_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = rendered(tmp_path / "results" / "here", synthetic_records()[:2])
    assert "DIR OUT=results/here ./scripts/reproduce_accuracy.sh nano\n" in text
    assert "DIR OMP_NUM_THREADS=1 python -m pregate.train +arm=conventional\n" in text
    write_json(tmp_path / "results" / "here" / STUDY, {"size": "nano", "source": "owner/model"})
    text = rendered(tmp_path / "results" / "here", synthetic_records()[:2])
    assert "DIR OUT=results/here SOURCE=owner/model ./scripts/reproduce_accuracy.sh nano\n" in text
    own = {
        **synthetic_records()[1],
        "command": "python -m pregate.train model.source=runs/smollm2_moe/checkpoint seed=1",
    }
    assert command_of(own, "smollm2_moe").endswith(own["command"])
    assert command_of(own, "smollm2_moe", "runs/moved").endswith("pregate.train model.source=runs/moved seed=1")


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


def test_a_candidate_for_the_best_recipe_stands_beside_the_arms() -> None:
    """With its difference from (a), and among the changes with that from (d)."""
    wanted = [("conventional", ""), ("pre_gated", ""), ("pre_gated", "init_calibrated")]
    records = [r for r in synthetic_records() if r["task"] == "sst2" and (r["arm"], r["variant"]) in wanted]
    arms_of = {"sst2": summaries(records, "sst2")}
    candidate = "(d) pre-gated, calibrated gates"
    tables = {}
    for size in ("nano", "smollm2_moe"):
        text = study_markdown(records, arms_of, {}, size, all_cells(SIZES[size]))
        tables[size] = [rows_of(text, "examples of the"), rows_of(text, "One change to (d)")]
    (head, *arms), (changes_head, *changes) = tables["smollm2_moe"]
    assert any("difference from (a)" in cell for cell in head)
    assert any("difference from (d)" in cell for cell in changes_head)
    assert candidate in [row[0] for row in arms] and candidate in [row[0] for row in changes]
    assert candidate not in [row[0] for row in tables["nano"][0]]
