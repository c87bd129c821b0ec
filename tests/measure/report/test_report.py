import json
import re
import sys
from copy import deepcopy
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from pregate.measure.figure_style import WAIT
from pregate.measure.report import evaluation_plots as plots
from pregate.measure.report import evaluation_tables, page

VOID = {"meta", "img", "br", "link"}


def engine_row(tpot_ms, **more):
    return {
        "ttft_ms": 40.0,
        "tpot_ms": tpot_ms,
        "tokens_per_s": 1000 / tpot_ms,
        "block_ms": 1.5,
        "exposed_ms_per_token": 0.25 * tpot_ms,
        "peak_device_bytes": 31_457_280,
        "bytes_moved": 402_653_184,
        "hits": 168,
        "misses": 24,
        "tokens_equal_resident": True,
        **more,
    }


def full_evaluation():
    return {
        "task": "squad",
        "split": "validation",
        "num_examples": 1234,
        "checkpoint": "runs/a/checkpoint",
        "reference": "runs/a/source",
        "scores": {"pre_gated": {"em": 93.24, "f1": 95.0}, "reference": {"em": 92.8, "f1": 95.4}},
        "intervals": {"pre_gated": {"em": [91.6, 94.7]}, "reference": {"em": [91.1, 94.3]}},
        "parity": {"em_delta": 0.44, "em_delta_interval": [-0.9, 1.7], "f1_delta": -0.4},
        "routing": {"agreement": {"encoder": [1.0, 0.8, 0.75], "decoder": [1.0, 0.7, None]}},
        "engine": {
            "gpu_only": {"tpot_ms": 6.81, "tokens_equal_resident": True, "peak_device_bytes": 110_100_000},
            "on_demand": engine_row(19.8, hits=0, misses=192),
            "prefetch_all": engine_row(41.2, bytes_moved=1_610_612_736),
            "pre_gated": engine_row(12.4),
        },
        "engine_settings": {"device": "cpu", "tier": "disk", "device_budget_bytes": 25_165_824, "batch": 1},
        "environment": {"python": "3.11", "git": {"commit": "abc123", "dirty": True}},
    }


TRACES = {
    policy: [
        {"lane": "compute", "name": "decoder block 0 attention", "start_ms": 5.0, "end_ms": 6.0},
        {"lane": "transfer", "name": "decoder block 0 experts", "start_ms": 6.0, "end_ms": 8.0},
        {"lane": "wait", "name": "decoder block 0 experts", "start_ms": 6.0, "end_ms": 8.0},
        {"lane": "compute", "name": "decoder block 0 experts", "start_ms": 8.0, "end_ms": 8.4},
    ]
    for policy in ("on_demand", "pre_gated")
}
PREDICTIONS = [
    {
        "id": str(i),
        "source": f"question: number {i}? context: {'word ' * 80}",
        "prediction": f"answer {i}",
        "references": ["right", "right", "also right"],
        "scores": {"em": 0.0 if i in (2, 20, 21, 22, 23, 24) else 100.0},
    }
    for i in range(30)
]


class Checker(HTMLParser):
    """Follows the nesting of tags and keeps the text, row by row of each table."""

    def __init__(self):
        super().__init__()
        self.open, self.rows, self.text, self.resources = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.resources += [value for key, value in attrs if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def render(tmp_path, evaluation, predictions=(), traces=None):
    path = tmp_path / "report.html"
    page.write_report(path, evaluation, list(predictions), traces or {})
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return text, checker


def printed(evaluation, width=100):
    console = Console(file=StringIO(), width=width)
    evaluation_tables.print_summary(evaluation, console)
    return console.file.getvalue()


def test_full_report_is_one_file_with_every_section(tmp_path):
    text, checker = render(tmp_path, full_evaluation(), PREDICTIONS, TRACES)
    headings = re.findall(r"<h2>([^<]+)</h2>", text)
    assert headings == ["Accuracy", "Routing", "Offloaded inference", "Predictions", "Environment"]
    assert len(checker.resources) == 3
    assert all(resource.startswith("data:image/svg+xml;base64,") for resource in checker.resources)
    assert not re.search(r"https?://|@import|<script|url\(", text)
    assert ["Exact match", "93.2[91.6, 94.7]", "92.8[91.1, 94.3]", "+0.4[−0.9, +1.7]"] in checker.rows
    assert ["F1", "95.0", "95.4", "−0.4"] in checker.rows
    assert "1,234 examples" in checker.text
    assert "3 of 4" not in checker.text
    assert "Tokens equal the whole model's in 4 of 4 policies compared." in checker.text


def test_engine_table_compares_in_one_unit_and_dashes_the_unmeasured(tmp_path):
    _, checker = render(tmp_path, full_evaluation())
    rows = {row[0]: row[1:] for row in checker.rows}
    header = rows["Policy"]
    moved, peak = header.index("MovedGB"), header.index("Peak deviceMB")
    assert [rows[name][moved] for name in ("GPU only", "On demand", "Prefetch all")] == ["–", "0.40", "1.61"]
    assert [rows[name][peak] for name in ("GPU only", "Pre-gated")] == ["110.1", "31.5"]
    assert rows["GPU only"][header.index("Hitsexperts")] == "–"
    assert rows["On demand"][header.index("Hitsexperts")] == "0", "measured zeros stay zeros"
    assert rows["Pre-gated"][-1] == "yes"


def test_differing_tokens_are_loud(tmp_path):
    evaluation = full_evaluation()
    evaluation["engine"]["on_demand"]["tokens_equal_resident"] = False
    text, checker = render(tmp_path, evaluation)
    said = "Tokens differ from the whole model's in 1 of 4 policies: On demand."
    assert said in checker.text and said in printed(evaluation)
    assert 'class="statement wrong"' in text and '<td class="bad">NO</td>' in text
    assert [row[-1] for row in checker.rows if row[0] == "On demand"] == ["NO"]
    evaluation["engine"]["on_demand"] |= {"tokens_equal_resident": True, "logits_equal_resident": False}
    evaluation["engine"]["on_demand"]["logits_max_diff"] = 0.1234
    _, checker = render(tmp_path, evaluation)
    said = "Logits differ from the whole model's in 1 of 1 policies: On demand. Logits differ by at most 0.12."
    assert said in checker.text and said in printed(evaluation, 140).replace("\n", " ")
    assert [row[-1] for row in checker.rows if row[0] == "On demand"] == ["logits NO"]


def test_everything_from_outside_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"quoted\""
    evaluation = full_evaluation()
    evaluation |= {"task": evil, "split": evil, "checkpoint": evil, "reference": evil, "environment": {evil: evil}}
    evaluation["scores"]["pre_gated"][evil] = 1.0
    evaluation["engine"][evil] = engine_row(9.0)
    evaluation["engine_settings"][evil] = evil
    evaluation["config"] = {evil: [evil]}
    bad = {"source": evil, "prediction": evil, "references": [evil], "reference_prediction": evil, "correct": True}
    text, checker = render(tmp_path, evaluation, [bad], {evil: TRACES["pre_gated"]})
    assert "<script" not in text
    assert checker.text.count("<script>alert") >= 10


def without(*path):
    evaluation = full_evaluation()
    node = evaluation
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return evaluation


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {"task": "sst2", "scores": {"pre_gated": {"accuracy": 80.0}}},
        without("routing"),
        without("engine"),
        without("scores"),
        without("scores", "reference"),
        without("parity"),
        without("intervals"),
        without("environment"),
        {"task": "t", "engine": {"pre_gated": {}}},
        {"task": "t", "engine": {"pre_gated": {"tpot_ms": None, "hits": None}}, "reference": None},
    ],
)
def test_absent_parts_are_left_out_not_invented(tmp_path, evaluation):
    text, checker = render(tmp_path, evaluation)
    said = checker.text + printed(evaluation)
    assert "None" not in said
    assert "nan" not in said
    for section, heading in (
        ("routing", "Routing"),
        ("engine", "Offloaded inference"),
        ("scores", "Accuracy"),
    ):
        assert (f"<h2>{heading}</h2>" in text) == bool(evaluation.get(section)), heading


def test_routing_table_has_a_row_a_block_and_a_column_a_model(tmp_path):
    evaluation = full_evaluation()
    assert evaluation_tables.routing_table(evaluation) is None
    evaluation["routing"] |= {
        "gate_mass": {"encoder": [1.0, 0.91, 0.9], "decoder": [1.0, 0.8, 0.7]},
        "load_balance": {"pre_gated": {"encoder": [0.9, 0.8, 0.7], "decoder": [0.6, 0.5, 0.4]}},
        "switch_rate": {
            "pre_gated": {"encoder": [0.5, 0.5, 0.5], "decoder": [None, 0.25, 0.5]},
            "reference": {"encoder": [0.6, 0.6, 0.6], "decoder": [0.3, 0.3, 0.3]},
        },
    }
    table = evaluation_tables.routing_table(evaluation)
    assert table is not None
    rows = table.rows
    assert table.headers == [
        "Block",
        "Agreement, %",
        "Mass, %",
        "Load, pre-gated",
        "Switches, %, pre-gated",
        "Switches, %, reference",
    ]
    assert rows[0] == ["encoder 0", "100", "100", "90", "50", "60"]
    assert rows[3] == ["decoder 0", "100", "100", "60", "–", "30"]
    assert rows[5] == ["decoder 2", "–", "70", "40", "50", "30"]
    _, checker = render(tmp_path, evaluation)
    assert rows[3] in checker.rows


def test_samples_are_the_first_and_then_mistakes():
    chosen = [p["id"] for p in page.pick_samples(PREDICTIONS, "em")]
    assert chosen == ["0", "1", "2", "3", "4", "5", "6", "7", "20", "21", "22", "23"]


def test_sample_rows(tmp_path):
    partial = {"source": "s", "prediction": "p", "references": ["r"], "scores": {"em": 57.14}}
    _, checker = render(tmp_path, full_evaluation(), [PREDICTIONS[0], PREDICTIONS[2], partial, {"source": "only"}])
    marks = [row[0] for row in checker.rows[-4:]]
    assert marks == ["✓", "✗", "57", "–"]
    first = checker.rows[-4]
    assert first[2:] == ["answer 0", "right / also right"]
    assert len(first[1]) <= 222
    assert first[1].endswith("word …")


def test_long_texts_are_cut_between_words_where_there_are_any(tmp_path):
    texts = ["one two " * 60, "x" * 300, "short", ""]
    _, checker = render(tmp_path, {}, [{"source": text} for text in texts])
    shown = [row[1] for row in checker.rows[-4:]]
    assert len(shown[0]) <= 220 and shown[0].endswith((" one …", " two …"))
    assert shown[1:] == ["x" * 218 + " …", "short", ""]


def test_terminal_summary_fits_and_names_what_matters():
    evaluation = full_evaluation()
    evaluation["routing"]["agreement"]["encoder"] *= 20
    text = printed(evaluation, width=140)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "93.2 [91.6, 94.7]" in text
    assert "+0.4 [−0.9, +1.7]" in text
    engine = text.partition("Offloaded inference")[2]
    row = next(line for line in engine.splitlines() if line.strip().startswith("Pre-gated"))
    assert row.split() == ["Pre-gated", "40.0", "12.40", "80.6", "3.10", "0.40", "31.5", "88", "yes"]
    assert "100 70 –" in text


def test_terminal_summary_takes_brackets_literally():
    evaluation = full_evaluation()
    evaluation["task"] = "[bold]x[/nonsense]"
    assert "[bold]x[/nonsense]" in printed(evaluation)


def test_key_figures_compute_from_what_was_measured():
    figures = {
        label: (value, unit, note) for label, value, unit, note in evaluation_tables.key_figures(full_evaluation())
    }
    assert figures["Exact match"] == ("93.2", "%", "reference 92.8, difference +0.4")
    assert figures["Routing agreement"] == ("85", "%", "mean of 5 MoE blocks")
    assert figures["Pre-gated, per token"] == ("12.4", "ms", "on demand: 19.8 ms (1.60×)")
    assert figures["Pre-gated, peak memory"] == ("31.5", "MB", "29% of GPU only, 110 MB")
    evaluation = full_evaluation() | {"primary_metric": "f1"}
    assert next(evaluation_tables.key_figures(evaluation))[:2] == ("F1", "95.0")


def test_plots_draw_png_and_repeatable_svg_and_leave_no_state(tmp_path):
    before = dict(sys.modules["matplotlib"].rcParams) if "matplotlib" in sys.modules else None
    pyplot_before = "matplotlib.pyplot" in sys.modules
    evaluation = json.loads(json.dumps(full_evaluation()))
    kept = deepcopy(evaluation)
    for name, plot, data in (
        ("engine", plots.plot_engine, evaluation),
        ("agreement", plots.plot_agreement, evaluation),
        ("timeline", plots.plot_timeline, TRACES),
    ):
        png, svg, again = (tmp_path / f"{name}{suffix}" for suffix in (".png", ".svg", "2.svg"))
        assert plot(data, png)
        assert png.read_bytes().startswith(b"\x89PNG")
        assert plot(data, svg)
        assert plot(data, again)
        assert svg.read_bytes() == again.read_bytes()
    assert evaluation == kept
    assert ("matplotlib.pyplot" in sys.modules) == pyplot_before
    if before is not None:
        assert dict(sys.modules["matplotlib"].rcParams) == before


def test_plots_with_nothing_to_draw_write_nothing(tmp_path):
    path = tmp_path / "a.png"
    assert not plots.plot_engine({"engine": {"pre_gated": {"hits": 1}}}, path)
    assert not plots.plot_agreement({"routing": {"agreement": {"encoder": [None]}}}, path)
    assert not plots.plot_timeline({"pre_gated": []}, path)
    assert not path.exists()


def test_waiting_is_the_only_red_in_the_bars(tmp_path):
    path = tmp_path / "a.svg"
    evaluation = {"engine": {"on_demand": {"tpot_ms": 10.0, "exposed_ms_per_token": 4.0}}}
    plots.plot_engine(evaluation, path)
    assert WAIT in path.read_text()
    evaluation["engine"]["on_demand"]["exposed_ms_per_token"] = 0.0
    plots.plot_engine(evaluation, path)
    assert WAIT not in path.read_text()


def test_settings_are_listed_with_dotted_names_and_the_empty_left_out(tmp_path):
    config = {"train": {"steps": 3, "bf16": False, "seed": None}, "stacks": ["a", "b"], "overrides": [], "name": "x"}
    text, _ = render(tmp_path, {"environment": {"git": {"commit": "abc", "dirty": True}}, "config": config})
    shown = re.findall(r"<dt>([^<]+)</dt><dd>([^<]*)</dd></div>", text)
    assert shown == [
        ("git commit", "abc"),
        ("uncommitted changes", "yes"),
        *(("train.steps", "3"), ("train.bf16", "no"), ("stacks", "a, b"), ("name", "x")),
    ]
